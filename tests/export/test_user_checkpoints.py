"""Checkpoints as users have them: other packings of the same tensors give the same values, the rest is named."""

import json
import os
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from test_checkpoints import save_sparse
from torch import Tensor

from conftest import MakeModels, picture
from i2l.errors import CheckpointAmbiguous, CheckpointForeign, CheckpointIncomplete, CheckpointMismatch
from i2l.export.build import build_engines
from i2l.export.checkpoints.finding import find_checkpoints
from i2l.export.checkpoints.reader import scaled_values, stream_tensors
from i2l.export.checkpoints.recognise import SPEC_KEY, Checkpoint, recognise
from i2l.export.checkpoints.shapes import tensor_shapes
from i2l.export.checkpoints.tensor_names import scale_fits
from i2l.look.verification import verify_engines
from i2l.specs import PRESETS, QWEN_IMAGE_ADAPTERS, Family, spec_to_dict

Tensors = dict[str, Tensor]
DINO: Family = "dinov3"
SIGLIP: Family = "siglip2"


@pytest.fixture
def published(models: MakeModels) -> Callable[[Family], Tensors]:
    """The tensors of a tiny model in the published form."""
    return lambda family: load_file(find_checkpoints(models("tiny"))[family].path)


def save(path: Path, tensors: Tensors, family: Family) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    marks = {SPEC_KEY: json.dumps(spec_to_dict(getattr(PRESETS["tiny"], family)))}
    save_file({name: value.contiguous() for name, value in tensors.items()}, path, marks)
    return path


def values_of(checkpoint: Checkpoint) -> Tensors:
    groups = [[name] for name in checkpoint.tensors]
    return {
        name: tensor.float().clone() for group in stream_tensors(checkpoint, groups) for name, tensor in group.items()
    }


def require_equal(found: Tensors, wanted: Tensors) -> None:
    assert found.keys() == wanted.keys()
    for name, value in wanted.items():
        assert torch.equal(found[name], value.float()), name


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2])
@pytest.mark.parametrize("family", [SIGLIP, DINO, "adapter"])
def test_fp8_casts(family: Family, dtype: torch.dtype, published: Callable[[Family], Tensors], tmp_path: Path) -> None:
    cast = {name: value.to(dtype) for name, value in published(family).items()}
    found = recognise(save(tmp_path / "x.safetensors", cast, family))
    require_equal(values_of(found), {name: value.float() for name, value in cast.items()})


