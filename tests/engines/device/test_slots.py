"""The streamer on a fake device: order, budget and running out of memory, over random plans and random delays."""

import logging
import random
from collections.abc import Callable, Generator, Sequence
from contextlib import closing
from dataclasses import dataclass, field
from functools import partial
from itertools import islice
from typing import Any, cast

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fake_device import DeviceTensor, FakeDevice, Mark
from i2l.engines.device.device import Lane
from i2l.engines.device.residency import GraphMemory, Residency, plan_residency
from i2l.engines.device.slots import DeviceStore, DeviceWeights
from i2l.engines.directory.manifest import Chunk, Model, Step
from i2l.engines.directory.tensorfile import TensorInfo
from i2l.errors import BudgetTooSmall, DeviceFailed, I2LError, OutOfDeviceMemory
from i2l.runtime.streamer import stream
from i2l.specs import FAMILIES, PRESETS, Family

SPECS = {spec.family: spec for spec in PRESETS["tiny"]}
GRAPHS = {"graph": GraphMemory(300, 200, 100)}
RESERVED = 1000


@dataclass(frozen=True)
class Case:
    """Models with packs of random bytes, and what to do with them."""

    models: dict[Family, Model]
    packs: dict[Family, bytes] = field(repr=False)
    spare: float
    """How far the budget is from the smallest (0) to that of all weights (1)."""
    slots: int

    def plan(self, budget_bytes: int) -> Residency:
        chunks = {family: model.chunks for family, model in self.models.items()}
        return plan_residency(chunks, GRAPHS, budget_bytes, slots=self.slots, reserved_bytes=RESERVED)

    @property
    def budget_bytes(self) -> int:
        with pytest.raises(BudgetTooSmall) as caught:
            self.plan(0)
        least = caught.value.needed_bytes
        return least + int(self.spare * sum(len(pack) for pack in self.packs.values()))

    def weights(self, device: FakeDevice) -> DeviceWeights:
        packs = {family: memoryview(pack) for family, pack in self.packs.items()}
        return DeviceWeights(device, self.models, packs, self.plan, self.budget_bytes)


def make_model(family: Family, rows: Sequence[Sequence[int]], seed: int) -> tuple[Model, bytes]:
    """Chunks of steps of one tensor each: ``rows[chunk][step]`` is the tensor's size."""
    chunks, tensors, end = [], {}, 4096
    for index, sizes in enumerate(rows):
        start, steps = end, []
        for part, size in enumerate(sizes):
            end += -end % 256
            steps.append(Step(f"{family}.{index}.{part}", "graph"))
            tensors[f"{steps[-1].name}.weight"] = TensorInfo("U8", (size,), end)
            end += size
        chunks.append(Chunk(start, end - start, tuple(steps)))
        end += -end % 4096
    return Model(SPECS[family], "", tuple(chunks), tensors, {}), random.Random(seed).randbytes(end)


rows = st.lists(st.lists(st.integers(1, 900), min_size=1, max_size=2), min_size=1, max_size=6)


@st.composite
def cases(draw: st.DrawFn) -> Case:
    made = {family: make_model(family, draw(rows), seed) for seed, family in enumerate(FAMILIES)}
    return Case(
        {family: model for family, (model, _) in made.items()},
        {family: pack for family, (_, pack) in made.items()},
        draw(st.sampled_from([0.0, 0.2, 0.5, 0.8, 1.0])),
        draw(st.integers(1, 3)),
    )


delays = st.builds(
    partial, st.just(FakeDevice), seed=st.integers(0, 1 << 16), haste=st.sampled_from([0.02, 0.3, 0.7, 0.98])
)


def compare(case: Case, step: Step, family: Family, tensor: DeviceTensor, seen: list[str]) -> Callable[[], None]:
    """Work that compares the weights it sees, when the device comes to it."""
    info = case.models[family].tensors[f"{step.name}.weight"]
    wanted = case.packs[family][info.offset : info.offset + info.nbytes]

    def work() -> None:
        assert tensor.read() == wanted, f"{step.name} sees other bytes than its own"
        seen.append(step.name)

    return work


