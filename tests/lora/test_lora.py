"""LoRA files: the numbers, the keys, the metadata, and what is refused."""

import json
import math
from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, get_args

import numpy as np
import pytest
import safetensors.torch
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.numpy import save_file

from conftest import MakeEngines, MakeModels, picture
from i2l.errors import LoraNotFinite, LoraUnreadable, StrengthInvalid, WeightsMismatch
from i2l.lora.keys import KeyFormat
from i2l.lora.lora import Dtype, Lora, bfloat16_bits, factors_by_module, lora_from_factors
from i2l.lora.reading import describe_lora
from i2l.runtime.pipeline import open_engines

MODULES = ("layers.0.attention.to_q", "layers.11.attention.to_out.0", "noise_refiner.1.feed_forward.w2")
TORCH = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
HEADER_NAME = {"bf16": "BF16", "fp16": "F16", "fp32": "F32"}
Factors = Mapping[str, tuple[np.ndarray, np.ndarray]]


def factors(images: int = 1, seed: int = 0) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """What the adapter gives: A ``[images, 4, in]`` and B ``[images, out, 4]`` of three modules of different shapes."""
    generator = np.random.default_rng(seed)

    def normal(*shape: int) -> np.ndarray:
        return generator.standard_normal(shape, np.float32)

    return {name: (normal(images, 4, 24 + i), normal(images, 17 + i, 4)) for i, name in enumerate(MODULES)}


def product(lora: Lora, module: str) -> np.ndarray:
    a, b = lora.factors[module]
    return np.asarray(b.astype(np.float64) @ a.astype(np.float64))


# --- numbers -----------------------------------------------------------------------------------------------------

finite_bits = st.integers(0, 0xFFFFFFFF).filter(lambda bits: bits >> 23 & 0xFF != 0xFF)


@settings(max_examples=300, deadline=None)
@given(st.lists(finite_bits, min_size=1, max_size=64))
@example([0x3F808000, 0x3F818000, 0xBF808000, 0xBF818000])  # ties: down to even, up to even, both signs
@example([0x3F807FFF, 0x3F808001])  # beside a tie
@example([0x00000001, 0x80000001, 0x00008000, 0x00018000, 0x007FFFFF])  # subnormals
@example([0x00000000, 0x80000000, 0x7F7F0000, 0x7F7FFFFF])  # zeros, the largest values: the last becomes infinity
def test_bfloat16_rounds_as_torch_does(bits: list[int]) -> None:
    values = np.array(bits, np.uint32).view(np.float32)
    wanted = torch.from_numpy(values).to(torch.bfloat16).view(torch.int16).numpy().view(np.uint16)
    np.testing.assert_array_equal(bfloat16_bits(values), wanted)


@settings(max_examples=50, deadline=None)
@given(st.floats(-8, 8), st.integers(1, 4))
def test_strength_is_linear_on_the_product(strength: float, images: int) -> None:
    plain, scaled = lora_from_factors(factors(images)), lora_from_factors(factors(images), strength)
    for module in MODULES:
        np.testing.assert_allclose(product(scaled, module), strength * product(plain, module), rtol=1e-5, atol=1e-5)


@settings(max_examples=20, deadline=None)
@given(st.integers(1, 8), st.integers(0, 99))
def test_several_images_give_the_mean_of_their_products(images: int, seed: int) -> None:
    together = factors(images, seed)
    joined = lora_from_factors(together)
    assert joined.rank == 4 * images
    for module, (a, b) in together.items():
        mean = sum(b[i].astype(np.float64) @ a[i].astype(np.float64) for i in range(images)) / images
        np.testing.assert_allclose(product(joined, module), mean, rtol=1e-5, atol=1e-5)


