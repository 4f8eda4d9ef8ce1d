"""The whole pipeline over a fake device: the same LoRA at every budget, and what happens when memory runs out.

Engines are onnxruntime's, fed with what the fake device's memory holds when the weights are read.
"""

import logging
import shutil
from collections.abc import Callable, Iterator
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest

from conftest import MakeEngines, picture
from fake_device import FakeDevice, FakeEngine
from i2l.engines.base import Limits, Offer, VramBudget
from i2l.engines.base import Opened as OpenedEngines
from i2l.engines.cuda.backend import find_cuda
from i2l.engines.device.backend import DeviceBackend
from i2l.engines.device.residency import RESERVED_BYTES, GraphMemory
from i2l.engines.directory.manifest import Manifest, read_manifest
from i2l.errors import BudgetTooSmall, DeviceFailed, EnginesReplaced, OutOfDeviceMemory, PipelineClosed
from i2l.lora.lora import Lora
from i2l.runtime.cache import EmbeddingCache
from i2l.runtime.pictures.pixels import square_image
from i2l.runtime.pipeline import Pipeline
from i2l.runtime.proof.choice import Chosen
from i2l.runtime.trace import Trace

PICTURES = [picture(90, 70, seed=1), picture(64, 64, seed=2)]


Opened = Callable[..., tuple[Pipeline, DeviceBackend, FakeDevice]]


@pytest.fixture
def opened(engines: MakeEngines) -> Iterator[Opened]:
    """``opened(spare_bytes)``: a pipeline on a fake device with that much more than the smallest budget."""
    directory = engines("tiny", "int8")
    manifest = read_manifest(directory)
    graphs = {graph: GraphMemory(5000, 200_000, 100) for graph in manifest.graphs}
    pipelines = []

    def open_(
        spare_bytes: int, *, auto: bool = False, fail: Callable[[str], None] = lambda _: None
    ) -> tuple[Pipeline, DeviceBackend, FakeDevice]:
        device = FakeDevice(1 << 30, seed=spare_bytes)

        def make(graph: str) -> FakeEngine:
            return FakeEngine(device, graph, directory / manifest.build / manifest.graphs[graph], fail)

        def backend(budget_bytes: int) -> DeviceBackend:
            return DeviceBackend("fake", device, make, directory, manifest, graphs, budget_bytes)

        with pytest.raises(BudgetTooSmall) as caught:
            backend(0)
        pipeline = Pipeline(directory, backend="cpu", threads=1)
        pipeline._backend.close()
        made = pipeline._open._backend = backend(caught.value.needed_bytes + spare_bytes)
        pipeline._open.name, pipeline._open._may_fall_back = "fake", auto
        pipelines.append(pipeline)
        return pipeline, made, device

    yield open_
    for pipeline in pipelines:
        pipeline.close()


@pytest.fixture(scope="module")
def wanted(engines: MakeEngines) -> Lora:
    with Pipeline(engines("tiny", "int8"), backend="cpu", threads=1) as pipeline:
        return pipeline.lora_from_images(PICTURES)


Rebuilt = Callable[[str], tuple[Pipeline, Path]]


@pytest.fixture
def on_auto(engines: MakeEngines, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Rebuilt]:
    """``on_auto(precision)``: what ``auto`` opens where there is a GPU, and the directory; no run finds memory."""
    pipelines = []

    def open_(precision: str) -> tuple[Pipeline, Path]:
        directory = Path(shutil.copytree(engines("tiny", precision), tmp_path / "engines"))

        def open_gpu(engines: Path, manifest: Manifest, _: Limits) -> OpenedEngines:
            graphs = {graph: GraphMemory(5000, 200_000, 100) for graph in manifest.graphs}
            device = FakeDevice(1 << 30, seed=0)
            first = "siglip2.embed"
            path = engines / manifest.build / manifest.graphs[first]
            engine = FakeEngine(device, first, path, failing(0, first, 1000))
            make = {first: engine}.__getitem__
            backend = DeviceBackend("cuda", device, make, engines, manifest, graphs, 1 << 30)
            return OpenedEngines(backend, manifest, manifest)

        monkeypatch.setattr("i2l.runtime.opening.choose_backend", lambda *_, **__: Chosen("cuda", "auto: a card"))
        monkeypatch.setattr("i2l.engines.cuda.backend.OFFER", Offer(find_cuda, open_gpu))
        pipelines.append(Pipeline(directory, threads=1))
        return pipelines[-1], directory

    yield open_
    for pipeline in pipelines:
        pipeline.close()


def assert_same(found: Lora, wanted: Lora) -> None:
    for module, factors in wanted.factors.items():
        for x, y in zip(found.factors[module], factors, strict=True):
            np.testing.assert_array_equal(x, y)


