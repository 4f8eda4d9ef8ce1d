"""The written file in the loaders that users have: diffusers with peft, DiffSynth, and ComfyUI's key map.

What must arrive is, for every module, ``strength * mean(B @ A)`` of the adapter's factors: computed here from the
factors of single images, not from the file. ComfyUI cannot be installed for a test, so its key map is written down from
its published rules (shared/facts/lora-formats.md): Z-Image's q, k and v are one fused weight there.
"""

import dataclasses
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from conftest import MakeEngines, picture
from i2l.lora.keys import KeyFormat
from i2l.lora.lora import Lora, lora_from_factors
from i2l.runtime.pipeline import Pipeline, open_engines
from i2l.specs import PRESETS, QWEN_IMAGE_ADAPTERS, AdapterSpec
from oracles import diffsynth_module, import_torchvision

STRENGTH = 0.7
TINY = PRESETS["tiny"].adapter
DEEP = dataclasses.replace(TINY, layers=30, refiners=2)
QWEN = QWEN_IMAGE_ADAPTERS["tiny"]
MODULES = 28
"""Of the tiny Z-Image: 4 blocks times 7 targets."""
FULL_MODULES = 238


class Written(NamedTuple):
    """A LoRA of two images, in both key forms, and the changes that it stands for."""

    files: Mapping[KeyFormat, Path]
    changes: Mapping[str, torch.Tensor]
    """``module -> strength * mean(B @ A)``."""


def written(pipeline: Pipeline, folder: Path) -> Written:
    embeddings = pipeline.embed([picture(90, 60, 1), picture(60, 90, 2)])
    return saved(pipeline.lora_from_embeddings(embeddings, strength=STRENGTH), pipeline.factors(embeddings), folder)


def saved(lora: Lora, factors: Mapping[str, tuple[np.ndarray, np.ndarray]], folder: Path) -> Written:
    key_formats: tuple[KeyFormat, ...] = ("comfyui", "diffsynth")
    files = {name: lora.save(folder / f"{name}.safetensors", dtype="fp32", key_format=name) for name in key_formats}
    changes = {
        module: torch.from_numpy(STRENGTH * np.mean([b[i] @ a[i] for i in range(len(a))], axis=0))
        for module, (a, b) in factors.items()
    }
    return Written(files, changes)


@pytest.fixture(scope="module")
def z_image(engines: MakeEngines, tmp_path_factory: pytest.TempPathFactory) -> Written:
    with open_engines(engines("tiny", "fp32")) as pipeline:
        return written(pipeline, tmp_path_factory.mktemp("z-image"))


@pytest.fixture(scope="module")
def deep_z_image(tmp_path_factory: pytest.TempPathFactory) -> Written:
    """Of a Z-Image that is narrow, but as deep as the published one; made-up factors, as engines would take a while."""
    generator = np.random.default_rng(0)

    def normal(*shape: int) -> np.ndarray:
        return generator.standard_normal(shape, np.float32)

    factors = {m: (normal(2, 4, wide), normal(2, tall, 4)) for m, (tall, wide) in module_shapes(DEEP)}
    return saved(lora_from_factors(factors, STRENGTH), factors, tmp_path_factory.mktemp("deep"))


@pytest.fixture(scope="module")
def qwen_image(engines: MakeEngines, tmp_path_factory: pytest.TempPathFactory) -> Written:
    with open_engines(engines("tiny", "fp32", adapter="qwen-image")) as pipeline:
        return written(pipeline, tmp_path_factory.mktemp("qwen-image"))


def z_image_transformer(spec: AdapterSpec = TINY) -> Any:
    import_torchvision()  # transformers, which peft wants, imports it
    from diffusers import ZImageTransformer2DModel

    torch.manual_seed(0)
    return ZImageTransformer2DModel(
        dim=spec.hidden, n_layers=spec.layers, n_refiner_layers=spec.refiners, n_heads=3, n_kv_heads=3,
        cap_feat_dim=16, axes_dims=[8, 12, 12], axes_lens=[16, 16, 16],
    )  # fmt: skip


def qwen_image_transformer() -> Any:
    import_torchvision()
    from diffusers import QwenImageTransformer2DModel

    torch.manual_seed(0)
    return QwenImageTransformer2DModel(
        num_layers=QWEN.layers, num_attention_heads=2, attention_head_dim=QWEN.hidden // 2, joint_attention_dim=16,
        axes_dims_rope=(8, 8, 8), in_channels=16, out_channels=4,
    )  # fmt: skip


