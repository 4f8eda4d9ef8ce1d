"""The opened pipeline: batches, reuse, giving everything back; and the streamer's promises."""

import gc
import importlib.util
import mmap
import shutil
import sys
import threading
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import i2l
from conftest import MakeEngines, picture
from i2l.engines.cpu import backend as ort
from i2l.engines.cpu.readahead import ReadAhead
from i2l.engines.directory.manifest import Chunk, Step, read_manifest
from i2l.errors import BackendUnavailable, BudgetTooSmall, EnginesMissing, NoImages, PipelineClosed, ShapeMismatch
from i2l.machine.platforms.mapping import give_back, read_ahead
from i2l.runtime.pipeline import Pipeline, open_engines
from i2l.runtime.streamer import side_by_side, stream
from i2l.specs import Family

SIZES = [(320, 240), (240, 700), (150, 40), (64, 64)]
PICTURES = [picture(*size, seed=seed) for seed, size in enumerate(SIZES)]
MAPS = Path("/proc/self/maps")
linux = pytest.mark.skipif(not MAPS.exists(), reason="only Linux lists a process's maps")


@pytest.fixture
def pipeline(engines: MakeEngines) -> Iterator[Pipeline]:
    with open_engines(engines("tiny", "fp32")) as opened:
        yield opened


# --- batches and reuse -------------------------------------------------------------------------------------------


def test_four_images_in_one_call_are_four_single_calls(pipeline: Pipeline) -> None:
    together = pipeline.lora_from_images(PICTURES)
    singles = [pipeline.lora_from_images([image]) for image in PICTURES]
    assert together.rank == 16
    for module, (a, b) in together.factors.items():
        wanted_a = np.concatenate([single.factors[module][0] for single in singles]) / 4
        wanted_b = np.concatenate([single.factors[module][1] for single in singles], axis=1)
        np.testing.assert_allclose(a, wanted_a, rtol=0, atol=1e-5 * np.abs(wanted_a).max())
        np.testing.assert_allclose(b, wanted_b, rtol=0, atol=1e-5 * np.abs(wanted_b).max())


def test_different_images_give_different_loras(pipeline: Pipeline) -> None:
    """Else the test above could pass on a pipeline that ignores its images."""
    first, second = (pipeline.lora_from_images([image]) for image in PICTURES[:2])
    assert not np.allclose(first.factors["layers.0.attention.to_q"][0], second.factors["layers.0.attention.to_q"][0])


def test_strength_doubles_the_product(pipeline: Pipeline) -> None:
    plain = pipeline.lora_from_images(PICTURES[:1])
    double = pipeline.lora_from_images(PICTURES[:1], strength=2.0)
    for module, (a, b) in plain.factors.items():
        np.testing.assert_allclose(double.factors[module][1] @ double.factors[module][0], 2 * (b @ a), rtol=1e-6)
    assert (plain.metadata["i2l.strength"], double.metadata["i2l.strength"]) == ("1", "2")


