"""The streamer: a model's chunks pass through, the next one always on its way.

It knows nothing of files or devices: it asks the store to bring chunks in as long as slots are free, waits for the
current one, uses it, and gives it back after its last step. Chunks that stay take no slot, so while they are used the
ones behind them are already coming. Every backend is driven by this one function.
"""

from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress

from ..engines.base import Value, WeightStore
from ..engines.directory.manifest import Chunk, Step
from ..engines.errors import DeviceFailed, OutOfDeviceMemory


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