@pytest.mark.parametrize("spare_bytes", [0, 60_000, 200_000, 10_000_000])
def test_the_lora_is_the_same_at_every_budget(opened: Opened, wanted: Lora, spare_bytes: int) -> None:
    pipeline, backend, device = opened(spare_bytes)
    for _ in range(2):
        assert_same(pipeline.lora_from_images(PICTURES), wanted)
    assert device.peak_bytes + RESERVED_BYTES <= backend.residency.budget_bytes
    assert (backend.residency.streamed_bytes == 0) == (spare_bytes == 10_000_000)
    pipeline.close()
    assert device.used_bytes == 0


def failing(at: int, graph: str, times: int) -> Callable[[str], None]:
    """From the ``at``-th run of ``graph`` on, that many runs find no memory."""
    runs = iter(range(10_000))

    def fail(name: str) -> None:
        if name == graph and at <= next(runs) < at + times:
            raise OutOfDeviceMemory("fake device", 1 << 20, 0)

    return fail


@pytest.mark.parametrize("graph", ["dinov3.block", "adapter.attention", "siglip2.embed"])
def test_out_of_memory_in_the_middle_gives_the_same_lora(
    opened: Opened, wanted: Lora, graph: str, caplog: pytest.LogCaptureFixture
) -> None:
    pipeline, backend, _ = opened(10_000_000, fail=failing(1 if graph != "siglip2.embed" else 0, graph, 2))
    before = backend.residency.peak_bytes
    with caplog.at_level(logging.WARNING, "i2l"):
        assert_same(pipeline.lora_from_images(PICTURES), wanted)
    assert backend.residency.peak_bytes < before
    assert len(caplog.records) == 2
    assert pipeline.backend_name == "fake"


@pytest.mark.parametrize("auto", [True, False])
def test_the_cpu_goes_on_only_if_allowed(
    opened: Opened, wanted: Lora, auto: bool, caplog: pytest.LogCaptureFixture
) -> None:
    pipeline, _, device = opened(0, auto=auto, fail=failing(1, "dinov3.block", 1000))
    if not auto:
        with pytest.raises(OutOfDeviceMemory, match=r"fake device has no room for 1.0 MiB .* or use --backend cpu"):
            pipeline.lora_from_images(PICTURES)
        return
    with caplog.at_level(logging.WARNING, "i2l"):
        assert_same(pipeline.lora_from_images(PICTURES), wanted)
    assert [record.message.split(": ")[-1] for record in caplog.records] == ["going on with the CPU"]
    assert (pipeline.backend_name, pipeline.backend_reason) == ("cpu", "fake ran out of memory")
    assert device.used_bytes == 0


def test_the_cpu_goes_on_with_the_build_that_was_opened(
    on_auto: Rebuilt, engines: MakeEngines, wanted: Lora, caplog: pytest.LogCaptureFixture
) -> None:
    pipeline, directory = on_auto("int8")
    shutil.rmtree(directory)  # what a rebuild leaves of the old build
    shutil.copytree(engines("tiny", "fp32"), directory)
    assert_same(pipeline.lora_from_images(PICTURES), wanted)
    assert pipeline.backend_name == "cpu"
    assert "going on with the CPU" in caplog.text


def test_embeddings_are_kept_as_those_of_the_backend_that_computed_them(on_auto: Rebuilt, tmp_path: Path) -> None:
    """Begun on a GPU, computed on the CPU: the CPU finds them, and no GPU does."""
    pipeline, _ = on_auto("int8")
    pipeline.cache = EmbeddingCache(tmp_path / "kept", pipeline._encoders_id)
    on_gpu = {pipeline.cache.path(square_image(image)) for image in PICTURES}
    pipeline.embed(PICTURES)
    assert pipeline.backend_name == "cpu"
    pipeline.embed(PICTURES)
    assert pipeline.from_cache == [True, True]
    assert not any(path.exists() for path in on_gpu)


@pytest.mark.parametrize("rebuilt", [False, True])
def test_fp8_engines_that_are_gone_are_an_error(on_auto: Rebuilt, engines: MakeEngines, *, rebuilt: bool) -> None:
    """The CPU's form of fp8 engines is made when it is needed: with the engines that were opened, or not at all."""
    pipeline, directory = on_auto("fp8")
    if not rebuilt:
        assert pipeline.lora_from_images(PICTURES).rank == 8
        assert (pipeline.backend_name, pipeline.runs_as) == ("cpu", "int8")
        return
    shutil.rmtree(directory)
    shutil.copytree(engines("tiny", "fp32"), directory)
    with pytest.raises(EnginesReplaced, match=r"cuda ran out of memory, and .* was rebuilt .*open_engines\("):
        pipeline.lora_from_images(PICTURES)
    with pytest.raises(PipelineClosed):
        pipeline.lora_from_images(PICTURES)


