"""A CUDA card as a :class:`Device`: two streams, raw memory, events, copies from pinned memory.

CI runs it over a stand-in for the driver that does work as late as CUDA allows (tests/engines/standin). Memory comes
from the driver's own functions, since slots must not move and a pool would keep what the budget takes back.

Everything that the device reads or writes is enqueued in one of the two lanes. The plain copies of CUDA are not: they
go into a third stream that no event orders with ours, and may return before the bytes are on the card.
"""

import ctypes
import logging
import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from functools import partial
from typing import Any, TypeVar

import numpy as np

from ..base import Array
from ..directory.dtypes import ELEMENT_TYPES, FLOAT32
from ..directory.tensorfile import TENSOR_ALIGN, TensorInfo
from ..errors import DeviceFailed, OutOfDeviceMemory
from ..replay.outbox import Outbox, Piece
from .calls import CudaEvent, CudaGraph, DriverCalls
from .device import Event, Lane, TimedCopy
from .pinned.copy_lane import CopyLane
from .pinned.host_cache import VALUE_BYTES
from .pinned.staging import Staging
from .tensor import DeviceTensor

log = logging.getLogger(__name__)
T = TypeVar("T")
NON_BLOCKING = 1
LANES: tuple[Lane, ...] = ("copy", "compute")
RATE_COPIES = 8
"""Copies that a rate is of."""
CLOCK_STEP_US = 0.5
"""Of CUDA's events, by its documentation: what is shorter may be told as nothing."""