def near(found: torch.Tensor, wanted: torch.Tensor) -> bool:
    """Equal up to float32: sums of 8 products in another order."""
    return bool((found - wanted).abs().max() <= 1e-5 * wanted.abs().max())


def peft_changes(transformer: Any) -> dict[str, torch.Tensor]:
    """What peft adds to each weight."""
    from peft.tuners.lora import LoraLayer

    return {
        name: module.get_delta_weight("i2l").detach()
        for name, module in transformer.named_modules()
        if isinstance(module, LoraLayer)
    }


def assert_all_arrived(found: Mapping[str, torch.Tensor], wanted: Mapping[str, torch.Tensor]) -> None:
    assert found.keys() == wanted.keys()
    assert [module for module in wanted if not near(found[module], wanted[module])] == []


# --- diffusers and peft ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("key_format", ["comfyui", "diffsynth"])
@pytest.mark.parametrize(
    ("model", "spec", "modules"), [("z_image", TINY, MODULES), ("deep_z_image", DEEP, FULL_MODULES)]
)
def test_diffusers_loads_every_module_of_z_image(
    model: str, spec: AdapterSpec, modules: int, key_format: KeyFormat, request: pytest.FixtureRequest
) -> None:
    lora: Written = request.getfixturevalue(model)
    transformer = z_image_transformer(spec)
    from diffusers.loaders.lora_pipeline import ZImageLoraLoaderMixin

    path = lora.files[key_format]
    state = ZImageLoraLoaderMixin.lora_state_dict(path.parent, weight_name=path.name)
    ZImageLoraLoaderMixin.load_lora_into_transformer(state, transformer, adapter_name="i2l")
    assert_all_arrived(peft_changes(transformer), lora.changes)
    assert len(lora.changes) == modules


def test_diffusers_loads_every_module_of_qwen_image(qwen_image: Written) -> None:
    transformer = qwen_image_transformer()
    from diffusers.loaders.lora_pipeline import QwenImageLoraLoaderMixin

    path = qwen_image.files["comfyui"]
    state = QwenImageLoraLoaderMixin.lora_state_dict(path.parent, weight_name=path.name)
    QwenImageLoraLoaderMixin.load_lora_into_transformer(state, transformer, adapter_name="i2l")
    assert_all_arrived(peft_changes(transformer), qwen_image.changes)
    assert len(qwen_image.changes) == 24


def module_shapes(spec: AdapterSpec) -> Iterator[tuple[str, tuple[int, int]]]:
    """``(module, shape of its weight)`` of everything that a LoRA of this adapter changes."""
    per_component = len(spec.kinds)
    assert per_component in (2, 4)
    for component, blocks in spec.components:
        for index in range(blocks):
            for _, targets in spec.kinds:
                for target, in_features, out_features in targets:
                    yield f"{component}.{index}.{target}", (out_features, in_features)


@pytest.mark.parametrize(
    ("spec", "name", "modules"),
    [
        (PRESETS["full"].adapter, "ZImageTransformer2DModel", FULL_MODULES),
        (QWEN_IMAGE_ADAPTERS["full"], "QwenImageTransformer2DModel", 720),
    ],
)
def test_the_published_models_have_every_module(spec: AdapterSpec, name: str, modules: int) -> None:
    """diffusers' default configurations are the published models; on the meta device they take no memory."""
    import_torchvision()
    import diffusers

    with torch.device("meta"):
        model = getattr(diffusers, name)()
    weights = {key.removesuffix(".weight"): tuple(p.shape) for key, p in model.named_parameters()}
    wanted = dict(module_shapes(spec))
    assert len(wanted) == modules
    assert {module: weights.get(module) for module in wanted} == wanted