def test_a_trace_shows_what_the_lanes_did(engines: MakeEngines, monkeypatch: pytest.MonkeyPatch) -> None:
    """By the device's clock: copies and runs in their lanes one after another, and no chunk used before it is there."""
    directory = engines("tiny", "int8")
    device = FakeDevice(1 << 30, seed=3)

    def open_gpu(directory: Path, manifest: Manifest, _: Limits) -> OpenedEngines:
        graphs = {graph: GraphMemory(5000, 200_000, 100) for graph in manifest.graphs}

        def make(graph: str) -> FakeEngine:
            return FakeEngine(device, graph, directory / manifest.build / manifest.graphs[graph], lambda _: None)

        with pytest.raises(BudgetTooSmall) as caught:
            DeviceBackend("cuda", device, make, directory, manifest, graphs, 0)
        backend = DeviceBackend("cuda", device, make, directory, manifest, graphs, caught.value.needed_bytes)
        return OpenedEngines(backend, manifest, manifest)

    monkeypatch.setattr("i2l.runtime.opening.choose_backend", lambda *_, **__: Chosen("cuda", "named"))
    monkeypatch.setattr("i2l.engines.cuda.backend.OFFER", Offer(find_cuda, open_gpu))
    trace = Trace()
    with Pipeline(directory, backend="cuda", trace=trace) as pipeline:
        pipeline.lora_from_images(PICTURES)
        used = device.used_bytes
    chunks = [chunk for model in read_manifest(directory).models.values() for chunk in model.chunks]
    spans = [event for event in trace.events if event["ph"] == "X"]
    copies, runs = ([event for event in spans if event["tid"] == lane] for lane in (1, 2))
    assert [event["name"] for event in runs] == [f"run {step.name}" for chunk in chunks for step in chunk.steps]
    assert sorted(event["name"] for event in copies) == sorted(f"copy {chunk.steps[0].name}" for chunk in chunks)
    for lane in (copies, runs):
        assert all(a["ts"] + a["dur"] <= b["ts"] for a, b in pairwise(lane))
    began = {event["name"].removeprefix("run "): event["ts"] for event in runs}
    for event in copies:
        assert event["dur"] > 0
        assert event["ts"] + event["dur"] <= began[event["name"].removeprefix("copy ")]
    counted = [event["args"]["used"] for event in trace.events if event["name"] == "VRAM"]
    assert len(counted) == len(spans)
    assert set(counted) == {used}


def test_a_device_that_fails_leaves_auto_the_cpu(
    opened: Opened, wanted: Lora, caplog: pytest.LogCaptureFixture
) -> None:
    """At once: a card that is lost has no smaller plan. Asked for by name, it is an error."""

    def lost(graph: str) -> None:
        if graph == "dinov3.block":
            raise DeviceFailed("a card", "CUDA_ERROR_ILLEGAL_ADDRESS")

    pipeline, _, _ = opened(0, fail=lost)
    with pytest.raises(DeviceFailed, match=r"CUDA_ERROR_ILLEGAL_ADDRESS.*--backend cpu"):
        pipeline.lora_from_images(PICTURES)
    pipeline, _, _ = opened(0, auto=True, fail=lost)
    with caplog.at_level(logging.WARNING, "i2l"):
        assert_same(pipeline.lora_from_images(PICTURES), wanted)
    assert (pipeline.backend_name, pipeline.backend_reason) == ("cpu", "fake failed")
    assert "going on with the CPU" in caplog.text


def test_too_little_vram_at_the_opening_leaves_auto_the_cpu(
    engines: MakeEngines, wanted: Lora, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def open_gpu(*_: object) -> OpenedEngines:
        raise OutOfDeviceMemory("a card", 2 << 30, 1 << 30)

    monkeypatch.setattr("i2l.runtime.opening.choose_backend", lambda *_, **__: Chosen("cuda", "a card"))
    monkeypatch.setattr("i2l.engines.cuda.backend.OFFER", Offer(find_cuda, open_gpu))
    with pytest.raises(OutOfDeviceMemory):
        Pipeline(engines("tiny", "int8"), backend="cuda")
    with caplog.at_level(logging.WARNING, "i2l"), Pipeline(engines("tiny", "int8"), threads=1) as pipeline:
        assert_same(pipeline.lora_from_images(PICTURES), wanted)
        assert (pipeline.backend_name, pipeline.backend_reason) == ("cpu", "cuda ran out of memory")
    assert "going on with the CPU" in caplog.text


@pytest.mark.parametrize(("free_bytes", "budget_bytes"), [(5 << 30, 4 << 30), (1 << 30, None)])
def test_auto_leaves_the_margin(free_bytes: int, budget_bytes: int | None) -> None:
    device = FakeDevice(free_bytes)
    if budget_bytes is None:
        with pytest.raises(OutOfDeviceMemory, match=r"no room for 1\.00 GiB"):
            VramBudget(margin_bytes=1 << 30).on(device)
    else:
        assert VramBudget(margin_bytes=1 << 30).on(device) == budget_bytes
        assert VramBudget(margin_bytes=1 << 30).on(device, 3) == budget_bytes + 3
    assert VramBudget(7).on(device) == 7
