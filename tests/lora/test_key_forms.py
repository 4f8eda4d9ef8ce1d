"""LoRA files of other programs: every key form, scale, dtype and label."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from click.testing import CliRunner, Result
from numpy.typing import NDArray
from safetensors.numpy import save_file
from safetensors.torch import save_file as save_torch

from i2l.cli import main
from i2l.errors import LoraNotASum, LorasForOthers
from i2l.lora.keys import ALL_KEYS
from i2l.lora.lora import CLAIMS, MODEL_METADATA, Lora
from i2l.lora.lorafiles import merge_loras
from i2l.lora.names import component, diffusion_model, dotted, place
from i2l.lora.reading import describe_lora, read_factors, read_lora
from i2l.lora.values import FLOAT8_E4M3

MODULES = ("layers.0.attention.to_out.0", "noise_refiner.1.feed_forward.w2", "layers.12.adaLN_modulation.0")
QWEN = ("transformer_blocks.0.attn.to_q", "transformer_blocks.59.img_mlp.net.0.proj", "transformer_blocks.3.txt_mod.1")
FLUX = ("double_blocks.0.img_attn.qkv", "single_blocks.37.linear1")
Tensors = dict[str, NDArray[Any]]


def factors(modules: tuple[str, ...], rank: int = 6, seed: int = 0) -> dict[str, tuple[NDArray[Any], NDArray[Any]]]:
    random = np.random.default_rng(seed)
    return {
        m: (random.standard_normal((rank, 12), np.float32), random.standard_normal((10, rank), np.float32))
        for m in modules
    }


def change(pair: tuple[NDArray[Any], NDArray[Any]]) -> NDArray[np.float64]:
    return np.asarray(pair[1].astype(np.float64) @ pair[0].astype(np.float64))


def i2l(*arguments: object) -> Result:
    return CliRunner().invoke(main, [str(argument) for argument in arguments], catch_exceptions=False)


DOTS: Callable[[str], str] = str
UNDERSCORES: Callable[[str], str] = lambda module: module.replace(".", "_")  # noqa: E731
FORMS: dict[str, tuple[str, Callable[[str], str], str, str]] = {
    "comfyui": ("diffusion_model.", DOTS, "lora_A.weight", "lora_B.weight"),
    "comfyui, lora_down": ("diffusion_model.", DOTS, "lora_down.weight", "lora_up.weight"),
    "diffusers": ("transformer.", DOTS, "lora_A.weight", "lora_B.weight"),
    "peft": ("base_model.model.", DOTS, "lora_A.weight", "lora_B.weight"),
    "peft ": ("base_model.model.", DOTS, "lora_A.default.weight", "lora_B.default.weight"),
    "peft  ": ("base_model.model.diffusion_model.", DOTS, "lora_A.weight", "lora_B.weight"),
    "kohya": ("lora_unet_", UNDERSCORES, "lora_down.weight", "lora_up.weight"),
    "kohya ": ("lora_unet__", UNDERSCORES, "lora_down.weight", "lora_up.weight"),
    "kohya  ": ("lora_unet_", UNDERSCORES, "lora_A.weight", "lora_B.weight"),
    "bare": ("", DOTS, "lora_A.weight", "lora_B.weight"),
    "diffsynth": ("", DOTS, "lora_A.default.weight", "lora_B.default.weight"),
}


def in_form(form: str, pairs: dict[str, Any], alphas: dict[str, float] | None = None) -> Tensors:
    prefix, spelled, down, up = FORMS[form]
    tensors: Tensors = {}
    for module, (a, b) in pairs.items():
        tensors |= {f"{prefix}{spelled(module)}.{down}": a, f"{prefix}{spelled(module)}.{up}": b}
        if alphas:
            tensors[f"{prefix}{spelled(module)}.alpha"] = np.array(alphas[module], np.float32)
    return tensors


@pytest.mark.parametrize("modules", [MODULES, QWEN, FLUX])
@pytest.mark.parametrize("form", FORMS)
def test_every_form_is_read(form: str, modules: tuple[str, ...], tmp_path: Path) -> None:
    pairs = factors(modules)
    alphas = {module: 3.0 + index for index, module in enumerate(modules)}
    for scales in (None, alphas):
        save_file(in_form(form, pairs, scales), tmp_path / "x.safetensors")
        found = read_lora(tmp_path / "x.safetensors")
        assert found.key_format == form.strip().replace("kohya, lora_down", "kohya")
        assert set(found.lora.factors) == set(modules)
        for module, pair in pairs.items():
            scale = scales[module] / 6 if scales else 1
            np.testing.assert_allclose(change(found.lora.factors[module]), scale * change(pair), atol=1e-5)
        facts = describe_lora(tmp_path / "x.safetensors")
        assert (facts["modules"], facts["rank"]) == (len(modules), 6)
        assert facts.get("alpha") == (sorted(alphas.values()) if scales else None)


def test_one_alpha_is_one_number(tmp_path: Path) -> None:
    save_file(in_form("kohya", factors(MODULES), dict.fromkeys(MODULES, 3.0)), tmp_path / "x.safetensors")
    facts = describe_lora(tmp_path / "x.safetensors")
    assert (facts["alpha"], facts["scale"]) == (3.0, 0.5)


@pytest.mark.parametrize("place_of_config", ["beside", "header"])
def test_pefts_config_scales(place_of_config: str, tmp_path: Path) -> None:
    config = {"r": 6, "lora_alpha": 12, "alpha_pattern": {"attention.to_out.0": 3}, "rank_pattern": {}}
    path = tmp_path / "adapter_model.safetensors"
    metadata = {}
    if place_of_config == "beside":
        (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    else:
        metadata["lora_adapter_metadata"] = json.dumps({f"transformer.{key}": value for key, value in config.items()})
    pairs = factors(MODULES)
    save_file(in_form("peft", pairs), path, metadata=metadata)
    found = read_lora(path).lora.factors
    for module, pair in pairs.items():
        np.testing.assert_allclose(change(found[module]), (0.5 if "to_out" in module else 2) * change(pair), atol=1e-5)
    assert describe_lora(path)["scale"] == [0.5, 2.0]


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2, torch.float16, torch.bfloat16])
def test_every_dtype_is_upcast_exactly(dtype: torch.dtype, tmp_path: Path) -> None:
    tensors = {k: torch.from_numpy(v).to(dtype) for k, v in in_form("comfyui", factors(MODULES)).items()}
    save_torch(tensors, tmp_path / "x.safetensors")
    found = read_lora(tmp_path / "x.safetensors").lora.factors
    for module, (a, b) in found.items():
        np.testing.assert_array_equal(a, tensors[f"diffusion_model.{module}.lora_A.weight"].float().numpy())
        np.testing.assert_array_equal(b, tensors[f"diffusion_model.{module}.lora_B.weight"].float().numpy())


def test_all_256_values_of_float8() -> None:
    wanted = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn).float().numpy()
    np.testing.assert_array_equal(FLOAT8_E4M3, wanted)


OTHERS: dict[str, tuple[str, ...]] = {
    "DoRA": ("lora_A.weight", "lora_B.weight", "lora_magnitude_vector"),
    "LoKr": ("lokr_w1", "lokr_w2_a", "lokr_w2_b"),
    "LoHa": ("hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b"),
    "OFT": ("oft_blocks",),
}


@pytest.mark.parametrize("prefix", ["diffusion_model.layers.0.attention.to_q", "lora_unet_layers_0_attention_to_q"])
@pytest.mark.parametrize("kind", OTHERS)
def test_what_is_no_plain_sum_is_named(kind: str, prefix: str, tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    save_file({f"{prefix}.{part}": np.ones((4, 4), np.float32) for part in OTHERS[kind]}, path)
    facts = json.loads(i2l("inspect", path, "--json").stdout)
    assert (facts["kind"], facts["variant"], facts["modules"]) == ("lora", kind, 1)
    with pytest.raises(LoraNotASum, match=kind):
        read_lora(path)
    result = i2l("merge", path, path, "--output", tmp_path / "y.safetensors")
    assert result.exit_code == 1
    assert kind in result.stderr
    if kind == "DoRA":
        assert i2l("plot", path, "--output", tmp_path / "x.png").exit_code == 0
        assert read_factors(path, allow=frozenset({"DoRA"})).kinds == ("DoRA",)


@pytest.mark.parametrize("prefix", ["text_encoders.qwen3_4b.layers.0.", "lora_te1_layers_0_", "text_encoder."])
def test_a_text_encoders_part_is_left_out_and_said(prefix: str, tmp_path: Path) -> None:
    tensors = in_form("kohya" if "te1" in prefix else "comfyui", factors(MODULES))
    down, up = ("lora_down", "lora_up") if "te1" in prefix else ("lora_A", "lora_B")
    tensors |= {f"{prefix}q_proj.{part}.weight": np.ones((4, 4), np.float32) for part in (down, up)}
    path = tmp_path / "x.safetensors"
    save_file(tensors, path)
    assert describe_lora(path)["text_encoder_modules"] == 1
    result = i2l("merge", path, path, "--output", tmp_path / "y.safetensors")
    assert "1 modules of a text encoder are left out" in result.stderr
    assert set(read_lora(tmp_path / "y.safetensors").lora.factors) == set(MODULES)


# --- labels ---------------------------------------------------------------------------------------------------------


def of(modules: tuple[str, ...], width: int = 32) -> dict[str, tuple[int, int]]:
    return dict.fromkeys(modules, (width, width))


@pytest.mark.parametrize(
    ("modules", "width", "model"),
    [
        (MODULES, 3840, "z-image"),
        (("layers.0.attention.qkv",), 3840, "z-image"),
        (("layers.0.attention.qkv",), 2304, None),  # Lumina 2
        (("layers.0.feed_forward.w1",), 4096, None),  # a language model
        (("layers.0.self_attn.q_proj",), 3840, None),
        (QWEN, 3072, "qwen-image"),
        (("transformer_blocks.59.attn.to_q",), 3072, "qwen-image"),
        (("transformer_blocks.5.attn.to_q",), 3072, None),  # Qwen-Image, FLUX.1 or SD 3
        (("transformer_blocks.5.attn.to_q",), 1536, None),
        (FLUX, 3072, "flux.1"),
        (FLUX, 6144, None),  # FLUX.2
        (("transformer_blocks.18.ff_context.net.2", "single_transformer_blocks.37.proj_mlp"), 3072, "flux.1"),
        (("transformer_blocks.19.attn.to_q", "single_transformer_blocks.39.proj_mlp"), 3072, None),  # HunyuanVideo
        (("down_blocks.0.attentions.0.to_q",), 320, None),
    ],
)
def test_the_model_is_read_from_keys_and_shapes(modules: tuple[str, ...], width: int, model: str | None) -> None:
    assert diffusion_model(of(modules, width)) == model


def claims(path: Path) -> dict[str, str]:
    metadata = describe_lora(path)["metadata"]
    assert isinstance(metadata, dict)
    return {name: metadata[name] for name in CLAIMS if name in metadata}


def test_labels_follow_the_modules(tmp_path: Path) -> None:
    wrong = MODEL_METADATA["z-image"]
    for modules, wanted in ((MODULES, MODEL_METADATA["z-image"]), (QWEN, MODEL_METADATA["qwen-image"]), (FLUX, {})):
        for metadata in ({}, wrong):
            save_file(in_form("bare", factors(modules)), tmp_path / "a.safetensors", metadata=metadata)
            result = i2l(
                "merge", tmp_path / "a.safetensors", tmp_path / "a.safetensors", "--output", tmp_path / "b.safetensors"
            )
            assert result.exit_code == 0, result.stderr
            assert claims(tmp_path / "b.safetensors") == wanted
    assert claims(Lora(factors(FLUX)).save(tmp_path / "c.safetensors")) == {}


def test_what_all_files_say_is_kept_for_an_unknown_model(tmp_path: Path) -> None:
    modules = ("blocks.0.attn.q",)
    for name, said in (("a", "sd9"), ("b", "sd9"), ("c", "sd8")):
        metadata = {"ss_base_model_version": said}
        save_file(in_form("bare", factors(modules)), tmp_path / f"{name}.safetensors", metadata=metadata)
    a, b, c = (read_lora(tmp_path / f"{name}.safetensors") for name in "abc")
    assert merge_loras([a, b]).metadata["ss_base_model_version"] == "sd9"
    assert "ss_base_model_version" not in merge_loras([a, c]).metadata


@pytest.mark.parametrize(("first", "second"), [(MODULES, QWEN), (QWEN, FLUX), (MODULES, ("blocks.0.attn.q",))])
def test_two_models_are_refused(first: tuple[str, ...], second: tuple[str, ...], tmp_path: Path) -> None:
    for name, modules in (("a", first), ("b", second)):
        save_file(in_form("bare", factors(modules)), tmp_path / f"{name}.safetensors")
    with pytest.raises(LorasForOthers):
        merge_loras([read_lora(tmp_path / f"{name}.safetensors") for name in "ab"])


# --- convert --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("key_format", ALL_KEYS)
@pytest.mark.parametrize("form", ["comfyui", "kohya ", "diffusers", "peft ", "diffsynth"])
def test_convert(form: str, key_format: str, tmp_path: Path) -> None:
    pairs = factors(MODULES)
    save_file(in_form(form, pairs, dict.fromkeys(MODULES, 3.0)), tmp_path / "x.safetensors")
    output = tmp_path / "y.safetensors"
    result = i2l("convert", tmp_path / "x.safetensors", "--key-format", key_format, "--output", output, "--json")
    assert result.exit_code == 0, result.stderr
    assert json.loads(result.stdout)["modules"] == 3
    found = read_lora(output)
    assert found.key_format == key_format
    for module, pair in pairs.items():
        np.testing.assert_allclose(change(found.lora.factors[module]), 0.5 * change(pair), atol=1e-5)
    assert claims(output) == MODEL_METADATA["z-image"]


def test_underscores_that_cannot_be_told_are_refused(tmp_path: Path) -> None:
    save_file(in_form("kohya", factors(("down_blocks.0.attn.to_q",))), tmp_path / "x.safetensors")
    assert describe_lora(tmp_path / "x.safetensors")["modules"] == 1
    result = i2l("convert", tmp_path / "x.safetensors", "--output", tmp_path / "y.safetensors")
    assert result.exit_code == 1
    assert "names 1 modules with underscores" in result.stderr


def test_names() -> None:
    assert dotted("layers_3_attention_to_out_0") == "layers.3.attention.to_out.0"
    assert dotted("single_transformer_blocks_3_proj_out") == "single_transformer_blocks.3.proj_out"
    assert dotted("input_blocks_3_x") is None
    assert (component("layers.7.attention.to_q"), place("layers.7.w.0")) == ("layers", "layers.N.w.0")
