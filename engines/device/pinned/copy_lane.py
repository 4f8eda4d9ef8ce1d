"""The copy lane of a CUDA card: a stream, and a thread that works for it.

To copy a chunk the host must first bring it into pinned memory, which takes longer than the copy. Done by the thread
that launches kernels, the kernels of the chunk before would not be launched meanwhile, and the card would stand still.
So all that goes into this lane is handed to a thread of its own, in order: it fills buffers ahead, and waits where it
must. A mark in the lane is an event that is made when the thread comes to it. Whoever needs its handle, to let the
other lane wait for it, waits until then on the host; what computes before is enqueued already.
"""

import logging
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import contextmanager
from typing import Any, TypeVar

import numpy as np

from ..calls import CudaEvent, DriverCalls
from ..device import TimedCopy
from .kept import KeptChunks
from .staging import Staging

log = logging.getLogger(__name__)
T = TypeVar("T")


class LaterEvent:
    """A :class:`CudaEvent` of the lane, once its thread has come to it."""

    def __init__(self, made: Future[CudaEvent]) -> None:
        self._made = made

    @property
    def handle(self) -> Any:
        """The driver's; waits until what is before it is enqueued.

        Raises:
            DeviceFailed, OutOfDeviceMemory: that failed.
        """
        return self._made.result().handle


class CopyLane:
    """Copies to the card, in order.

    Args:
        call: the driver.
        stream: the driver's.
    """

    def __init__(self, call: DriverCalls, stream: Any) -> None:
        self._call = call
        self._stream = stream
        self._ring = Staging(call)
        self._kept = KeptChunks(call)
        self._thread = ThreadPoolExecutor(1, "i2l-copies")
        self._last: Future[Any] | None = None
        self._timed: list[TimedCopy] | None = None

    def copy(self, source: memoryview, address: int) -> None:
        """Enqueue a copy of host memory, which must not change before the next :meth:`drain`."""

        def work() -> None:
            host = address_of(source)

            def copy(offset: int, pinned: int, size: int) -> None:
                with self._span(size):
                    self._call("cuMemcpyHtoDAsync", address + offset, pinned, size, self._stream)

            if kept := self._kept.of(host):
                self._ring.through(kept, host, source.nbytes, copy)
            else:
                self._ring.to_card(host, source.nbytes, copy, lambda: CudaEvent(self._call, self._stream, timed=False))

        self._do(work)

    def record(self, *, timed: bool) -> LaterEvent:
        """Mark the end of what was enqueued so far."""
        return LaterEvent(self._do(lambda: CudaEvent(self._call, self._stream, timed=timed)))

    def wait(self, event: Any) -> None:
        """Keep what is enqueued from now on back until ``event``."""
        self._do(lambda: self._call("cuStreamWaitEvent", self._stream, event.handle, 0))

    def time(self, copies: list[TimedCopy] | None) -> None:
        """Add each copy that is enqueued from now on to a list; None: no more."""
        self.drain()
        self._timed = copies

    def keep(self, sources: Sequence[memoryview], floor_bytes: int) -> None:
        """Keep these regions in pinned memory, instead of others; nothing may be under way."""
        self.drain()
        self._kept.keep([(address_of(source), source.nbytes) for source in sources], floor_bytes)

    def drain(self) -> None:
        """Wait until all is enqueued. What failed is told by the events behind it, and forgotten from now on."""
        if self._last is not None:
            wait([self._last])  # one thread: then all before it are done too
            self._last = None

    def close(self) -> None:
        """Give pinned memory back; nothing may be under way on the card."""
        self.drain()
        self._thread.shutdown()
        self._kept.release()
        self._ring.close()

    @contextmanager
    def _span(self, nbytes: int) -> Iterator[None]:
        """Time what the body enqueues, if copies are timed: its memory is filled by now, so that is not in it."""
        if self._timed is None:
            yield
            return
        begin = CudaEvent(self._call, self._stream, timed=True)
        yield
        self._timed.append(TimedCopy(begin, CudaEvent(self._call, self._stream, timed=True), nbytes))

    def _do(self, work: Callable[[], T]) -> Future[T]:
        """Work for the thread; behind work that failed it fails likewise, as a mark must not say that all is well."""
        before = self._last

        def run() -> T:
            if before is not None:
                before.result()
            return work()

        made = self._last = self._thread.submit(run)
        return made


def address_of(memory: memoryview) -> int:
    """Where the bytes lie in this process; read-only ones too, which ctypes does not tell."""
    return int(np.frombuffer(memory, np.uint8).ctypes.data)