SCALES: dict[str, tuple[Callable[[str], str], Callable[[Tensor], Tensor]]] = {
    "one": (lambda name: f"{name.removesuffix('weight')}scale_weight", lambda _: torch.tensor(0.37)),
    "one of one": (lambda name: f"{name}_scale", lambda _: torch.tensor([0.37])),
    "rows": (lambda name: f"{name}_scale", lambda value: torch.rand(len(value), 1) + 0.1),
    "blocks": (
        lambda name: f"{name}_scale_inv",
        lambda value: torch.rand(-(-value.shape[0] // 128), -(-value.shape[1] // 128)) + 0.1,
    ),
}


@pytest.mark.parametrize("kind", SCALES)
def test_scaled_fp8(kind: str, published: Callable[[Family], Tensors], tmp_path: Path) -> None:
    spell, make = SCALES[kind]
    packed: Tensors = {"scaled_fp8": torch.zeros(2).to(torch.float8_e4m3fn)}
    wanted: Tensors = {}
    for name, value in published(DINO).items():
        if value.ndim == 2:
            packed[name], scale = value.to(torch.float8_e4m3fn), make(value)
            packed[spell(name)] = scale
            wanted[name] = scaled_values(packed[name], scale)
            packed[f"{name.removesuffix('.weight')}.scale_input"] = torch.ones(1)
        else:
            packed[name] = wanted[name] = value
    found = recognise(save(tmp_path / "x.safetensors", packed, DINO))
    require_equal(values_of(found), wanted)
    lost = next(name for name in packed if name.endswith(("weight_scale", "scale_weight", "weight_scale_inv")))
    packed.pop(lost)
    with pytest.raises(CheckpointMismatch, match=r"missing: the scale of .*") as caught:
        recognise(save(tmp_path / "y.safetensors", packed, DINO))
    assert "looks like dinov3" in str(caught.value)


def test_scales_are_multiplied() -> None:
    ones = torch.ones(200, 130).to(torch.float8_e4m3fn)
    blocks = scaled_values(ones, torch.tensor([[2.0, 3.0], [4.0, 5.0]]))
    assert [float(blocks[place]) for place in ((0, 0), (127, 129), (128, 127), (199, 128))] == [2, 3, 4, 5]
    rows = scaled_values(ones, torch.arange(200.0))
    assert torch.equal(rows[:, 7], torch.arange(200.0))
    assert scale_fits((), (3, 4))
    assert not scale_fits((3, 4), (3, 4))


def transformers5(name: str) -> str:
    return f"model.{name}" if name.startswith("layer.") else name


@pytest.mark.parametrize("outer", ["", "encoder_model.", "model.dinov3."])
def test_dinov3_as_transformers_5_saves_it(outer: str, published: Callable[[Family], Tensors], tmp_path: Path) -> None:
    wanted = published(DINO)
    saved = {outer + transformers5(name): value for name, value in wanted.items()}
    require_equal(values_of(recognise(save(tmp_path / "x.safetensors", saved, DINO))), wanted)


def test_siglip2_beside_a_text_tower_and_buffers(published: Callable[[Family], Tensors], tmp_path: Path) -> None:
    wanted = published(SIGLIP)
    saved = {f"vision_model.{name}": value for name, value in wanted.items()}
    saved |= {"vision_model.embeddings.position_ids": torch.arange(9)[None], "logit_scale": torch.ones(1)}
    saved |= {f"text_model.{name}": value + 1 for name, value in wanted.items() if "encoder.layers.0" in name}
    require_equal(values_of(recognise(save(tmp_path / "x.safetensors", saved, SIGLIP))), wanted)
    saved.pop("vision_model.encoder.layers.0.mlp.fc1.weight")  # the text tower's must not stand in for it
    with pytest.raises(CheckpointMismatch, match=r"missing: encoder\.layers\.0\.mlp\.fc1\.weight"):
        recognise(save(tmp_path / "y.safetensors", saved, SIGLIP))


@pytest.mark.parametrize("name", ["layer.0.attention.q_proj.bias", "layer.99.norm1.weight", "norm.extra"])
def test_a_weight_of_its_own_makes_it_another_model(
    name: str, published: Callable[[Family], Tensors], tmp_path: Path
) -> None:
    saved = published(DINO) | {name: torch.ones(4)}
    with pytest.raises(CheckpointMismatch, match=f"unexpected: {name}: give the published file"):
        recognise(save(tmp_path / "x.safetensors", saved, DINO))


@pytest.mark.parametrize("index", [True, False])
def test_shards(index: bool, published: Callable[[Family], Tensors], tmp_path: Path) -> None:
    wanted = published(DINO)
    names = list(wanted)
    parts = [names[start::3] for start in range(3)]
    files = [f"model-0000{number}-of-00003.safetensors" for number in (1, 2, 3)]
    for file, part in zip(files, parts, strict=True):
        save(tmp_path / file, {name: wanted[name] for name in part}, DINO)
    if index:
        places = {name: file for file, part in zip(files, parts, strict=True) for name in part}
        (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": places}))
    found = find_checkpoints(tmp_path, [DINO])[DINO]
    assert len(found.paths) == 3
    require_equal(values_of(found), wanted)
    (tmp_path / files[1]).unlink()
    with pytest.raises(Exception, match=rf"3 shards, of which {files[1]} is missing") as caught:
        find_checkpoints(tmp_path, [DINO])
    assert "download it again" not in str(caught.value)
    assert issubclass(CheckpointIncomplete, FileNotFoundError)


@pytest.mark.parametrize("link", [True, False])
def test_the_same_content_twice(
    link: bool, published: Callable[[Family], Tensors], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = save(tmp_path / "a" / "one.safetensors", published(SIGLIP), SIGLIP)
    other = tmp_path / "b" / "two.safetensors"
    other.parent.mkdir()
    (os.link if link else shutil.copy)(path, other)
    with caplog.at_level("INFO"):
        assert find_checkpoints(tmp_path, [SIGLIP])[SIGLIP].path == path
    assert "one.safetensors is taken" in caplog.text
    changed = published(SIGLIP)
    changed["post_layernorm.bias"] = changed["post_layernorm.bias"] + 1
    save(tmp_path / "c.safetensors", changed, SIGLIP)
    with pytest.raises(CheckpointAmbiguous):
        find_checkpoints(tmp_path, [SIGLIP])


def test_what_it_is_instead_is_named(tmp_path: Path) -> None:
    lora = {"layers.0.attention.to_q.lora_A.weight": torch.ones(4, 8)}
    save_file(lora, tmp_path / "lora.safetensors")
    with pytest.raises(CheckpointForeign, match=r"\(a LoRA\)"):
        recognise(tmp_path / "lora.safetensors")
    vae = {"decoder.conv_in.weight": torch.ones(4, 8)}
    save_file(vae, tmp_path / "vae.safetensors")
    with pytest.raises(CheckpointForeign, match=r"\(a VAE\)"):
        recognise(tmp_path / "vae.safetensors")


@pytest.mark.parametrize(("compress", "kind"), [(128, "Coarse or Fine"), (32, "not Style")])
def test_the_other_adapters_of_qwen_image_are_named(compress: int, kind: str, tmp_path: Path) -> None:
    """Whole files, of the right names and other sizes: the published ones but for the width they compress to."""
    spec = replace(QWEN_IMAGE_ADAPTERS["full"], compress=compress)
    path = save_sparse(tmp_path / "model.safetensors", tensor_shapes(spec), "BF16")
    said = rf"Qwen-Image-i2L, {kind} \(compressed to {compress}\); this needs Style \(64\)"
    with pytest.raises(CheckpointForeign, match=said) as caught:
        recognise(path)
    assert "download it again" not in str(caught.value)


def test_another_size_of_an_encoder_is_named(tmp_path: Path) -> None:
    spec = replace(PRESETS["full"].siglip2, hidden=1152, intermediate=4304)
    path = save_sparse(tmp_path / "model.safetensors", tensor_shapes(spec), "BF16")
    with pytest.raises(CheckpointForeign, match=r"another size of SigLIP2-G384: its \S+ is \[1152.*, this needs \["):
        recognise(path)


@pytest.mark.parametrize(("dtype", "name"), [(torch.float8_e4m3fn, "F8_E4M3"), (torch.bfloat16, "BF16")])
def test_verify_says_what_quantisation_costs_on_top(
    dtype: torch.dtype, name: str, models: MakeModels, tmp_path: Path
) -> None:
    """The reference is of the upcast values, so what the cast cost is not in the numbers; its dtype stands beside."""
    folder = tmp_path / "models"
    for family, checkpoint in find_checkpoints(models("tiny")).items():
        tensors = {name: value.to(dtype) for name, value in load_file(checkpoint.path).items()}
        save(folder / f"{family}.safetensors", tensors, family)
    build_engines(folder, tmp_path / "engines", precision="fp32")
    facts = verify_engines(folder, tmp_path / "engines", picture(320, 240)).to_dict()
    assert facts["checkpoint_dtypes"] == dict.fromkeys((SIGLIP, DINO, "adapter"), name)
    assert facts["lora_worst"] < 1e-4  # fp32 packs hold every FP8 and BF16 value exactly
