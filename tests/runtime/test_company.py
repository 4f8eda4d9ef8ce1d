"""A picture's LoRA is its own: to the bit the same alone, among others, at any place, and from the cache."""

from collections.abc import Iterator
from contextlib import ExitStack
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from safetensors.numpy import load_file

from conftest import MakeEngines, picture
from i2l.export.precisions.choosing import PRECISIONS
from i2l.runtime.jobs import Job
from i2l.runtime.making import run_jobs
from i2l.runtime.passes import IMAGES_PER_PASS
from i2l.runtime.pipeline import Pipeline, open_engines

PICTURES = [picture(40 + 24 * seed, 90 - 12 * seed, seed) for seed in range(6)]
COMPANIES = st.lists(st.sampled_from(range(len(PICTURES))), min_size=2, max_size=IMAGES_PER_PASS + 1)


class Alone:
    """An opened pipeline, and what it says of each picture alone."""

    def __init__(self, pipeline: Pipeline) -> None:
        self.pipeline = pipeline
        self.embedding = cache(lambda index: pipeline.embed(PICTURES[index])[0])
        self.factors = cache(lambda index: pipeline.factors(self.embedding(index)[None]))


@pytest.fixture(scope="module")
def opened(engines: MakeEngines) -> Iterator[Any]:
    with ExitStack() as stack:

        @cache
        def open_once(preset: str, precision: str, **options: bool) -> Alone:
            return Alone(stack.enter_context(open_engines(engines(preset, precision, **options), backend="cpu")))

        yield open_once


def assert_own(alone: Alone, company: list[int]) -> None:
    embeddings = alone.pipeline.embed([PICTURES[index] for index in company])
    factors = alone.pipeline.factors(embeddings)
    for place, index in enumerate(company):
        np.testing.assert_array_equal(embeddings[place], alone.embedding(index))
        for module, (a, b) in alone.factors(index).items():
            np.testing.assert_array_equal(factors[module][0][place], a[0])
            np.testing.assert_array_equal(factors[module][1][place], b[0])


@pytest.mark.parametrize("outliers", [False, True], ids=["plain", "outliers"])
@pytest.mark.parametrize("precision", PRECISIONS)
@settings(max_examples=3, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(company=COMPANIES)
@example(company=[3, 1, 4, 1, 5])  # one of them twice, and more than share a pass
def test_a_picture_is_the_same_in_any_company(opened: Any, precision: str, outliers: bool, company: list[int]) -> None:
    assert_own(opened("tiny", precision, **({"outliers": True} if outliers else {})), company)


def test_larger_products_that_several_threads_share_too(opened: Any) -> None:
    assert_own(opened("small", "int8"), [3, 1, 4, 1])


@pytest.mark.parametrize("precision", ["int8", "fp8"])
def test_run_batch_and_cache_write_the_same_file(engines: MakeEngines, precision: str, tmp_path: Path) -> None:
    paths = []
    for index, image in enumerate(PICTURES):
        paths.append(tmp_path / f"{index}.png")
        image.save(paths[-1])
    jobs = [Job((path,), tmp_path / "batch" / f"{path.stem}.safetensors") for path in paths]
    (tmp_path / "batch").mkdir()
    with open_engines(engines("tiny", precision), backend="cpu", cache=tmp_path / "cache") as pipeline:
        assert run_jobs(pipeline, jobs).failed == []
        for path in paths:
            pipeline.lora_from_images([path]).save(tmp_path / f"cached-{path.stem}.safetensors")
            assert pipeline.from_cache == [True]
    with open_engines(engines("tiny", precision), backend="cpu") as pipeline:
        for path, job in zip(paths, jobs, strict=True):
            alone = tmp_path / f"alone-{path.stem}.safetensors"
            pipeline.lora_from_images([path]).save(alone)
            for other in (job.output, tmp_path / f"cached-{path.stem}.safetensors"):
                wanted, found = load_file(alone), load_file(other)
                assert wanted.keys() == found.keys()
                assert all(np.array_equal(wanted[key], found[key]) for key in wanted)
