"""A whole model in one call: what its steps enqueue is recorded, and from then on launched as one CUDA graph.

A pass is thousands of small kernels, and launching them takes the host longer than a fast card computes. A graph
repeats them with the same addresses: so only where all weights stay on the device, one graph for each number of images,
and none outlives a plan that moves memory.

A pass is launched kernel by kernel first: kernels are loaded and made then, which nothing can record. Behind it the
same steps are recorded, and the graph's first run must give what the pass gave, to the bit. Only then is it used.
"""

import logging
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping, Sequence
from typing import Protocol, TypeAlias, TypeVar, runtime_checkable

import numpy as np

from ...machine.progress import Report, silent
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
    """The graphs of a device, by whatever tells passes apart."""

    def __init__(self, device: Recording) -> None:
        self._device = device
        self._graphs: dict[Hashable, tuple[Graph, list[Fetched]]] = {}
        self._refused = False

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
        """Forget all graphs, before anything moves that they use."""
        if self._graphs:
            self._device.finish()
        self._graphs.clear()

    def _make(
        self, key: Hashable, upload: Callable[[], Value], steps: Steps, wanted: Sequence[Mapping[str, Array]]
    ) -> None:
        """Record a graph, hold its first run against the pass, and keep it if they are equal."""
        value = upload()
        try:
            graph, fetched = self._device.record_work(lambda: steps(value, silent))
            graph.launch()
            found = list(taken(fetched))
        except (DeviceFailed, OutOfDeviceMemory, WorkNotRepeatable) as error:
            self._refuse(str(error))
            return
        if all(map(equal, found, wanted)):
            self._graphs[key] = graph, fetched
        else:
            self._refuse("the first run of one gave another result")

    def _refuse(self, reason: str) -> None:
        self._refused = True
        self.drop()
        log.warning("%s: passes are launched kernel by kernel, without CUDA graphs: %s", self._device.name, reason)


def taken(fetched: Iterable[Fetched]) -> Iterator[dict[str, Array]]:
    """What was asked for, one after another: whoever looks at each finds it in the cache."""
    return (take() for take in fetched)


def equal(first: Mapping[str, Array], second: Mapping[str, Array]) -> bool:
    """Whether outputs are the same to the bit; what is no number is no number in both."""
    return all(np.array_equal(first[name], array, equal_nan=True) for name, array in second.items())
