"""Regions of a mapped pack are read into the page cache ahead of their use, by a thread.

The thread touches what is not cached yet, a piece at a time, and gives it back at once: so the disk's bytes come in
large pieces (see :mod:`.mapping`) while the process's own memory stays as it is. Whoever needs a region waits for its
reading and then maps it, which costs next to nothing. Warm regions cost the thread a question per piece.
"""

import mmap
import os
import weakref
from concurrent.futures import Executor, Future, wait
from pathlib import Path

from ...machine.platforms.mapping import POPULATE_READ, WINDOWS, give_back, is_cached, populate, read_ahead

PIECE_BYTES = 2 << 20
"""A huge page. One reader with such pieces read 9.5 GB at 1.84 GB/s; two readers, or 16 MiB, were no faster."""


class ReadAhead:
    """Reads one file ahead.

    Args:
        path: the file.
        mapped: its map.
        thread: one worker, which files that are used in turn share.
    """

    def __init__(self, path: Path, mapped: mmap.mmap, thread: Executor) -> None:
        self.path = path
        self._file = os.open(path, os.O_RDONLY)
        self._close_file = weakref.finalize(self, os.close, self._file)  # a pipeline that nobody closes, too
        self._mapped = mapped
        self._thread = thread
        self._reads: dict[int, Future[None]] = {}
        self._closing = False

    def begin(self, offset: int, nbytes: int) -> None:
        """Begin to read a region, unless that was begun; returns at once."""
        if POPULATE_READ is None and not WINDOWS:
            read_ahead(self._mapped, offset, nbytes)
        elif offset not in self._reads:
            self._reads[offset] = self._thread.submit(self._read, offset, nbytes)

    def wait(self, offset: int) -> None:
        """Wait until the region that begins there is read."""
        if read := self._reads.pop(offset, None):
            read.result()

    def forget(self, offset: int) -> None:
        """The region that begins there is not needed: it is not read if that was not begun."""
        if read := self._reads.pop(offset, None):
            read.cancel()

    def close(self) -> None:
        """Stop; a piece that is being read is read to its end."""
        self._closing = True
        reads = [read for read in self._reads.values() if not read.cancel()]
        wait(reads)
        self._reads.clear()
        self._close_file()

    def _read(self, offset: int, nbytes: int) -> None:
        if WINDOWS:  # which may wait for the disk in this call, and leaves the process's own memory alone
            read_ahead(self._mapped, offset, nbytes)
            return
        end = offset + nbytes
        while offset < end and not self._closing:
            after = min(end, offset + PIECE_BYTES - offset % PIECE_BYTES)
            if not is_cached(self._file, after - 1):
                populate(self._mapped, offset, after - offset)
                give_back(self._mapped, offset, after - offset)
            offset = after
