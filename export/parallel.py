"""Work on many pieces of a matrix at once, each piece in one thread.

torch's own threads meet at a barrier after every operator. Where another thread hashes and writes at the same time, that
barrier waits for whoever lost his core: quantising a block took up to 30 times longer (measured on two busy cores). So the
threads here take whole pieces, and torch gets one thread in each.
"""

from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from typing import TypeVar

import torch

from ..engines.threads import usable_cores

Item = TypeVar("Item")
Result = TypeVar("Result")


def in_threads(function: Callable[[Item], Result], items: Iterable[Item]) -> Iterator[Result]:
    """``map(function, items)``, in order, on all cores."""
    return _pool().map(function, items)


@cache
def _pool() -> ThreadPoolExecutor:
    return ThreadPoolExecutor(usable_cores(), "i2l-quantise", initializer=torch.set_num_threads, initargs=(1,))