class CudaDevice:
    """The card number ``index``.

    Args:
        index: among the cards that CUDA sees.
        backend: what it is opened for, for errors.

    Raises:
        BackendUnavailable: there is no driver or no such card.
        OutOfDeviceMemory, DeviceFailed: the card has no room for a context, or does not answer.
    """

    def __init__(self, index: int = 0, *, backend: str = "cuda") -> None:
        self._call = DriverCalls(index, backend)
        self.index = index
        self.name = self._call.name
        self._made: list[Any] = []
        try:
            self.sm = self._call.sm
            """The compute capability, 89 for 8.9."""
            for _ in LANES:
                self._made.append(self._call("cuStreamCreateWithPriority", NON_BLOCKING, 0))
            self._free_at_start = self.free_bytes()
        except (DeviceFailed, OutOfDeviceMemory):
            self._give_back()
            raise
        self._streams: dict[Lane, Any] = dict(zip(LANES, self._made, strict=True))
        self._copies = CopyLane(self._call, self._streams["copy"])
        self._values = Staging(self._call, piece_bytes=VALUE_BYTES)
        self._outbox = Outbox(self._pinned, partial(self._call.give_back, "cuMemFreeHost"))
        self._fetched = True
        """The host has waited since something was last asked for."""
        self._closed = False
        self._peak_bytes = 0

    @property
    def compute_stream(self) -> int:
        """The compute lane's stream, as onnxruntime and TensorRT want it."""
        return int(self._streams["compute"])

    # --- memory ---------------------------------------------------------------------------------------------------

    @property
    def used_bytes(self) -> int:
        return self._look()

    @property
    def peak_bytes(self) -> int:
        """The most by which free memory fell since this device was opened, seen at allocations and whenever asked.

        Other programs count too; CUDA's context does not, as it was there before. It is not asked after every pass:
        the driver takes its time to answer, and what libraries take they keep.
        """
        if not self._closed:
            with suppress(DeviceFailed):  # a number for a report: no reason to lose what was computed
                self._look()
        return self._peak_bytes

    def free_bytes(self) -> int:
        free, _ = self._call("cuMemGetInfo")
        return int(free)

    def allocate(self, nbytes: int) -> int:
        free = self.free_bytes()
        if nbytes > free:  # Windows would move other memory out instead of refusing, and everything would crawl
            raise OutOfDeviceMemory(self.name, nbytes, free)
        address = int(self._call("cuMemAlloc", nbytes, wanted_bytes=nbytes))
        assert address % TENSOR_ALIGN == 0, "cuMemAlloc promises as much"
        self._look()
        return address

    def free(self, address: int) -> None:
        self._call.give_back("cuMemFree", address)

    def close(self) -> None:
        """Give back what :meth:`allocate` did not give: buffers, streams, the context. Never raises."""
        if self._closed:
            return
        try:
            self.finish()
            self._look()
        except (DeviceFailed, OutOfDeviceMemory) as error:
            log.debug("closing a card that does not answer: %s", error)
        self._closed = True
        self._copies.close()
        self._values.close()
        self._outbox.close()
        self._give_back()

    def pinned_rate(self, address: int, nbytes: int) -> float:
        host = int(self._call("cuMemAllocHost", nbytes, wanted_bytes=nbytes))
        stream = self._streams["copy"]
        try:
            for _ in range(2):  # the first warms up
                self.finish()
                begin = CudaEvent(self._call, stream, timed=True)
                for _ in range(RATE_COPIES):
                    self._call("cuMemcpyHtoDAsync", address, host, nbytes, stream)
                end = CudaEvent(self._call, stream, timed=True)
        finally:
            self._call.give_back("cuStreamSynchronize", stream)  # it must not go under a copy
            self._call.give_back("cuMemFreeHost", host)
        return 1e6 * RATE_COPIES * nbytes / max(self.elapsed_us(begin, end), CLOCK_STEP_US)

    # --- lanes ----------------------------------------------------------------------------------------------------

    def copy_async(self, source: memoryview, address: int) -> None:
        self._copies.copy(source, address)

    def keep_on_host(self, sources: Sequence[memoryview], floor_bytes: int) -> None:
        self.finish()
        self._copies.keep(sources, floor_bytes)

    def record(self, lane: Lane, *, timed: bool = False) -> Event:
        if lane == "copy":
            return self._copies.record(timed=timed)
        return CudaEvent(self._call, self._streams[lane], timed=timed)

    def elapsed_us(self, first: Event, last: Event) -> float:
        return 1000 * float(self._call("cuEventElapsedTime", first.handle, last.handle))

    def time_copies(self, copies: list[TimedCopy] | None) -> None:
        self._copies.time(copies)

    def wait(self, lane: Lane, event: Event) -> None:
        if lane == "copy":
            self._copies.wait(event)
        else:
            self._call("cuStreamWaitEvent", self._streams[lane], event.handle, 0)

    def record_work(self, enqueue: Callable[[], T]) -> tuple[CudaGraph, T]:
        """What is enqueued in the compute lane meanwhile, as a graph instead."""
        graph = CudaGraph(self._call, self._streams["compute"])
        given = graph.recorded(enqueue)
        self._look()
        return graph, given

    def finish(self) -> None:
        self._copies.drain()
        for stream in self._streams.values():
            self._call("cuStreamSynchronize", stream)

    # --- values ---------------------------------------------------------------------------------------------------

    def value(self, address: int, info: TensorInfo) -> DeviceTensor:
        return DeviceTensor(address, tuple(info.shape), ELEMENT_TYPES[info.dtype][1])

    def upload(self, array: Array, address: int) -> DeviceTensor:
        """In the compute lane: behind what still reads the memory, before what will."""
        self._outbox.begin()
        self._fetched = False
        array = np.ascontiguousarray(array, np.float32)
        stream = self._streams["compute"]

        def copy(offset: int, source: int, size: int) -> None:
            self._call("cuMemcpyHtoDAsync", address + offset, source, size, stream)

        self._values.to_card(array.ctypes.data, array.nbytes, copy, lambda: self.record("compute"))
        return DeviceTensor(address, array.shape, FLOAT32)

    def download(self, value: Any) -> Array:
        array = np.empty(value.shape(), np.float32)
        with self._values.buffer(array.nbytes) as buffer:
            host = array.ctypes.data if buffer is None else buffer.address
            self._call("cuMemcpyDtoHAsync", host, value.data_ptr(), array.nbytes, self._streams["compute"])
            self._call("cuStreamSynchronize", self._streams["compute"])
            if buffer is not None:
                ctypes.memmove(array.ctypes.data, host, array.nbytes)
        return array

    def fetch(self, values: Mapping[str, Any]) -> Callable[[], dict[str, Array]]:
        """In one copy, as an engine's outputs lie side by side."""
        start = min(value.data_ptr() for value in values.values())
        end = max(value.data_ptr() + 4 * math.prod(value.shape()) for value in values.values())
        try:
            piece = self._outbox.take(end - start)
        except OutOfDeviceMemory:  # nothing can be pinned, which was said when the input was sent
            arrays = {name: self.download(value) for name, value in values.items()}
            return lambda: arrays
        self._call("cuMemcpyDtoHAsync", piece.address, start, piece.nbytes, self._streams["compute"])
        self._fetched = False
        places = {name: (value.data_ptr() - start, value.shape()) for name, value in values.items()}
        return partial(self._taken, piece, places)

    # --------------------------------------------------------------------------------------------------------------

    def _taken(self, piece: Piece, places: Mapping[str, tuple[int, list[int]]]) -> dict[str, Array]:
        """Copies of what was fetched, see :meth:`Outbox.copied`."""
        if not self._fetched:
            self._call("cuStreamSynchronize", self._streams["compute"])
            self._fetched = True
        return self._outbox.copied(piece, places)

    def _pinned(self, nbytes: int) -> int:
        return int(self._call("cuMemAllocHost", nbytes))

    def _give_back(self) -> None:
        """Streams, and the context, which takes half a gigabyte of the card."""
        for stream in self._made:
            self._call.give_back("cuStreamDestroy", stream)
        self._call.close()

    def _look(self) -> int:
        """What is taken now; the most is remembered."""
        used = self._free_at_start - self.free_bytes()
        self._peak_bytes = max(self._peak_bytes, used)
        return used