# --- DiffSynth ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("key_format", ["comfyui", "diffsynth"])
@pytest.mark.parametrize("model", ["z_image", "deep_z_image", "qwen_image"])
def test_diffsynth_fuses_every_module(
    model: str, key_format: KeyFormat, request: pytest.FixtureRequest, capsys: pytest.CaptureFixture[str]
) -> None:
    lora: Written = request.getfixturevalue(model)
    made = {"z_image": z_image_transformer, "qwen_image": qwen_image_transformer}
    transformer = z_image_transformer(DEEP) if model == "deep_z_image" else made[model]()
    before = {name: value.clone() for name, value in transformer.state_dict().items()}
    loader = diffsynth_module("utils.lora.general").GeneralLoRALoader()
    loader.fuse_lora_to_base_model(transformer, load_file(lora.files[key_format]))
    assert f"{len(lora.changes)} tensors are fused" in capsys.readouterr().out
    after = transformer.state_dict()
    for name, old in before.items():
        module = name.removesuffix(".weight")
        change = after[name] - old
        # the sum with the base weight is rounded at the base weight's size
        wanted = lora.changes[module] if module in lora.changes and name != module else torch.zeros_like(old)
        assert (change - wanted).abs().max() <= 1e-5 * max(1e-3, float(wanted.abs().max())) + 2e-7 * old.abs().max()


# --- ComfyUI's key map -------------------------------------------------------------------------------------------


class Place(NamedTuple):
    """Rows of a weight of ComfyUI's model."""

    weight: str
    start: int
    rows: int


def fused_shapes(spec: AdapterSpec) -> dict[str, tuple[int, int]]:
    """Z-Image's weights as ComfyUI has them: q, k and v in one."""
    shapes = {}
    for component, blocks in spec.components:
        for index in range(blocks):
            block = f"{component}.{index}"
            shapes[f"{block}.attention.qkv"] = (3 * spec.hidden, spec.hidden)
            shapes[f"{block}.attention.out"] = (spec.hidden, spec.hidden)
            for target, in_features, out_features in spec.feed_forward_targets:
                shapes[f"{block}.{target}"] = (out_features, in_features)
    return shapes


def comfyui_key_map(shapes: Mapping[str, tuple[int, int]], *, since_2026: bool = True) -> dict[str, Place]:
    """``LoRA key without its ending -> place``: the model's own names and those that diffusers has for the fused ones,
    with ``diffusion_model.`` or ``transformer.`` before them; since January 2026 also bare."""
    places = {}
    for weight, (rows, columns) in shapes.items():
        names = {weight: Place(weight, 0, rows)}
        block = weight.removesuffix(".qkv").removesuffix(".out")
        if weight.endswith("attention.qkv"):
            names |= {f"{block}.to_{part}": Place(weight, i * columns, columns) for i, part in enumerate("qkv")}
        if weight.endswith("attention.out"):
            names[f"{block}.to_out.0"] = Place(weight, 0, rows)
        for name, place in names.items():
            places[f"diffusion_model.{name}"] = places[f"transformer.{name}"] = place
            if since_2026:
                places[name] = place
    return places


def comfyui_changes(
    path: Path, places: Mapping[str, Place], shapes: Mapping[str, tuple[int, int]]
) -> tuple[dict[str, torch.Tensor], int]:
    """The change of every fused weight, and how many modules of the file found their place; no alpha means 1."""
    tensors = load_file(path)
    changes = {weight: torch.zeros(shape) for weight, shape in shapes.items()}
    loaded = 0
    for prefix, place in places.items():
        for ending in (".weight", ".default.weight"):
            if f"{prefix}.lora_B{ending}" in tensors:
                rows = slice(place.start, place.start + place.rows)
                changes[place.weight][rows] += tensors[f"{prefix}.lora_B{ending}"] @ tensors[f"{prefix}.lora_A{ending}"]
                loaded += 1
    return changes, loaded


@pytest.mark.parametrize(
    ("key_format", "since_2026", "arrive"),
    [
        ("comfyui", True, FULL_MODULES),
        ("comfyui", False, FULL_MODULES),
        ("diffsynth", True, FULL_MODULES),
        ("diffsynth", False, 0),
    ],
)
def test_comfyui_places_every_module(
    deep_z_image: Written, key_format: KeyFormat, since_2026: bool, arrive: int
) -> None:
    shapes = fused_shapes(DEEP)
    found, loaded = comfyui_changes(
        deep_z_image.files[key_format], comfyui_key_map(shapes, since_2026=since_2026), shapes
    )
    assert loaded == arrive
    if not arrive:
        return
    for weight, change in found.items():
        block = weight.rpartition(".")[0]
        if weight.endswith(".qkv"):
            wanted = torch.cat([deep_z_image.changes[f"{block}.to_{part}"] for part in "qkv"])
        else:
            wanted = deep_z_image.changes[f"{block}.to_out.0" if weight.endswith(".out") else weight]
        assert near(change, wanted)
