"""Recorded passes and where their results go, without a device: tests/engines/standin has one that really records."""

import ctypes
import math
from collections.abc import Callable
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from i2l.engines.base import Array
from i2l.engines.directory.manifest import Step
from i2l.engines.replay.model_graphs import ModelGraphs
from i2l.engines.replay.outbox import BLOCK_BYTES, Outbox, pinned_for
from i2l.errors import DeviceFailed, EmbeddingNotFinite
from i2l.runtime.passes import finite_factors

LEFT = 100
"""Bytes of the budget beside the plan."""


class Recorder:
    """Doubles what is uploaded; a graph of it doubles too, times an ``error``."""

    name = "recorder"

    def __init__(self, error: float = 1) -> None:
        self.error = error
        self.graph_bytes, self.used_bytes, self.gives_back = 0, 1000, True
        self.refuses = self.finished = self.lost = False
        self.held = np.zeros(1, np.float32)
        self.told: list[int] = []

    def upload(self, value: float) -> Callable[[], Array]:
        def put() -> Array:
            self.held = np.array([value], np.float32)
            return self.held

        return put

    def steps(self, value: Array, report: Any) -> list[Callable[[], dict[str, Array]]]:
        report("model", 0, 1)
        self.held = 2 * value
        return [lambda: {"out": self.held.copy()}]

    def record_work(self, enqueue: Callable[[], Any]) -> tuple["Recorded", Any]:
        if self.refuses:
            raise DeviceFailed(self.name, "it does not record")
        before = self.held
        given = enqueue()
        self.held = before  # recorded, not done
        return Recorded(self), given

    def finish(self) -> None:
        self.finished = True
        if self.lost:
            raise DeviceFailed(self.name, "it is lost")


class Recorded:
    """A graph: it has a half of its memory from the beginning, and the other from its first launch."""

    def __init__(self, device: Recorder) -> None:
        self.device, self.launched = device, False
        device.used_bytes += device.graph_bytes // 2

    def launch(self) -> None:
        self.device.held = 2 * self.device.held * np.float32(self.device.error)
        self.device.used_bytes += 0 if self.launched else self.device.graph_bytes // 2
        self.launched = True

    def __del__(self) -> None:
        self.device.used_bytes -= self.device.graph_bytes if self.device.gives_back else 0


def passed(graphs: ModelGraphs, device: Recorder, value: float, key: object = 1) -> float:
    """One pass; its steps tell of themselves, unless they are only recorded."""
    report = lambda *_: device.told.append(1)  # noqa: E731
    (row,) = graphs.computed(key, device.upload(value), device.steps, report)
    return float(row["out"][0])


def test_a_graph_is_made_behind_the_first_pass_and_used_from_the_second() -> None:
    device = Recorder()
    graphs = ModelGraphs(device, lambda: LEFT)
    assert [passed(graphs, device, value) for value in (1, 2, 3)] == [2, 4, 6]
    assert passed(graphs, device, 4, key=2) == 8
    assert len(device.told) == 2
    graphs.drop()
    assert device.finished
    assert passed(graphs, device, 5) == 10
    assert len(device.told) == 3


@pytest.mark.parametrize("refuses", [True, False])
def test_a_graph_that_is_wrong_by_a_bit_is_not_used(caplog: pytest.LogCaptureFixture, *, refuses: bool) -> None:
    """Nor is one where the device does not record; both are said once."""
    device = Recorder(1 + 2**-23)
    device.refuses = refuses
    graphs = ModelGraphs(device, lambda: LEFT)
    assert [passed(graphs, device, value) for value in (1, 2, 3)] == [2, 4, 6]
    assert len(device.told) == 3
    reason = "it does not record" if refuses else "another result"
    assert [reason in record.message and "without CUDA graphs" in record.message for record in caplog.records] == [True]


def test_what_is_no_number_is_the_same_both_times() -> None:
    device = Recorder()
    graphs = ModelGraphs(device, lambda: LEFT)
    passed(graphs, device, float("nan"))
    assert passed(graphs, device, 2) == 4
    assert len(device.told) == 1


def test_a_graph_that_the_budget_does_not_hold_goes_at_once(caplog: pytest.LogCaptureFixture) -> None:
    """Those before stay; none is begun again, whatever its size."""
    device = Recorder()
    graphs = ModelGraphs(device, lambda: LEFT)
    for device.graph_bytes, key, taken_bytes in ((40, 1, 40), (62, 2, 40), (10, 3, 40)):
        assert passed(graphs, device, 1, key) == passed(graphs, device, 1, key) == 2
        assert (graphs.taken_bytes, device.used_bytes) == (taken_bytes, 1000 + taken_bytes)
        assert (key in graphs) == (key == 1)
    (said,) = (record.message for record in caplog.records)
    assert "other passes" in said
    assert "one takes 62 B, the VRAM budget leaves 60 B" in said


def test_none_is_begun_where_less_is_left_than_the_largest_takes(caplog: pytest.LogCaptureFixture) -> None:
    device = Recorder()
    graphs = ModelGraphs(device, lambda: LEFT)
    device.graph_bytes = 60
    passed(graphs, device, 1)
    device.refuses = True  # it would be said
    passed(graphs, device, 1, key=2)
    assert ["one takes 60 B, the VRAM budget leaves 40 B" in record.message for record in caplog.records] == [True]