def run_pass(case: Case, weights: DeviceWeights, device: FakeDevice) -> int:
    """Every step of every model compares; how many did."""
    seen: list[str] = []
    for family, model in case.models.items():
        for step, values in stream(weights.stores[family], model.chunks):
            device.enqueue("compute", compare(case, step, family, values["weight"], seen))
    device.finish()
    return len(seen)


def steps_of(case: Case) -> int:
    return sum(len(chunk.steps) for model in case.models.values() for chunk in model.chunks)


@settings(max_examples=2000, deadline=None, report_multiple_bugs=False)  # a group of errors is no AssertionError
@given(cases(), delays)
def test_every_step_sees_its_own_weights_within_the_budget(case: Case, delay: Callable[[int], FakeDevice]) -> None:
    device = delay(case.budget_bytes - RESERVED)
    weights = case.weights(device)
    for turn in range(2):
        device.copied.clear()
        assert run_pass(case, weights, device) == steps_of(case)
        resident = sum(
            case.models[family].chunks[i].nbytes for family, row in weights.residency.resident.items() for i in row
        )
        assert sum(device.copied) == weights.residency.streamed_bytes + (resident if turn == 0 else 0)
    assert device.peak_bytes + RESERVED <= case.budget_bytes
    assert device.peak_bytes + RESERVED + GRAPHS["graph"].context_bytes == weights.residency.peak_bytes
    weights.close()
    assert device.used_bytes == 0


long_examples = pytest.mark.filterwarnings(
    "ignore:Generating overly large repr",
    "ignore::pytest.PytestUnraisableExceptionWarning",  # the stream that the fake stopped is closed late
)


