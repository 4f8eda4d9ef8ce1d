"""The streamer: a model's chunks pass through, the next one always on its way.

It knows nothing of files or devices: it asks the store to bring chunks in as long as slots are free, waits for the
current one, uses it, and gives it back after its last step. Chunks that stay take no slot, so while they are used the
ones behind them are already coming. Every backend is driven by :func:`stream`; where steps need nothing of each other,
:func:`side_by_side` uses several chunks at a time.
"""

from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from typing import TypeVar

from ..engines.base import Value, WeightStore
from ..engines.directory.manifest import Chunk, Step
from ..engines.errors import DeviceFailed, OutOfDeviceMemory

T = TypeVar("T")


def stream(store: WeightStore, chunks: Sequence[Chunk]) -> Iterator[tuple[Step, Mapping[str, Value]]]:
    """Yield every step of ``chunks`` in order with its weights, valid until the next step is asked for."""
    ahead = deque(chunks)
    held: deque[Chunk] = deque()
    free = store.slots
    try:
        for chunk in chunks:
            while ahead and (free or ahead[0] in store.resident):
                store.prefetch(ahead[0])
                free -= ahead[0] not in store.resident
                held.append(ahead.popleft())
            store.acquire(chunk)
            for step in chunk.steps:
                yield step, store.weights(step)
            free += chunk not in store.resident
            store.release(held.popleft())
    finally:
        for chunk in held:
            with suppress(DeviceFailed, OutOfDeviceMemory):  # the error that ended the work is told already
                store.release(chunk)


def side_by_side(
    store: WeightStore, chunks: Sequence[Chunk], work: Callable[[Step, Mapping[str, Value]], T]
) -> Iterator[T]:
    """What ``work`` makes of every step with its weights, in order: for steps that need nothing of each other.

    ``store.abreast`` threads take a chunk each, so ``work`` and the store are called by several at once; where that is
    one, by the caller's own, as a device may know no other.
    """
    if store.abreast == 1:
        yield from (work(step, weights) for step, weights in stream(store, chunks))
        return

    def used(chunk: Chunk) -> list[T]:
        try:
            store.acquire(chunk)
            return [work(step, store.weights(step)) for step in chunk.steps]
        finally:
            store.release(chunk)

    begun: deque[tuple[Chunk, Future[list[T]]]] = deque()
    with ThreadPoolExecutor(store.abreast, thread_name_prefix="i2l-abreast") as threads:
        try:
            for chunk in chunks:
                if len(begun) == store.slots:
                    yield from begun.popleft()[1].result()
                store.prefetch(chunk)
                begun.append((chunk, threads.submit(used, chunk)))
            while begun:
                yield from begun.popleft()[1].result()
        finally:
            for chunk, future in begun:
                if future.cancel():
                    store.release(chunk)
