"""The whole way from pixels to LoRA against transformers and DiffSynth."""

from collections.abc import Callable

import pytest

from conftest import picture
from i2l.engines.directory.manifest import read_manifest
from i2l.runtime.pipeline import Pipeline
from oracles import TOLERANCES, oracle_lora, relative_error, worst_module

SIZES = [(320, 240), (240, 700), (1500, 400), (64, 64)]


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