def test_nothing_left_is_no_graph(caplog: pytest.LogCaptureFixture) -> None:
    device = Recorder()
    graphs = ModelGraphs(device, lambda: 0)
    assert passed(graphs, device, 1) == passed(graphs, device, 1) == 2
    (said,) = (record.message for record in caplog.records)
    assert "takes memory of the card, the VRAM budget leaves 0 B" in said


@pytest.mark.parametrize("gives_back", [True, False])
def test_what_graphs_took_counts_until_it_is_given_back(*, gives_back: bool) -> None:
    device = Recorder()
    graphs = ModelGraphs(device, lambda: LEFT)
    device.graph_bytes, device.gives_back = 30, gives_back
    for key in (1, 2):
        passed(graphs, device, 1, key)
    assert graphs.taken_bytes == 60
    graphs.drop()
    assert graphs.taken_bytes == (0 if gives_back else 60)


def test_dropping_the_graphs_of_a_lost_card_raises_nothing() -> None:
    device = Recorder()
    graphs = ModelGraphs(device, lambda: LEFT)
    passed(graphs, device, 1)
    device.lost = True
    graphs.drop()
    assert 1 not in graphs


# --- the outbox ---------------------------------------------------------------------------------------------------


class Pins:
    """Pinned memory."""

    def __init__(self) -> None:
        self.blocks: dict[int, Any] = {}

    def pin(self, nbytes: int) -> int:
        block = np.empty(nbytes, np.uint8)
        self.blocks[block.ctypes.data] = block
        return int(block.ctypes.data)

    def unpin(self, address: int) -> None:
        del self.blocks[address]


SIZES = st.lists(st.integers(1, BLOCK_BYTES + 5) | st.integers(1, 1000), max_size=12)


@given(SIZES, SIZES)
def test_the_same_pieces_lie_at_the_same_addresses(sizes: list[int], others: list[int]) -> None:
    """Whatever was asked for in between, and no two of a pass overlap."""
    pins = Pins()
    outbox = Outbox(pins.pin, pins.unpin)
    first = [outbox.take(nbytes) for nbytes in sizes]
    assert pinned_for(sizes) == sum(block.nbytes for block in pins.blocks.values())
    ends = sorted((piece.address, piece.address + piece.nbytes) for piece in first)
    assert all(end <= start for (_, end), (start, _) in pairwise(ends))
    outbox.begin()
    for nbytes in others:
        outbox.take(nbytes)
    outbox.begin()
    assert [outbox.take(nbytes) for nbytes in sizes] == first
    outbox.close()
    assert not pins.blocks


def test_results_that_somebody_holds_are_not_written_over() -> None:
    """Their home is used again when nobody does."""
    pins = Pins()
    outbox = Outbox(pins.pin, pins.unpin)

    def result(value: int) -> Any:
        outbox.begin()
        piece = outbox.take(1000)
        ctypes.memset(piece.address, value, piece.nbytes)
        return outbox.copied(piece, {"out": (40, [2, 5])})["out"].view(np.uint8)

    first, second = result(1), result(2)
    assert (first == 1).all()
    assert (second == 2).all()
    where = second.ctypes.data
    del first, second
    third = result(3)
    assert third.ctypes.data == where
    assert result(4).ctypes.data != where
    assert (third == 3).all()


@given(st.data(), st.lists(st.integers(1, 9), min_size=1, max_size=4), st.integers(0, 2))
def test_a_piece_is_looked_through_behind_its_copy(data: st.DataObject, sizes: list[int], gap: int) -> None:
    """Also what lies between its arrays; an error is of the first array that has such values, and counts them."""
    pins = Pins()
    outbox = Outbox(pins.pin, pins.unpin)
    starts = [sum(sizes[:i]) + i * gap for i in range(len(sizes))]
    places = {f"{i}.A": (4 * start, [1, size]) for i, (start, size) in enumerate(zip(starts, sizes, strict=True))}
    numbers = st.floats(-1, 1, width=32) | st.sampled_from([np.inf, -np.inf, np.nan])
    for _ in range(2):  # what was there before does not matter
        outbox.begin()
        piece = outbox.take(4 * (starts[-1] + sizes[-1]))
        drawn = data.draw(st.lists(numbers, min_size=piece.nbytes // 4, max_size=piece.nbytes // 4))
        values = np.array(drawn, np.float32)
        ctypes.memmove(piece.address, values.ctypes.data, piece.nbytes)
        outputs = outbox.copied(piece, places)
        for (name, (at, _)), size in zip(places.items(), sizes, strict=True):
            assert outputs[name].tobytes() == values[at // 4 :][:size].tobytes()
        assert outputs.finite == all(map(math.isfinite, drawn))
        wrong = {name: sum(not math.isfinite(x) for x in array.flat) for name, array in outputs.items()}
        if any(wrong.values()):
            name, count = next((name, count) for name, count in wrong.items() if count)
            with pytest.raises(EmbeddingNotFinite, match=rf"step\.{name} gave {count} value"):
                finite_factors(Step("step", "graph"), outputs)
        else:
            assert finite_factors(Step("step", "graph"), outputs) is outputs