def test_a_second_call_sets_nothing_up_again(engines: MakeEngines, monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[str] = []

    def counted(kind: type) -> None:
        real = kind.__init__  # type: ignore[misc]

        def init(self: object, *arguments: object, **options: object) -> None:
            made.append(kind.__name__)
            real(self, *arguments, **options)

        monkeypatch.setattr(kind, "__init__", init)

    counted(ort.OrtEngine)
    counted(ort.MappedPack)
    with open_engines(engines("tiny", "fp32")) as opened:
        first = opened.lora_from_images(PICTURES[:1])
        assert sorted(set(made)) == ["MappedPack", "OrtEngine"]
        assert (made.count("OrtEngine"), made.count("MappedPack")) == (8, 3)
        second = opened.lora_from_images(PICTURES[:1])
    assert len(made) == 11
    for module, (a, b) in first.factors.items():
        np.testing.assert_array_equal(second.factors[module][0], a)
        np.testing.assert_array_equal(second.factors[module][1], b)


def test_within_a_ram_budget_chunks_stay_and_the_lora_is_the_same(
    engines: MakeEngines, monkeypatch: pytest.MonkeyPatch
) -> None:
    given_back: list[tuple[object, int]] = []
    monkeypatch.setattr(ort, "give_back", lambda mapped, offset, _: given_back.append((mapped, offset)))
    chunks = [c for model in read_manifest(engines("tiny", "fp32")).models.values() for c in model.chunks]
    whole, largest = sum(c.nbytes for c in chunks), max(c.nbytes for c in chunks)
    counts, first_a = [], []
    for budget in (None, largest, (whole + largest) // 2, whole + largest):
        given_back.clear()
        with open_engines(engines("tiny", "fp32"), ram_budget_bytes=budget) as opened:
            lora = opened.lora_from_images(PICTURES[:1])
        counts.append(len(given_back))
        first_a.append(lora.factors["layers.0.attention.to_q"][0])
    assert counts[0] == len(chunks)
    assert counts == sorted(counts, reverse=True)
    assert 0 < counts[2] < counts[1]
    assert counts[3] == 0
    assert all(np.array_equal(a, first_a[0]) for a in first_a)


def test_a_ram_budget_below_one_chunk_is_explained(engines: MakeEngines) -> None:
    with pytest.raises(BudgetTooSmall, match=r"RAM budget is 1\.0 KiB.*--ram-budget 1MiB") as caught:
        open_engines(engines("tiny", "fp32"), ram_budget_bytes=1024)
    open_engines(engines("tiny", "fp32"), ram_budget_bytes=caught.value.needed_bytes).close()


def test_every_step_is_observed_in_order(pipeline: Pipeline) -> None:
    seen: list[str] = []
    pipeline.embed_pixels(pipeline.pixels(PICTURES[:1]), observe=lambda step, _: seen.append(step))
    models = (pipeline.manifest.models[family] for family in ("siglip2", "dinov3"))
    assert seen == [step.name for model in models for chunk in model.chunks for step in chunk.steps]


def test_progress_goes_from_nothing_to_all(engines: MakeEngines) -> None:
    told: dict[str, list[tuple[int, int]]] = {}
    with open_engines(
        engines("tiny", "fp32"), report=lambda stage, done, total: told.setdefault(stage, []).append((done, total))
    ) as opened:
        opened.lora_from_images(PICTURES[:1])
    assert list(told) == ["siglip2", "dinov3", "adapter"]
    for counts in told.values():
        assert counts == [(done, counts[0][1]) for done in range(counts[0][1] + 1)]


def test_timings_name_the_stages_of_the_last_call(pipeline: Pipeline) -> None:
    for _ in range(2):
        pipeline.lora_from_images(PICTURES[:1])
        assert set(pipeline.timings.seconds) == {"images", "siglip2", "dinov3", "adapter"}
        assert all(0 < seconds < 60 for seconds in pipeline.timings.seconds.values())


def test_a_path_may_be_text_and_begin_with_the_home(engines: MakeEngines, monkeypatch: pytest.MonkeyPatch) -> None:
    directory = engines("tiny", "fp32")
    monkeypatch.setenv("HOME", str(directory.parent))
    with i2l.open_engines(f"~/{directory.name}") as opened:
        assert opened.manifest == read_manifest(directory)


@pytest.mark.parametrize("images", [[], ()])
def test_no_images(pipeline: Pipeline, images: Sequence[Path]) -> None:
    with pytest.raises(NoImages):
        pipeline.lora_from_images(images)


def test_opening_what_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(EnginesMissing):
        open_engines(tmp_path)


# --- giving back -------------------------------------------------------------------------------------------------


def mapped(directory: Path) -> bool:
    """Whether this process has a file under ``directory`` in its address space."""
    return str(directory) in MAPS.read_text(encoding="utf-8")


@pytest.fixture
def own(engines: MakeEngines, tmp_path: Path) -> Path:
    """An engines directory that no other test has open."""
    return Path(shutil.copytree(engines("tiny", "fp32"), tmp_path / "engines"))


@linux
def test_closing_gives_the_maps_back(own: Path) -> None:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        with open_engines(own) as opened:
            opened.lora_from_images(PICTURES[:1])
            assert mapped(own)
        gc.collect()
        assert not mapped(own)
        shutil.rmtree(own)
    assert [str(warning.message) for warning in caught if warning.category is ResourceWarning] == []


@linux
def test_closing_twice_is_closing(own: Path) -> None:
    opened = open_engines(own)
    opened.lora_from_images(PICTURES[:1])
    opened.close()
    opened.close()
    assert not mapped(own)


@pytest.mark.parametrize("used", [False, True])
def test_a_closed_pipeline_says_so(own: Path, tmp_path: Path, used: bool) -> None:
    opened = open_engines(own, cache=tmp_path / "cache")
    embeddings = opened.embed(PICTURES[:1])
    if used:
        opened.lora_from_embeddings(embeddings)
    opened.close()
    calls: list[Callable[[], object]] = [
        lambda: opened.lora_from_images(PICTURES[:1]),  # the cache knows it
        lambda: opened.embed(PICTURES[:1]),
        lambda: opened.embed_pixels(opened.pixels(PICTURES[:1])),
        lambda: opened.lora_from_embeddings(embeddings),
    ]
    for call in calls:
        with pytest.raises(PipelineClosed, match=r"is closed: open a new one with: i2l\.open_engines\("):
            call()


@pytest.mark.parametrize("steps_before", ["none", "siglip2"])
def test_an_open_pipeline_outlives_a_rebuild(
    own: Path, engines: MakeEngines, pipeline: Pipeline, steps_before: str
) -> None:
    wanted = pipeline.lora_from_images(PICTURES[:1]).factors
    with open_engines(own) as opened:
        if steps_before == "siglip2":
            opened._passes._encode("siglip2", opened.pixels(PICTURES[:1])["siglip2"], None)
        shutil.rmtree(own)  # what a rebuild leaves of the old build
        shutil.copytree(engines("tiny", "int8"), own)
        found = opened.lora_from_images(PICTURES[:1]).factors
    for module, (a, b) in wanted.items():
        np.testing.assert_array_equal(found[module][0], a)
        np.testing.assert_array_equal(found[module][1], b)


def test_an_array_of_several_images(pipeline: Pipeline) -> None:
    images = np.stack([np.asarray(picture(64, 48, seed)) for seed in range(2)])
    together, listed = pipeline.lora_from_images(images), pipeline.lora_from_images(list(images))
    assert together.rank == 8
    assert together.metadata == listed.metadata
    for module, (a, _) in together.factors.items():
        np.testing.assert_array_equal(listed.factors[module][0], a)


class Cut(BaseException):
    """Stands for Ctrl-C."""


@pytest.fixture
def cut(monkeypatch: pytest.MonkeyPatch) -> Callable[[int], None]:
    """``cut(n)``: the nth step from now raises :class:`Cut`."""

    def install(step: int) -> None:
        real, count = ort.OrtEngine.run, iter(range(1, 1000))

        def run(self: ort.OrtEngine, *arguments: Any) -> dict[str, Any]:
            if next(count) == step:
                raise Cut
            return real(self, *arguments)

        monkeypatch.setattr(ort.OrtEngine, "run", run)

    return install


@linux
@pytest.mark.parametrize("step", [1, 3, 12])
def test_an_error_in_the_middle_comes_out_as_it_is(own: Path, cut: Callable[[int], None], step: int) -> None:
    """Its traceback still holds weights, so the maps cannot go at once: they go with the traceback."""
    cut(step)
    with pytest.raises(Cut) as caught, open_engines(own) as opened:
        opened.lora_from_images(PICTURES[:1])
    assert caught.value.__context__ is None
    del caught, opened
    gc.collect()
    assert not mapped(own)


def test_a_pipeline_goes_on_after_an_error(pipeline: Pipeline, cut: Callable[[int], None]) -> None:
    wanted = pipeline.lora_from_images(PICTURES[:1])
    cut(4)
    with pytest.raises(Cut):
        pipeline.lora_from_images(PICTURES[:1])
    found = pipeline.lora_from_images(PICTURES[:1])
    for module, (a, _) in wanted.factors.items():
        np.testing.assert_array_equal(found.factors[module][0], a)


def test_small_chunks_are_read_ahead_by_many_into_the_next_pack(
    engines: MakeEngines, monkeypatch: pytest.MonkeyPatch
) -> None:
    """While SigLIP2's last chunk is asked for, the disk goes on with DINOv3's; the adapter's pack is the last."""
    begun: list[tuple[str, int]] = []
    monkeypatch.setattr(ReadAhead, "begin", lambda self, offset, _: begun.append((self.path.parent.name, offset)))
    manifest = read_manifest(engines("tiny", "fp32"))
    backend = ort.CpuBackend(engines("tiny", "fp32"), manifest)
    pairs: list[tuple[Family, Family | None]] = [("siglip2", "dinov3"), ("dinov3", "adapter"), ("adapter", None)]
    for family, following in pairs:
        store, chunks = backend.store(family), manifest.models[family].chunks
        assert store.slots > len(chunks)
        begun.clear()
        for chunk in chunks:
            store.prefetch(chunk)
        behind = [(following, chunk.offset) for chunk in manifest.models[following].chunks] if following else []
        assert begun == [(family, chunk.offset) for chunk in chunks] + behind
    backend.close()


@pytest.mark.parametrize("page", [4096, 16384, 65536])
def test_advice_covers_the_region_in_whole_pages(monkeypatch: pytest.MonkeyPatch, page: int) -> None:
    """The kernel refuses a start that is not on a page; Apple's pages are 16 KiB, some ARM servers' 64 KiB."""
    told: list[tuple[int, int, int]] = []

    if sys.platform == "win32":
        pytest.skip("Windows has no such call")

    class Map(mmap.mmap):
        def madvise(self, advice: int, start: int = 0, length: int = 0) -> None:
            told.append((advice, start, length))

    monkeypatch.setattr(mmap, "PAGESIZE", page)
    with Map(-1, 65536) as mapped:
        for offset, nbytes in ((4096, 300_000), (65536, 4096), (200_704, 1 << 20)):
            told.clear()
            read_ahead(mapped, offset, nbytes)
            give_back(mapped, offset, nbytes)
            *needs, (drop, start, length) = told
            assert drop == mmap.MADV_DONTNEED
            assert all(advice == mmap.MADV_WILLNEED for advice, _, _ in needs)
            assert start % page == 0
            assert start <= offset
            assert start + length == offset + nbytes
            assert needs[0][1] == start
            for (_, first, size), (_, second, _) in pairwise(needs):
                assert second % page == 0
                assert second <= first + size
            assert sum(needs[-1][1:]) == offset + nbytes


# --- shapes and backends -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(1, 191), (1, 193), (192,), (1, 192, 1)])
def test_embeddings_that_do_not_fit(pipeline: Pipeline, shape: tuple[int, ...]) -> None:
    with pytest.raises(ShapeMismatch, match=r"adapter: input embeddings is .* takes \[images, 192\]"):
        pipeline.lora_from_embeddings(np.zeros(shape, np.float32))


def test_pixels_that_do_not_fit(pipeline: Pipeline) -> None:
    pixels = pipeline.pixels(PICTURES[:1])
    with pytest.raises(ShapeMismatch, match=r"dinov3: input pixels is \[1, 3, 64, 63\]"):
        pipeline.embed_pixels(pixels | {"dinov3": pixels["dinov3"][..., 1:]})


@pytest.fixture
def no_driver(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("i2l.engines.device.driver._driver_library", lambda: None)


@pytest.fixture
def driver_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine with a GPU and without any package for it."""
    real = importlib.util.find_spec
    monkeypatch.setattr("i2l.engines.device.driver._driver_library", object)
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name: None if name.startswith(("tensorrt", "onnxruntime")) else real(name)
    )


@pytest.mark.usefixtures("no_driver")
@pytest.mark.parametrize("backend", ["cuda", "tensorrt"])
def test_a_named_backend_that_cannot_run_is_an_error(engines: MakeEngines, backend: str) -> None:
    with pytest.raises(BackendUnavailable, match=f"backend {backend} .*no NVIDIA driver.*: use --backend cpu"):
        open_engines(engines("tiny", "fp32"), backend=backend)


@pytest.mark.usefixtures("driver_alone")
@pytest.mark.parametrize("backend", ["cuda", "tensorrt"])
def test_the_remedy_for_a_missing_package_installs_it(engines: MakeEngines, backend: str) -> None:
    with pytest.raises(BackendUnavailable, match=rf"pip install \"i2l-engines\[{backend}\]\""):
        open_engines(engines("tiny", "fp32"), backend=backend)


def test_a_backend_that_does_not_exist(engines: MakeEngines) -> None:
    with pytest.raises(BackendUnavailable, match="use one of auto, cpu, webgpu, cuda, "):
        open_engines(engines("tiny", "fp32"), backend="gpu")


@pytest.mark.usefixtures("no_driver")
def test_auto_says_why(engines: MakeEngines) -> None:
    with open_engines(engines("tiny", "fp32")) as opened:
        assert opened.backend_name == "cpu"
        reason = "no NVIDIA driver on this machine"
        assert opened.backend_reason.startswith("auto: the best that works here (webgpu: ")
        assert f"; cuda: {reason}; " in opened.backend_reason
        assert opened.backend_reason.endswith(f"; tensorrt: {reason})")


def test_a_named_backend_was_asked_for(engines: MakeEngines) -> None:
    with open_engines(engines("tiny", "fp32"), backend="cpu") as opened:
        assert (opened.backend_name, opened.backend_reason) == ("cpu", "asked for")


# --- the streamer ------------------------------------------------------------------------------------------------


class FakeStore:
    """Writes down what it is asked, and fails at the ``fail_at``-th request."""

    slots = 2
    resident: frozenset[Chunk] = frozenset()

    def __init__(self, chunks: Sequence[Chunk], fail_at: int = -1, abreast: int = 1) -> None:
        self.abreast = abreast
        self.chunks = {step.name: chunk for chunk in chunks for step in chunk.steps}
        self.held: list[Chunk] = []
        self.prefetched: list[Chunk] = []
        self.acquired: list[Chunk] = []
        self.released: list[Chunk] = []
        self.requests = 0
        self.lock = threading.Lock()
        self.fail_at = fail_at
        self.most_held = 0

    def request(self) -> None:
        with self.lock:
            self.requests += 1
            if self.requests == self.fail_at:
                raise Cut

    def prefetch(self, chunk: Chunk) -> None:
        self.request()
        self.prefetched.append(chunk)
        self.held.append(chunk)
        self.most_held = max(self.most_held, len(self.held))

    def acquire(self, chunk: Chunk) -> None:
        self.request()
        assert chunk in self.held, "never asked for"
        self.acquired.append(chunk)

    def weights(self, step: Step) -> Mapping[str, object]:
        self.request()
        assert self.chunks[step.name] in self.acquired, "not waited for"
        assert self.chunks[step.name] in self.held, "not there"
        return {step.name: step}

    def release(self, chunk: Chunk) -> None:
        self.released.append(chunk)
        self.held.remove(chunk)


@st.composite
def chunk_lists(draw: st.DrawFn) -> list[Chunk]:
    """Chunks of one to four steps, each chunk at a place of its own."""
    counts = draw(st.lists(st.integers(1, 4), max_size=6))
    return [
        Chunk(index * 4096, 4096, tuple(Step(f"step.{index}.{part}", "graph") for part in range(count)))
        for index, count in enumerate(counts)
    ]


@given(chunk_lists())
def test_every_step_comes_in_order_with_its_weights(chunks: list[Chunk]) -> None:
    found = list(stream(FakeStore(chunks), chunks))
    assert [step for step, _ in found] == [step for chunk in chunks for step in chunk.steps]
    assert all(weights == {step.name: step} for step, weights in found)


@given(chunk_lists())
def test_the_next_chunk_is_on_its_way_while_one_is_used(chunks: list[Chunk]) -> None:
    store = FakeStore(chunks)
    for step, _ in stream(store, chunks):
        current = chunks.index(store.chunks[step.name])
        assert store.prefetched == chunks[: current + 2]
        assert store.held == chunks[current : current + 2]
    assert store.most_held <= 2


@given(chunk_lists())
def test_each_chunk_is_released_once_after_its_last_step(chunks: list[Chunk]) -> None:
    store = FakeStore(chunks)
    for step, _ in stream(store, chunks):
        current = chunks.index(store.chunks[step.name])
        assert store.released == chunks[:current]
    assert store.released == chunks


@settings(max_examples=200)
@given(chunk_lists(), st.integers(0, 24))
def test_a_consumer_that_raises_leaves_nothing_held(chunks: list[Chunk], after: int) -> None:
    store = FakeStore(chunks)

    def consume() -> None:
        for count, _ in enumerate(stream(store, chunks)):
            if count == after:
                raise Cut

    steps = sum(len(chunk.steps) for chunk in chunks)
    if after < steps:
        with pytest.raises(Cut):
            consume()
    else:
        consume()
    assert store.held == []
    assert store.released == store.prefetched


@settings(max_examples=200)
@given(chunk_lists(), st.integers(1, 36))
def test_a_store_that_fails_holds_nothing(chunks: list[Chunk], fail_at: int) -> None:
    store = FakeStore(chunks, fail_at)
    requests = sum(2 + len(chunk.steps) for chunk in chunks)
    if fail_at <= requests:
        with pytest.raises(Cut):
            list(stream(store, chunks))
    else:
        list(stream(store, chunks))
    assert store.held == []
    assert store.released == store.prefetched


@settings(max_examples=200)
@given(chunk_lists(), st.integers(1, 36), st.integers(1, 3), st.sets(st.integers(0, 24), max_size=2))
def test_steps_side_by_side_are_worked_once_each_and_nothing_stays_held(
    chunks: list[Chunk], fail_at: int, abreast: int, bad: set[int]
) -> None:
    store = FakeStore(chunks, fail_at, abreast)
    steps = [step for chunk in chunks for step in chunk.steps]

    def work(step: Step, weights: Mapping[str, object]) -> str:
        assert weights == {step.name: step}
        if steps.index(step) in bad:
            raise Cut
        return step.name

    requests = sum(2 + len(chunk.steps) for chunk in chunks)
    if fail_at <= requests or any(index < len(steps) for index in bad):
        with pytest.raises(Cut):
            list(side_by_side(store, chunks, work))
    else:
        assert list(side_by_side(store, chunks, work)) == [step.name for step in steps]
        assert sorted(store.released, key=chunks.index) == chunks
    assert store.held == []
    assert store.most_held <= store.slots


def test_chunks_are_used_at_the_same_time() -> None:
    chunks = [Chunk(index * 4096, 4096, (Step(f"step.{index}", "graph"),)) for index in range(4)]
    meeting = threading.Barrier(2, timeout=60)  # passed by two at a time or not at all
    assert len(list(side_by_side(FakeStore(chunks, abreast=2), chunks, lambda *_: meeting.wait()))) == 4


def test_one_image_needs_no_list(pipeline: Pipeline, tmp_path: Path) -> None:
    path = tmp_path / "one.png"
    PICTURES[0].save(path)
    wanted = pipeline.embed([PICTURES[0]])
    for single in (str(path), path, PICTURES[0], np.asarray(PICTURES[0])):
        np.testing.assert_array_equal(pipeline.embed(single), wanted)
