"""One oracle for every backend: the LoRA against transformers and DiffSynth, and what a caller relies on."""

import ast
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from conftest import MakeEngines, MakeModels, picture
from i2l.engines.backends import BACKENDS, detect_backends, offer_of, working_backend
from i2l.engines.base import Limits
from i2l.engines.directory.manifest import read_manifest
from i2l.errors import BackendUnavailable, PipelineClosed
from i2l.runtime.pipeline import Pipeline
from oracles import TOLERANCES, oracle_lora, worst_module

TESTS = Path(__file__).parents[1]
PICTURES = [picture(320, 240), picture(240, 700, seed=1)]
CASES = [  # a new backend is one line here
    ("cpu", "fp32"),
    ("cpu", "int8"),
    ("webgpu", "fp32"),
    ("webgpu", "int8"),
    ("toy", "fp32"),
    ("toy", "int8"),
]
MARKED = {"webgpu": [pytest.mark.webgpu]}
"""What a backend's tests need."""


def marked(cases: list[Any]) -> list[Any]:
    """The cases, each with its backend's marks."""
    rows = [case if isinstance(case, tuple) else (case,) for case in cases]
    return [pytest.param(*row, marks=MARKED.get(row[0], [])) for row in rows]


@pytest.fixture(autouse=True)
def toy(monkeypatch: pytest.MonkeyPatch) -> None:
    """The line that registers the outsider's exercise."""
    monkeypatch.setitem(BACKENDS, "toy", "toy_backend")


@pytest.mark.parametrize(("backend", "precision"), marked(CASES))
def test_the_lora_is_the_reference(models: MakeModels, engines: MakeEngines, backend: str, precision: str) -> None:
    with Pipeline(engines("tiny", precision), backend=backend) as pipeline:
        assert pipeline.backend_name == backend
        lora = pipeline.lora_from_images(PICTURES)
        again = pipeline.lora_from_images(PICTURES)
        _, factors = oracle_lora(models("tiny"), pipeline.pixels(PICTURES))
    assert worst_module(lora, factors) < TOLERANCES[precision]
    for module, pair in lora.factors.items():
        for first, second in zip(pair, again.factors[module], strict=True):
            np.testing.assert_array_equal(first, second)
    with pytest.raises(PipelineClosed):
        pipeline.lora_from_images(PICTURES)


@pytest.mark.parametrize("backend", marked(sorted({backend for backend, _ in CASES})))
def test_every_store_gives_what_the_graphs_take(engines: MakeEngines, backend: str) -> None:
    """Chunks that come and go twice, each with exactly the inputs of its graph."""
    directory = engines("tiny", "fp32")
    manifest = read_manifest(directory)
    opened = offer_of(backend).open(directory, manifest, Limits(images=1))
    for family, model in opened.running.models.items():
        store = opened.backend.store(family)
        for chunk in (*model.chunks, *model.chunks):
            store.prefetch(chunk)
            store.acquire(chunk)
            for step in chunk.steps:
                names = {name for name in model.tensors if name.startswith(f"{step.name}.")}
                assert {f"{step.name}.{name}" for name in store.weights(step)} == names
            store.release(chunk)
    opened.backend.close()


def test_every_backend_says_whether_it_works() -> None:
    statuses = detect_backends()
    assert [status.name for status in statuses] == list(BACKENDS)
    assert all(status.reason and (status.works or status.remedy) for status in statuses)
    assert working_backend("toy").reason == "it is a toy"
    with pytest.raises(BackendUnavailable, match="use one of auto, cpu, webgpu, cuda, tensorrt-rtx, tensorrt, toy"):
        working_backend("openvino")


def test_the_toy_is_small_and_uses_what_a_backend_may() -> None:
    from test_imports import MAY_IMPORT, room

    source = (TESTS / "toy_backend.py").read_text(encoding="utf-8")
    assert len(source.splitlines()) < 80
    imported = [node.module or "" for node in ast.walk(ast.parse(source)) if isinstance(node, ast.ImportFrom)]
    rooms = {room(name.removeprefix("i2l.")) for name in imported if name.startswith("i2l.")}
    assert rooms <= MAY_IMPORT["engines.cpu"]
