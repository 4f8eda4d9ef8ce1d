"""The streamer: a model's chunks pass through, the next one always on its way.

It knows nothing of files or devices: it asks the store to bring the next chunk in, waits for the current one, uses it,
and gives it back after its last step. Every backend is driven by this one function.
"""

from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from itertools import islice

from ..engines.base import Value, WeightStore
from ..engines.manifest import Chunk, Step


def stream(store: WeightStore, chunks: Sequence[Chunk]) -> Iterator[tuple[Step, Mapping[str, Value]]]:
    """Yield every step of ``chunks`` in order with its weights, valid until the next step is asked for."""
    held: deque[Chunk] = deque()  # the current chunk and the next one
    ahead = iter(chunks)
    try:
        for chunk in chunks:
            for coming in islice(ahead, 2 - len(held)):
                store.prefetch(coming)
                held.append(coming)
            store.acquire(chunk)
            for step in chunk.steps:
                yield step, store.weights(step)
            store.release(held.popleft())
    finally:
        for chunk in held:
            store.release(chunk)
