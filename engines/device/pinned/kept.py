"""Chunks that are kept in pinned host memory: what :mod:`.host_cache` planned, as far as the system allows.

Pinning costs time, and a chunk that comes only once has nothing of it: so memory is taken from the second pass on, a
chunk's worth for each chunk that comes, the most worth keeping first, whichever came. A chunk is filled when it next
comes, on its way through, and from then on is copied from there.

A kept chunk is bytes of a mapped pack of one build. The map holds that file whatever becomes of the directory, whoever
uses it asks before every pass whether it is unchanged (:func:`~...directory.integrity.require_unchanged`), and another
build is another backend with another cache. So a chunk in here is never older than its pack.
"""

import logging
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass

from ....machine.memory import available_bytes
from ....machine.wording import format_bytes
from ...errors import OutOfDeviceMemory
from ..calls import DriverCalls

log = logging.getLogger(__name__)


@dataclass
class KeptChunk:
    """Pinned memory of a chunk."""

    address: int
    filled: bool = False


class KeptChunks:
    """Used by one thread at a time.

    Args:
        call: the driver.
    """

    def __init__(self, call: DriverCalls) -> None:
        self._call = call
        self._kept: dict[int, KeptChunk] = {}
        self._wanted: deque[tuple[int, int]] = deque()
        self._floor_bytes = 0
        self._came: set[int] = set()

    def keep(self, regions: Sequence[tuple[int, int]], floor_bytes: int) -> None:
        """Instead of what was kept, which nothing may use any more.

        Args:
            regions: ``(address, bytes)`` where chunks are mapped, the most worth keeping first.
            floor_bytes: nothing is pinned that would leave less available.
        """
        self.release()
        self._wanted = deque(regions)
        self._floor_bytes = floor_bytes

    def release(self) -> None:
        """Give the memory back."""
        self._wanted.clear()
        self._came.clear()
        while self._kept:
            self._call.give_back("cuMemFreeHost", self._kept.popitem()[1].address)

    def of(self, host: int) -> KeptChunk | None:
        """The memory of the chunk that is mapped there and comes now; None if it is not kept, or not yet."""
        if self._wanted:
            if host in self._came:
                self._grow()
            self._came.add(host)
        return self._kept.get(host)

    def _grow(self) -> None:
        """Pin memory for one chunk more, unless that is refused or would leave too little."""
        if not self._kept:
            wanted = format_bytes(sum(nbytes for _, nbytes in self._wanted))
            log.info("%s: up to %s of the host's memory are pinned for chunks that come in every pass, half of what "
                     "was available at most", self._call.name, wanted)  # fmt: skip
        host, nbytes = self._wanted.popleft()
        available = available_bytes()
        if available is not None and available - nbytes < self._floor_bytes:
            self._stop(logging.INFO, f"{format_bytes(available)} of the host's memory are left")
            return
        try:
            self._kept[host] = KeptChunk(int(self._call("cuMemAllocHost", nbytes)))
        except OutOfDeviceMemory:  # of the host's memory, whatever the driver calls it
            self._stop(logging.WARNING, "the system does not let more be pinned")

    def _stop(self, level: int, reason: str) -> None:
        planned = len(self._kept) + len(self._wanted) + 1
        self._wanted.clear()
        log.log(
            level, "%s: %d of %d chunks are kept in pinned host memory (%s): the others pass through buffers, slower",
            self._call.name, len(self._kept), planned, reason,
        )  # fmt: skip