@settings(max_examples=30, deadline=None)
@given(st.lists(st.floats(-4, 4), min_size=1, max_size=5), st.floats(-3, 3), st.integers(0, 99))
def test_weights_are_taken_as_they_are(weights: list[float], strength: float, seed: int) -> None:
    together = factors(len(weights), seed)
    joined = lora_from_factors(together, strength, weights)
    for module, (a, b) in together.items():
        terms = [w * b[i].astype(np.float64) @ a[i].astype(np.float64) for i, w in enumerate(weights)]
        # float32 rounds A, and weights may cancel: bounded by the terms, not by their sum
        bound = 1e-5 * max(1.0, abs(strength) * sum(float(np.abs(term).max()) for term in terms))
        np.testing.assert_allclose(product(joined, module), strength * sum(terms), rtol=0, atol=bound)


def test_wrong_weights_and_strengths_are_refused() -> None:
    with pytest.raises(WeightsMismatch, match="1 weight for 2 images"):
        lora_from_factors(factors(2), weights=[1.0])
    with pytest.raises(StrengthInvalid, match="weight 2 is inf"):
        lora_from_factors(factors(2), weights=[1.0, math.inf])
    with pytest.raises(StrengthInvalid, match="strength is nan"):
        lora_from_factors(factors(2), math.nan)


def test_a_step_gives_the_factors_of_its_modules() -> None:
    a, b = np.zeros((1, 4, 3), np.float32), np.ones((1, 2, 4), np.float32)
    found = factors_by_module("adapter.layers.07.attention", {"attention.to_out.0.A": a, "attention.to_out.0.B": b})
    assert found == {"layers.7.attention.to_out.0": (a, b)}


# --- files -------------------------------------------------------------------------------------------------------

KEYS = {
    "comfyui": ("diffusion_model.{}.lora_A.weight", "diffusion_model.{}.lora_B.weight"),
    "diffsynth": ("{}.lora_A.default.weight", "{}.lora_B.default.weight"),
}
"""Of shared/facts/lora-formats.md."""


@pytest.mark.parametrize("key_format", get_args(KeyFormat))
@pytest.mark.parametrize("dtype", get_args(Dtype))
def test_the_safetensors_library_reads_what_was_saved(tmp_path: Path, dtype: Dtype, key_format: KeyFormat) -> None:
    lora = lora_from_factors(factors(2))
    path = lora.save(tmp_path / "lora.safetensors", dtype=dtype, key_format=key_format)
    found = safetensors.torch.load_file(path)
    wanted = {
        key.format(module): torch.from_numpy(factor).to(TORCH[dtype])
        for module, pair in lora.factors.items()
        for key, factor in zip(KEYS[key_format], pair, strict=True)
    }
    assert found.keys() == wanted.keys()
    for name, tensor in wanted.items():
        assert found[name].dtype == tensor.dtype
        assert torch.equal(found[name], tensor)


def header_metadata(path: Path) -> dict[str, Any]:
    """The metadata as it stands in the file, whatever its types."""
    data = path.read_bytes()
    metadata: dict[str, Any] = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])["__metadata__"]
    return metadata


def test_metadata_is_what_others_read(tmp_path: Path) -> None:
    before = datetime.now(UTC).strftime("%Y-%m-%d")
    path = lora_from_factors(factors(3)).save(tmp_path / "my cat.safetensors")
    metadata = header_metadata(path)
    assert metadata.pop("modelspec.date") in {before, datetime.now(UTC).strftime("%Y-%m-%d")}
    assert metadata == {
        "format": "pt",
        "modelspec.sai_model_spec": "1.0.0",
        "modelspec.architecture": "Z-Image/lora",
        "modelspec.implementation": "https://github.com/Tongyi-MAI/Z-Image",
        "modelspec.title": "my cat",
        "modelspec.resolution": "1024x1024",
        "ss_base_model_version": "zimage",
        "ss_network_module": "networks.lora",
        "ss_network_dim": "12",
        "ss_network_alpha": "12",
        "ss_output_name": "my cat",
        "i2l.dtype": "bf16",
    }


