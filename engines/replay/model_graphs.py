"""A whole model in one call: what its steps enqueue is recorded, and from then on launched as one CUDA graph.

A pass is thousands of small kernels, and launching them takes the host longer than a fast card computes. A graph
repeats them with the same addresses: so only where all weights stay on the device, one graph for each number of images,
and none outlives a plan that moves memory.

A pass is launched kernel by kernel first: kernels are loaded and made then, which nothing can record. Behind it the
same steps are recorded, and the graph's first run must give what the pass gave, to the bit. Only then is it used.

What a graph takes of the device nobody knows before, as the driver keeps each kernel in its own way. So it is seen, as
the fall of free memory from before the recording to behind the first run, and a graph that the budget does not hold
goes at once.
"""

import logging
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping, Sequence
from typing import Protocol, TypeAlias, TypeVar, runtime_checkable

import numpy as np

from ...machine.progress import Report, silent
from ...machine.wording import format_bytes
from ..base import Array, Value
from ..errors import DeviceFailed, OutOfDeviceMemory, WorkNotRepeatable

log = logging.getLogger(__name__)
T = TypeVar("T")
Fetched: TypeAlias = Callable[[], dict[str, Array]]
"""An engine's outputs, asked for."""
Steps: TypeAlias = Callable[[Value, Report], list[Fetched]]


class Graph(Protocol):
    """What was recorded."""

    def launch(self) -> None:
        """Enqueue it."""
        ...


@runtime_checkable
class Recording(Protocol):
    """A device that can record its compute lane."""

    name: str

    @property
    def used_bytes(self) -> int:
        """What is taken of its memory now."""
        ...

    def record_work(self, enqueue: Callable[[], T]) -> tuple[Graph, T]:
        """What ``enqueue`` enqueues, recorded instead of done, and what it gives.

        Raises:
            DeviceFailed, OutOfDeviceMemory: something of it cannot be recorded, or there is no room for the graph.
            WorkNotRepeatable: it can be recorded, and must not be done again.
        """
        ...

    def finish(self) -> None:
        """Wait until all enqueued work is done."""
        ...


class ModelGraphs:
    """The graphs of a device, by whatever tells passes apart.

    Args:
        device: that records.
        left_bytes: of the budget beside the plan, now.
    """

    def __init__(self, device: Recording, left_bytes: Callable[[], int]) -> None:
        self._device = device
        self._left_bytes = left_bytes
        self._graphs: dict[Hashable, tuple[Graph, list[Fetched]]] = {}
        self._largest_bytes = 0
        """Of one graph; where less is left, the next one is not begun."""
        self._refused = False
        self.taken_bytes = 0
        """What all of them have of the device's memory."""

    def __contains__(self, key: Hashable) -> bool:
        return key in self._graphs

    def computed(
        self, key: Hashable, upload: Callable[[], Value], steps: Steps, report: Report
    ) -> Iterable[dict[str, Array]]:
        """What the steps fetch of an upload, in order: by the graph of ``key``, which is made where there is none.

        Args:
            key: equal for passes that enqueue the same work on the same addresses.
            upload: puts the input where it lies.
            steps: enqueues the work, waiting for nothing; what it fetches can be taken after each run of that work.
            report: for the steps, where they run one by one.
        """
        if key in self._graphs:
            graph, fetched = self._graphs[key]
            upload()
            graph.launch()
            return taken(fetched)
        if self._refused:
            return taken(steps(upload(), report))
        found = list(taken(steps(upload(), report)))
        self._make(key, upload, steps, found)
        return found

    def drop(self) -> None:
        """Forget all graphs, before anything moves that they use. Never raises: a card that is lost runs none."""
        if not self._graphs:
            return
        try:
            self._device.finish()
            before = self._device.used_bytes
            self._graphs.clear()
            given_back = before - self._device.used_bytes
        except (DeviceFailed, OutOfDeviceMemory) as error:
            log.debug("dropping the graphs of a card that does not answer: %s", error)
            self._graphs.clear()
        else:
            self.taken_bytes = max(self.taken_bytes - max(given_back, 0), 0)

    def _make(
        self, key: Hashable, upload: Callable[[], Value], steps: Steps, wanted: Sequence[Mapping[str, Array]]
    ) -> None:
        """Record a graph, hold its first run against the pass, and keep it if they are equal and there is room."""
        left = self._left_bytes() - self.taken_bytes
        if left < max(self._largest_bytes, 1):
            self._refuse_more(self._largest_bytes, left)
            return
        value, before = upload(), self._device.used_bytes
        try:
            graph, fetched = self._device.record_work(lambda: steps(value, silent))
            graph.launch()
            found = list(taken(fetched))
            took = max(self._device.used_bytes - before, 0)
        except (DeviceFailed, OutOfDeviceMemory, WorkNotRepeatable) as error:
            self._refuse(str(error))
            return
        if not all(map(equal, found, wanted)):
            self._refuse("the first run of one gave another result")
        elif took > left:
            self._refuse_more(took, left)
        else:
            self._graphs[key] = graph, fetched
            self.taken_bytes += took
            self._largest_bytes = max(self._largest_bytes, took)

    def _refuse(self, reason: str) -> None:
        self._refused = True
        self.drop()
        log.warning("%s: passes are launched kernel by kernel, without CUDA graphs: %s", self._device.name, reason)

    def _refuse_more(self, wanted_bytes: int, left_bytes: int) -> None:
        """Those that there are stay."""
        self._refused = True
        log.warning(
            "%s: %spasses are launched kernel by kernel, without CUDA graphs: one takes %s, the VRAM budget leaves %s: "
            "give more with --vram-budget",
            self._device.name,
            "other " if self._graphs else "",
            format_bytes(wanted_bytes) if wanted_bytes else "memory of the card",
            format_bytes(max(left_bytes, 0)),
        )


def taken(fetched: Iterable[Fetched]) -> Iterator[dict[str, Array]]:
    """What was asked for, one after another: whoever looks at each finds it in the cache."""
    return (take() for take in fetched)


def equal(first: Mapping[str, Array], second: Mapping[str, Array]) -> bool:
    """Whether outputs are the same to the bit; what is no number is no number in both."""
    return all(np.array_equal(first[name], array, equal_nan=True) for name, array in second.items())
