"""Pinned host memory that chunks pass through on their way to the card.

A copy is asynchronous only from pinned memory, and a mapped file cannot be pinned on most systems (the driver's
read-only registration is not offered by the cards and drivers that were reported, Windows refuses it, WSL caps it). So
the host fills a ring of pinned buffers, piece by piece, while the pieces before are being copied. Where not even that
much can be pinned, copies are made from the mapped file itself: the driver then stages them, and the host waits for it.

Filled by copying in memory and not by reading the file: at twice its speed (benchmarks/fill.py). In several threads,
as one does not keep up with the link, but no more than there are cores: those only wait for each other.
"""

import ctypes
import logging
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor, wait
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from ....machine.threads import default_threads
from ...errors import OutOfDeviceMemory
from ..calls import CudaEvent, DriverCalls
from .host_cache import BUFFERS, PIECE_BYTES
from .kept import KeptChunk

log = logging.getLogger(__name__)
MOST_FILL_THREADS = 4
FILL_ALONE_BYTES = 1 << 20
"""What one thread copies faster than several can be told to."""


@dataclass
class PinnedBuffer:
    """Host memory that a piece passes through."""

    address: int
    nbytes: int
    free: CudaEvent | None = None
    """Behind the last copy out of it or into it."""


class Staging:
    """A ring of pinned buffers of one size, made when they are needed.

    Args:
        call: the driver.
        buffers: how many there may be.
        piece_bytes: of each.
    """

    def __init__(self, call: DriverCalls, buffers: int = BUFFERS, piece_bytes: int = PIECE_BYTES) -> None:
        self._call = call
        self._most = buffers
        self.piece_bytes = piece_bytes
        self._ring: deque[PinnedBuffer] = deque()
        self._threads = min(default_threads(), MOST_FILL_THREADS)
        self._pool = ThreadPoolExecutor(max(1, self._threads - 1), "i2l-staging")  # and who asks
        self._refused = False

    def to_card(self, host: int, nbytes: int, copy: Callable[[int, int, int], None], mark: Callable[[], Any]) -> None:
        """Enqueue copies of host memory, which may change once this returns.

        Args:
            host: its address.
            nbytes: how many.
            copy: enqueues ``(offset, host address, bytes)``.
            mark: an event behind what was enqueued.
        """
        for offset in range(0, nbytes, self.piece_bytes):
            size = min(self.piece_bytes, nbytes - offset)
            with self.buffer(size) as buffer:
                if buffer is None:
                    copy(offset, host + offset, size)
                    continue
                self._fill(buffer.address, host + offset, size)
                copy(offset, buffer.address, size)
                buffer.free = mark()

    def through(self, kept: KeptChunk, host: int, nbytes: int, copy: Callable[[int, int, int], None]) -> None:
        """The same through a chunk's own pinned memory, which is filled at the first time; see :meth:`to_card`."""
        for offset in range(0, nbytes, self.piece_bytes):
            size = min(self.piece_bytes, nbytes - offset)
            if not kept.filled:
                self._fill(kept.address + offset, host + offset, size)
            copy(offset, kept.address + offset, size)
        kept.filled = True

    @contextmanager
    def buffer(self, nbytes: int) -> Iterator[PinnedBuffer | None]:
        """The buffer that was used longest ago, no longer in use and large enough; None where nothing can be pinned."""
        buffer = self._take(max(nbytes, self.piece_bytes))
        try:
            yield buffer
        finally:
            if buffer is not None:
                self._ring.append(buffer)

    def close(self) -> None:
        """Give the buffers back."""
        self._pool.shutdown()
        while self._ring:
            self._call.give_back("cuMemFreeHost", self._ring.popleft().address)

    def _take(self, nbytes: int) -> PinnedBuffer | None:
        if len(self._ring) < self._most and not self._refused:
            return self._pinned(nbytes)
        if not self._ring:
            return None
        buffer = self._ring.popleft()
        if buffer.free is not None:
            buffer.free.sync()
        if buffer.nbytes < nbytes:
            self._call.give_back("cuMemFreeHost", buffer.address)
            return self._pinned(nbytes)
        return buffer

    def _pinned(self, nbytes: int) -> PinnedBuffer | None:
        try:
            return PinnedBuffer(int(self._call("cuMemAllocHost", nbytes)), nbytes)
        except OutOfDeviceMemory:  # of the host's memory, whatever the driver calls it
            self._refused = True
            log.warning(
                "%s: the system does not let %d MiB be pinned: %s", self._call.name, nbytes >> 20,
                "fewer buffers do" if self._ring else "copies to the card are made without, which is slower",
            )  # fmt: skip
            return self._take(nbytes) if self._ring else None

    def _fill(self, target: int, source: int, nbytes: int) -> None:
        """Copy host memory, in several threads; ctypes lets go of the GIL."""
        part = nbytes if nbytes <= FILL_ALONE_BYTES else -(-nbytes // self._threads)
        others = [
            self._pool.submit(ctypes.memmove, target + at, source + at, min(part, nbytes - at))
            for at in range(part, nbytes, part)
        ]
        ctypes.memmove(target, source, part)
        wait(others)
