"""What a proof tells of a device's lanes: the arithmetic, the measuring over the fake device, and the sentence."""

from collections.abc import Iterator, Mapping, Sequence

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from conftest import MakeEngines
from fake_device import FakeDevice, FakeEngine
from i2l.engines.base import CardFacts, Opened, Value, WeightStore
from i2l.engines.device.backend import DeviceBackend
from i2l.engines.device.residency import GraphMemory
from i2l.engines.directory.manifest import Chunk, Step, read_manifest
from i2l.engines.errors import BudgetTooSmall, OutOfDeviceMemory
from i2l.runtime import streamer
from i2l.runtime.proof import timing
from i2l.runtime.proof.activations import seeded_activation
from i2l.runtime.proof.judging import FormOutcome, Interval, busy, overlap
from i2l.runtime.proof.records import Record, Subject, records_from_json, records_to_json
from i2l.runtime.proof.sentences import anonymous, record_lines

TICKS = 30


def lanes() -> st.SearchStrategy[list[Interval]]:
    """Intervals in order and apart, some of them touching, some empty."""
    ends = st.lists(st.integers(0, TICKS), max_size=16).map(sorted)
    return ends.map(lambda at: [(float(x), float(y)) for x, y in zip(at[::2], at[1::2], strict=False)])


@given(lanes(), lanes())
@settings(deadline=None)
def test_overlap_is_what_counting_ticks_gives(first: list[Interval], second: list[Interval]) -> None:
    def ticks(lane: Sequence[Interval]) -> set[int]:
        return {tick for tick in range(TICKS) if any(begin <= tick < end for begin, end in lane)}

    assert busy(first) == len(ticks(first))
    less = min(len(ticks(first)), len(ticks(second)))
    assert overlap(first, second) == overlap(second, first)
    assert overlap(first, second) == (len(ticks(first) & ticks(second)) / less if less else None)


@pytest.fixture
def opened(engines: MakeEngines) -> Iterator[Opened]:
    """With the least budget on a fake device, so that everything streams."""
    directory = engines("tiny", "fp32")
    manifest = read_manifest(directory)
    graphs = {graph: GraphMemory(5000, 200_000, 100) for graph in manifest.graphs}
    device = FakeDevice(1 << 30, seed=1)

    def make(graph: str) -> FakeEngine:
        return FakeEngine(device, graph, directory / manifest.build / manifest.graphs[graph], lambda _: None)

    with pytest.raises(BudgetTooSmall) as caught:
        DeviceBackend("fake", device, make, directory, manifest, graphs, 0)
    backend = DeviceBackend("fake", device, make, directory, manifest, graphs, caught.value.needed_bytes)
    yield Opened(backend, manifest, manifest)
    backend.close()


def told(opened: Opened) -> FormOutcome:
    """What a proof would."""
    models = opened.running.models.items()
    inputs = {family: seeded_activation(model.spec, model.chunks[0].steps[0].graph, 1) for family, model in models}
    return FormOutcome(None, ms_per_image=1.0, **timing.lane_facts(opened, inputs))


def test_a_streamer_that_waits_for_each_copy_hides_none(opened: Opened, monkeypatch: pytest.MonkeyPatch) -> None:
    device = opened.backend.device  # type: ignore[attr-defined]

    def serial(store: WeightStore, chunks: Sequence[Chunk]) -> Iterator[tuple[Step, Mapping[str, Value]]]:
        for chunk in chunks:
            store.prefetch(chunk)
            device.finish()
            store.acquire(chunk)
            for step in chunk.steps:
                yield step, store.weights(step)
            store.release(chunk)
            device.finish()

    beside = told(opened)
    assert beside.overlap
    assert 0 < beside.overlap <= 1
    assert beside.copying_share
    for module in (timing, streamer):
        monkeypatch.setattr(module, "stream", serial)
    assert told(opened).overlap == 0
    with monkeypatch.context() as patch:
        patch.setattr(device, "elapsed_us", lambda *_: 0.0)
        assert told(opened) == FormOutcome(None, ms_per_image=1.0)  # a clock that stands still tells nothing


def test_without_pinned_memory_the_share_is_not_told(opened: Opened, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(address: int, nbytes: int) -> float:  # noqa: ARG001
        raise OutOfDeviceMemory("a card", nbytes, None)

    monkeypatch.setattr(opened.backend.device, "pinned_rate", refuse)  # type: ignore[attr-defined]
    outcome = told(opened)
    assert outcome.unpinned
    assert outcome.overlap is not None
    assert outcome.pinned_bytes_per_second is outcome.copying_share is outcome.streaming_share is None
    assert any(line.endswith("; no memory could be pinned to compare copies with") for line in lines(outcome))


def lines(outcome: FormOutcome) -> list[str]:
    """What is printed of it, and of it once it was kept and read."""
    record = Record(Subject("cuda", CardFacts("a card"), "b", "1"), (outcome,), None, False, 1.0, "today")
    assert records_from_json(records_to_json([record])) == [record]
    return list(record_lines(record))


def test_the_sentence() -> None:
    facts = {"pinned_bytes_per_second": 25.1e9, "copying_share": 0.976, "streaming_share": 0.413, "ms_per_image": 1.0}
    shares = "copies run at 98 % of pinned memory's 25.1 GB/s, streaming as a whole at 41 %"
    hidden = FormOutcome(None, overlap=0.941, **facts)  # type: ignore[arg-type]
    assert f"    94 % of the copying ran beside computing; {shares}" in lines(hidden)
    bound = FormOutcome(None, overlap=1.0, mostly_copying=True, ms_per_image=1.0)
    assert "    100 % of the computing ran beside copying" in lines(bound)
    assert not any("beside" in line or "pinned" in line for line in lines(FormOutcome(None, ms_per_image=1.0)))
    assert anonymous(shares) == shares