@pytest.fixture(scope="module")
def secret_run(engines: MakeEngines, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A LoRA of pictures whose paths tell a secret."""
    folder = tmp_path_factory.mktemp("secret-folder")
    paths = [folder / f"secret-person-{index}.png" for index in range(2)]
    for index, path in enumerate(paths):
        picture(64, 48, seed=index).save(path)
    with open_engines(engines("tiny", "fp32")) as pipeline:
        return pipeline.lora_from_images(paths, strength=0.5).save(tmp_path_factory.mktemp("out") / "o.safetensors")


def test_metadata_values_are_strings(secret_run: Path) -> None:
    assert {type(value) for value in header_metadata(secret_run).values()} == {str}


def test_no_source_path_is_in_the_header(secret_run: Path, engines: MakeEngines, models: MakeModels) -> None:
    data = secret_run.read_bytes()
    header = data[: 8 + int.from_bytes(data[:8], "little")].lower()
    places = [engines("tiny", "fp32"), models("tiny"), secret_run.parent, Path.cwd(), Path.home() / "x"]
    for word in ("secret", "person", ".png", ".jpg", *(str(place).lower() for place in places)):
        assert word.encode() not in header


def test_images_are_named_by_content(secret_run: Path, engines: MakeEngines) -> None:
    with open_engines(engines("tiny", "fp32")) as pipeline:
        again = pipeline.lora_from_images([picture(64, 48, seed=index) for index in range(2)])
        other = pipeline.lora_from_images([picture(64, 48, seed=index) for index in (0, 5)])
    metadata = header_metadata(secret_run)
    assert metadata["i2l.images"] == again.metadata["i2l.images"]
    assert metadata["i2l.images"].split(",")[0] == other.metadata["i2l.images"].split(",")[0]
    assert metadata["i2l.images"] != other.metadata["i2l.images"]


def test_a_file_name_that_is_no_text(tmp_path: Path) -> None:
    path = lora_from_factors(factors()).save(tmp_path / "caf\udce9.safetensors")
    assert header_metadata(path)["modelspec.title"] == "caf?"


# --- what a dtype cannot hold ------------------------------------------------------------------------------------

LARGEST_BF16 = float(torch.finfo(torch.bfloat16).max)
LARGEST_FLOAT = float(np.finfo(np.float32).max)


@pytest.mark.parametrize("factor", [0, 1], ids="AB")
@pytest.mark.parametrize(
    ("value", "dtype"),
    [
        *((value, dtype) for value in (math.nan, math.inf, -math.inf) for dtype in get_args(Dtype)),
        (65520.0, "fp16"),  # the smallest value that rounds to infinity
        (-1e5, "fp16"),
        (LARGEST_FLOAT, "bf16"),
        (-LARGEST_FLOAT, "bf16"),
    ],
)
def test_what_the_dtype_cannot_hold_is_refused(tmp_path: Path, value: float, dtype: Dtype, factor: int) -> None:
    lora = lora_from_factors(factors())
    lora.factors[MODULES[1]][factor][-1, -1] = value
    old = lora_from_factors(factors(1)).save(tmp_path / "old.safetensors").read_bytes()
    for name in ("new", "old"):
        with pytest.raises(LoraNotFinite, match=f"{MODULES[1]}.lora_{'AB'[factor]}.weight .* for {dtype}"):
            lora.save(tmp_path / f"{name}.safetensors", dtype=dtype)
    assert [path.name for path in tmp_path.iterdir()] == ["old.safetensors"]
    assert (tmp_path / "old.safetensors").read_bytes() == old


@pytest.mark.parametrize(
    ("value", "dtype"),
    [(65519.0, "fp16"), (LARGEST_BF16, "bf16"), (-LARGEST_BF16, "bf16"), (LARGEST_FLOAT, "fp32"), (1e-45, "bf16")],
)
def test_what_the_dtype_can_hold_is_kept(tmp_path: Path, value: float, dtype: Dtype) -> None:
    lora = lora_from_factors(factors())
    lora.factors[MODULES[1]][0][-1, -1] = value
    path = lora.save(tmp_path / "lora.safetensors", dtype=dtype)
    found = safetensors.torch.load_file(path)[KEYS["comfyui"][0].format(MODULES[1])]
    assert torch.equal(found[-1, -1], torch.tensor(value, dtype=torch.float32).to(TORCH[dtype]))


# --- describing --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("key_format", get_args(KeyFormat))
@pytest.mark.parametrize("dtype", get_args(Dtype))
def test_describing_a_saved_lora(tmp_path: Path, dtype: Dtype, key_format: KeyFormat) -> None:
    path = lora_from_factors(factors(2)).save(tmp_path / "lora.safetensors", dtype=dtype, key_format=key_format)
    facts = describe_lora(path)
    with safe_open(path, framework="numpy") as file:
        metadata = file.metadata()
    assert facts == {
        "path": str(path),
        "tensors": 6,
        "modules": 3,
        "rank": 8,
        "dtype": HEADER_NAME[dtype],
        "key_format": key_format,
        "nbytes": path.stat().st_size,
        "metadata": metadata,
        "model": "z-image",
    }


def test_describing_a_lora_of_several_ranks(tmp_path: Path) -> None:
    lora = lora_from_factors(factors())
    thin = {MODULES[0]: (np.zeros((2, 24), np.float32), np.zeros((17, 2), np.float32))}
    path = Lora({**lora.factors, **thin}).save(tmp_path / "lora.safetensors")
    assert describe_lora(path)["rank"] == [2, 4]


@pytest.mark.parametrize(
    "shapes",
    [
        {},
        {"weight": (2, 2)},
        {"diffusion_model.a.lora_A.weight": (4, 8)},
        {"diffusion_model.a.lora_B.weight": (8, 4)},
        {"diffusion_model.a.lora_A.weight": (4, 8), "diffusion_model.b.lora_B.weight": (8, 4)},
        {"diffusion_model.a.lora_A.weight": (4, 8), "a.lora_B.default.weight": (8, 4)},
        {"diffusion_model.a.lora_A.weightX": (4, 8), "diffusion_model.a.lora_B.weightX": (8, 4)},
        {"diffusion_model.a.lora_A.weight": (), "diffusion_model.a.lora_B.weight": ()},
        {"diffusion_model.a.lora_A.weight": (4,), "diffusion_model.a.lora_B.weight": (4,)},
    ],
)
def test_other_safetensors_files_are_no_loras(tmp_path: Path, shapes: dict[str, tuple[int, ...]]) -> None:
    path = tmp_path / "other.safetensors"
    save_file({name: np.zeros(shape, np.float32) for name, shape in shapes.items()}, path)
    with pytest.raises(LoraUnreadable):
        describe_lora(path)


@settings(max_examples=100, deadline=None)
@given(data=st.data())
def test_any_truncation_is_unreadable(data: st.DataObject, tmp_path_factory: pytest.TempPathFactory) -> None:
    folder = tmp_path_factory.mktemp("truncated")
    whole = lora_from_factors(factors()).save(folder / "whole.safetensors").read_bytes()
    path = folder / "cut.safetensors"
    path.write_bytes(whole[: data.draw(st.integers(0, len(whole) - 1))])
    with pytest.raises(LoraUnreadable):
        describe_lora(path)


@settings(max_examples=100, deadline=None)
@given(
    st.one_of(
        st.binary(max_size=64),
        st.text(max_size=64).map(str.encode).map(lambda text: len(text).to_bytes(8, "little") + text),
        st.dictionaries(st.text(max_size=8), st.none() | st.integers() | st.lists(st.integers())).map(
            lambda header: len(text := json.dumps(header).encode()).to_bytes(8, "little") + text
        ),
    )
)
def test_garbage_is_unreadable(tmp_path_factory: pytest.TempPathFactory, content: bytes) -> None:
    path = tmp_path_factory.mktemp("garbage") / "garbage.safetensors"
    path.write_bytes(content)
    with pytest.raises(LoraUnreadable):
        describe_lora(path)


@pytest.mark.parametrize("name", ["absent.safetensors", "."])
def test_what_is_no_file_is_unreadable(tmp_path: Path, name: str) -> None:
    with pytest.raises(LoraUnreadable):
        describe_lora(tmp_path / name)
