"""The whole way from pixels to LoRA against transformers and DiffSynth."""

from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
import pytest
import torch

from conftest import picture
from i2l.engines.directory.manifest import read_manifest
from i2l.export.checkpoints.finding import find_checkpoints
from i2l.lora.lora import Lora
from i2l.lora.lowrank import product_error
from i2l.runtime.pipeline import ENCODERS, Pipeline
from i2l.specs import Family
from oracles import adapter_oracle, encoder_oracle

SIZES = [(320, 240), (240, 700), (1500, 400), (64, 64)]
TOLERANCES = {
    "fp32": 1e-4,  # the bound; two float32 programs differ by summation order, 1e-6 observed
    "bf16": 5e-2,  # weights rounded to 8 bits of mantissa where the checkpoint is float32; 0.5 % observed
    "int8": 0.12,  # 3 % observed
    "fp8": 0.25,  # e4m3 has 3 bits of mantissa: 2.6 % per product, and the CPU's int8 on top
}


def oracle_lora(
    models: Path, pixels: Mapping[Family, np.ndarray]
) -> tuple[np.ndarray, dict[str, tuple[np.ndarray, np.ndarray]]]:
    """Embeddings, and the factors of all images joined the way the reference does."""
    checkpoints = find_checkpoints(models)
    embeddings = torch.cat(
        [
            encoder_oracle(checkpoints[family].spec, checkpoints[family].path)(torch.from_numpy(pixels[family]))
            for family in ENCODERS
        ],
        dim=1,
    )
    adapter = adapter_oracle(checkpoints["adapter"].spec, checkpoints["adapter"].path)
    loras = [adapter(embedding) for embedding in embeddings]
    factors = {}
    for key in loras[0]:
        if key.endswith(".lora_A.default.weight"):
            module = key.removesuffix(".lora_A.default.weight")
            a = torch.cat([lora[key] for lora in loras]) / len(loras)
            b = torch.cat([lora[f"{module}.lora_B.default.weight"] for lora in loras], dim=1)
            factors[module] = (a.numpy(), b.numpy())
    return embeddings.numpy(), factors


def relative_error(found: np.ndarray, wanted: np.ndarray) -> float:
    return float(np.linalg.norm(found - wanted) / np.linalg.norm(wanted))


def worst_module(lora: Lora, factors: dict[str, tuple[np.ndarray, np.ndarray]]) -> float:
    assert lora.factors.keys() == factors.keys()
    return max(product_error(lora.factors[module], factors[module]) for module in factors)


@pytest.mark.parametrize("images", [1, 2, 4])
@pytest.mark.parametrize("preset", ["tiny", "small"])
def test_fp32_is_the_reference(models: Callable, engines: Callable, preset: str, images: int) -> None:
    pictures = [picture(*size, seed=seed) for seed, size in enumerate(SIZES[:images])]
    with Pipeline(engines(preset, "fp32")) as pipeline:
        pixels = pipeline.pixels(pictures)
        embeddings = pipeline.embed(pictures)
        lora = pipeline.lora_from_images(pictures)
    wanted_embeddings, factors = oracle_lora(models(preset), pixels)
    for found, wanted in zip(embeddings, wanted_embeddings, strict=True):
        hidden = read_manifest(engines(preset, "fp32")).models["siglip2"].spec.hidden
        assert relative_error(found[:hidden], wanted[:hidden]) < TOLERANCES["fp32"]
        assert relative_error(found[hidden:], wanted[hidden:]) < TOLERANCES["fp32"]
    assert lora.rank == 4 * images
    assert worst_module(lora, factors) < TOLERANCES["fp32"]
    for module, (a, b) in factors.items():  # the factors themselves too, not only their product
        assert relative_error(lora.factors[module][0], a) < TOLERANCES["fp32"]
        assert relative_error(lora.factors[module][1], b) < TOLERANCES["fp32"]


@pytest.mark.parametrize("size", SIZES)
def test_every_aspect_ratio(models: Callable, engines: Callable, size: tuple[int, int]) -> None:
    with Pipeline(engines("tiny", "fp32")) as pipeline:
        pixels = pipeline.pixels([picture(*size)])
        lora = pipeline.lora_from_images([picture(*size)])
    assert worst_module(lora, oracle_lora(models("tiny"), pixels)[1]) < TOLERANCES["fp32"]


@pytest.mark.parametrize("outliers", [False, True])
@pytest.mark.parametrize("precision", ["bf16", "int8", "fp8"])
def test_reduced_precision_stays_near(models: Callable, engines: Callable, precision: str, outliers: bool) -> None:
    options = {"outliers": True} if outliers else {}
    with Pipeline(engines("tiny", precision, **options)) as pipeline:
        pixels = pipeline.pixels([picture(320, 240)])
        lora = pipeline.lora_from_images([picture(320, 240)])
    assert worst_module(lora, oracle_lora(models("tiny", **options), pixels)[1]) < TOLERANCES[precision]
