"""Work on many pieces of a matrix at once, each piece in one thread.

torch's own threads meet at a barrier after every operator. Where another thread hashes and writes at the same time,
that barrier waits for whoever lost his core: quantising a block took up to 30 times longer (measured on two busy
cores). So the threads here take whole pieces, and torch gets one thread in each.
"""

import ctypes
import sys
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import cache
from typing import TypeVar

import torch

from ...machine.threads import default_threads

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD, M_ARENA_MAX = -1, -3, -8
"""Of glibc's malloc.h."""
KEPT_BYTES = 256 << 20

Item = TypeVar("Item")
Result = TypeVar("Result")


@contextmanager
def quantising_threads() -> Iterator[None]:
    """Keep torch's own threads out of the way of :func:`in_threads`, and end those threads afterwards.

    Left to the interpreter's exit, a thread that Ctrl-C met while it was being started would be waited for, for ever.
    """
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)
        _pool().shutdown(cancel_futures=True)
        _pool.cache_clear()


def in_threads(function: Callable[[Item], Result], items: Iterable[Item]) -> Iterator[Result]:
    """``map(function, items)``, in order, on all cores."""
    return _pool().map(function, items)


@cache
def _pool() -> ThreadPoolExecutor:
    return ThreadPoolExecutor(default_threads(), "i2l-quantise", initializer=torch.set_num_threads, initargs=(1,))


def keep_freed_memory() -> None:
    """Let glibc keep freed memory for the next piece instead of handing it back to the system each time.

    Buffers of a few MiB are mapped and unmapped at every use by default; taking the page faults away made quantising a
    block 1.5 times faster (measured). Nothing happens where the C library is another one.

    It changes the whole process for good, so a command calls it, and a build inside ComfyUI does not.
    """
    if sys.platform != "linux":
        return
    libc = ctypes.CDLL(None)
    if hasattr(libc, "mallopt"):
        libc.mallopt(M_MMAP_THRESHOLD, KEPT_BYTES)
        libc.mallopt(M_TRIM_THRESHOLD, KEPT_BYTES)
        libc.mallopt(M_ARENA_MAX, 1)  # pieces move between threads