@long_examples
@pytest.mark.parametrize("lane", ["copy", "compute"])
def test_the_fake_catches_a_forgotten_wait(lane: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Else the test above could pass on a streamer without any order."""
    real = FakeDevice.wait
    monkeypatch.setattr(FakeDevice, "wait", lambda self, where, event: where == lane or real(self, where, event))
    with pytest.raises(AssertionError, match="sees other bytes"):
        test_every_step_sees_its_own_weights_within_the_budget()


@long_examples
def test_the_fake_catches_a_slot_given_back_too_early(monkeypatch: pytest.MonkeyPatch) -> None:
    real = DeviceStore.release

    def early(self: DeviceStore, chunk: Chunk) -> None:
        real(self, chunk)
        if self._free:
            self._free[-1].consumed = None

    monkeypatch.setattr(DeviceStore, "release", early)
    with pytest.raises(AssertionError, match="sees other bytes"):
        test_every_step_sees_its_own_weights_within_the_budget()


@settings(max_examples=300, deadline=None)
@given(cases())
def test_the_next_chunk_is_always_on_its_way(case: Case) -> None:
    device = FakeDevice(case.budget_bytes)
    weights = case.weights(device)
    for model in case.models.values():
        store = weights.stores[model.spec.family]
        device.copied.clear()
        passing = [chunk for chunk in model.chunks if chunk not in store.resident]
        for step, _ in stream(store, model.chunks):
            at = next(i for i, chunk in enumerate(model.chunks) if step in chunk.steps)
            used = sum(chunk not in store.resident for chunk in model.chunks[: at + 1])
            held = 0 if model.chunks[at] in store.resident else 1
            wanted = min(used - held + store.slots, len(passing))
            assert sum(size in {c.nbytes for c in passing} for size in device.copied) >= wanted


# --- out of memory -----------------------------------------------------------------------------------------------


@settings(max_examples=500, deadline=None)
@given(cases(), delays, st.frozensets(st.integers(0, 12), max_size=8), st.floats(0, 1))
def test_out_of_memory_shrinks_the_plan_and_goes_on(
    case: Case, delay: Callable[..., FakeDevice], failures: frozenset[int], taken: float
) -> None:
    """Allocations fail, and somebody else takes a part of the memory between two passes."""
    device = delay(case.budget_bytes - RESERVED, failures=failures)
    cause = OutOfDeviceMemory(device.name, 1, 0)
    try:
        weights = case.weights(device)
        before = weights.residency
        assert run_pass(case, weights, device) == steps_of(case)
        device.capacity_bytes -= int(taken * device.capacity_bytes)
        weights.shrink(cause)
    except OutOfDeviceMemory:
        assert device.used_bytes == 0
        return
    assert before.least_bytes <= weights.residency.peak_bytes < before.peak_bytes
    assert device.used_bytes <= device.capacity_bytes
    assert run_pass(case, weights, device) == steps_of(case)


def test_each_shrinking_is_said_once(caplog: pytest.LogCaptureFixture) -> None:
    made = {family: make_model(family, [[800]] * 5, seed) for seed, family in enumerate(FAMILIES)}
    case = Case({f: m for f, (m, _) in made.items()}, {f: p for f, (_, p) in made.items()}, 1.0, 2)
    device = FakeDevice(case.budget_bytes, failures=frozenset({1, 3}))
    with caplog.at_level(logging.WARNING, "i2l"):
        weights = case.weights(device)
    assert [record.message.split(":")[0] for record in caplog.records] == ["out of memory on fake device"] * 2
    assert run_pass(case, weights, device) == steps_of(case)
    while weights.residency.peak_bytes > weights.residency.least_bytes:
        weights.shrink(OutOfDeviceMemory(device.name, 1, 0))
    assert run_pass(case, weights, device) == steps_of(case)
    with pytest.raises(OutOfDeviceMemory, match="fake device has no room for 77 B"):
        weights.shrink(OutOfDeviceMemory(device.name, 77, 0))
    assert device.used_bytes == 0
    capacity_bytes, device.capacity_bytes = device.capacity_bytes, 0
    with pytest.raises(OutOfDeviceMemory):
        weights.reopen()
    device.capacity_bytes = capacity_bytes  # whoever had it gave it back
    weights.reopen()
    assert run_pass(case, weights, device) == steps_of(case)


def test_an_error_in_the_middle_leaves_all_slots_free() -> None:
    made = {family: make_model(family, [[800]] * 5, seed) for seed, family in enumerate(FAMILIES)}
    case = Case({f: m for f, (m, _) in made.items()}, {f: p for f, (_, p) in made.items()}, 0.0, 2)
    device = FakeDevice(case.budget_bytes)
    weights = case.weights(device)
    for _ in range(5):
        list(islice(stream(weights.stores["dinov3"], case.models["dinov3"].chunks), 2))
    assert run_pass(case, weights, device) == steps_of(case)


@pytest.mark.parametrize("error", [OutOfDeviceMemory("fake device", 0, 0), DeviceFailed("fake device", "no event")])
def test_a_slot_that_cannot_be_marked_as_used_is_not_lost(monkeypatch: pytest.MonkeyPatch, error: I2LError) -> None:
    """A pass is interrupted while there is no memory for events. What still reads the slots does so to its end."""
    made = {family: make_model(family, [[800]] * 5, seed) for seed, family in enumerate(FAMILIES)}
    case = Case({f: m for f, (m, _) in made.items()}, {f: p for f, (_, p) in made.items()}, 0.0, 2)
    real = FakeDevice.record

    def refuse(self: FakeDevice, lane: Lane, *, timed: bool = False) -> Mark:
        if lane == "compute":
            raise error
        return real(self, lane, timed=timed)

    for seed in range(20):
        device = FakeDevice(case.budget_bytes, seed=seed, haste=0.98)
        weights = case.weights(device)
        seen: list[str] = []
        chunks = case.models["dinov3"].chunks
        with closing(cast("Generator[Any, None, None]", stream(weights.stores["dinov3"], chunks))) as steps:
            for step, values in islice(steps, 2):
                device.enqueue("compute", compare(case, step, "dinov3", values["weight"], seen))
            monkeypatch.setattr(FakeDevice, "record", refuse)
        monkeypatch.undo()
        assert run_pass(case, weights, device) == steps_of(case)
        assert len(seen) == 2
