"""What a backend is: engines that run a graph, and a store that hands out a pack's weights.

``Value`` is a tensor where the backend computes: an ``OrtValue`` for onnxruntime. The runtime passes values from engine
to engine without looking inside; only pixels go in and embeddings and factors come out as arrays.
"""

from collections.abc import Mapping
from collections.abc import Set as AbstractSet
from typing import Any, Protocol, TypeAlias

import numpy as np
from numpy.typing import NDArray

from ..specs import Family
from .directory.manifest import Chunk, Step
from .errors import OutOfDeviceMemory

Value: TypeAlias = Any
Array: TypeAlias = NDArray[np.float32]


class Engine(Protocol):
    """A graph made runnable."""

    activation: str
    """Name of the one input that is not a weight."""

    def run(self, activation: Value, weights: Mapping[str, Value]) -> dict[str, Value]:
        """Run the graph; the outputs by name.

        They are good while the next graph reads them. On a device a later run may write over them: what is to stay is
        taken as an array before.
        """
        ...


class WeightStore(Protocol):
    """A pack whose chunks come and go."""

    @property
    def slots(self) -> int:
        """How many chunks that do not stay may be held at a time: one in use, the others on their way."""
        ...

    @property
    def resident(self) -> AbstractSet[Chunk]:
        """Chunks that stay once they came; they take no slot."""
        ...

    def prefetch(self, chunk: Chunk) -> None:
        """Begin to bring a chunk in; returns at once."""
        ...

    def acquire(self, chunk: Chunk) -> None:
        """Wait until a prefetched chunk is there."""
        ...

    def weights(self, step: Step) -> Mapping[str, Value]:
        """``graph input -> value`` of a step whose chunk was acquired."""
        ...

    def release(self, chunk: Chunk) -> None:
        """The chunk's memory may be given back."""
        ...


class Backend(Protocol):
    """Where the computing happens."""

    name: str

    def engine(self, graph: str) -> Engine:
        """The engine of a graph, made at the first call."""
        ...

    def store(self, family: Family) -> WeightStore:
        """The weights of a model."""
        ...

    def value(self, array: Array) -> Value:
        """An array as the backend's value."""
        ...

    def array(self, value: Value) -> Array:
        """A value as an array."""
        ...

    def shrink(self, cause: OutOfDeviceMemory) -> None:
        """Make do with less memory; raises ``cause`` if there is no smaller way."""
        ...

    def close(self) -> None:
        """Give everything back."""
        ...
