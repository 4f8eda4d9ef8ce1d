"""What a backend is: engines that run a graph, and a store that hands out a pack's weights; found, and opened.

``Value`` is a tensor where the backend computes: an ``OrtValue`` for onnxruntime. The runtime passes values from engine
to engine without looking inside; only pixels go in and embeddings and factors come out as arrays.
"""

from collections.abc import Callable, Mapping
from collections.abc import Set as AbstractSet
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, Protocol, TypeAlias

import numpy as np
from numpy.typing import NDArray

from ..machine.progress import Report, silent
from ..specs import Family
from .directory.manifest import Chunk, Manifest, Step
from .errors import OutOfDeviceMemory

Value: TypeAlias = Any
Array: TypeAlias = NDArray[np.float32]
Arithmetic: TypeAlias = Literal["float32", "bfloat16", "float8", "int8"]
"""What the operands of products are rounded to; sums are float32 or exact."""
MARGIN_BYTES = 2 << 30
"""What ``auto`` leaves free for other programs and the desktop."""


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
    def abreast(self) -> int:
        """How many chunks may be used at a time, each by a thread, where their steps need nothing of each other."""
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
    fingerprint: str
    """Which files the packs are, see :func:`.directory.integrity.fingerprint`: embeddings are kept for these alone."""

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

    def later(self, values: Mapping[str, Value]) -> Callable[[], dict[str, Array]]:
        """An engine's outputs as arrays, asked for now and taken by calling this, before the next :meth:`value`."""
        ...

    def shrink(self, cause: OutOfDeviceMemory) -> None:
        """Make do with less memory; raises ``cause`` if there is no smaller way."""
        ...

    def close(self) -> None:
        """Give everything back."""
        ...


class HasMemory(Protocol):
    """What a budget needs to know of a device."""

    name: str

    def free_bytes(self) -> int:
        """Bytes that an allocation could get now."""
        ...


@dataclass(frozen=True)
class VramBudget:
    """What a backend may take of a card."""

    budget_bytes: int | None = None
    """For everything; None takes what is free, less the margin."""
    margin_bytes: int = MARGIN_BYTES

    def on(self, device: HasMemory, taken_bytes: int = 0) -> int:
        """The budget on a device, of which opening it has taken so much, that is not free any more.

        Raises:
            OutOfDeviceMemory: no more than the margin is free.
        """
        if self.budget_bytes is not None:
            return self.budget_bytes
        free = device.free_bytes()
        if free <= self.margin_bytes:
            raise OutOfDeviceMemory(device.name, self.margin_bytes, free)
        return free + taken_bytes - self.margin_bytes


@dataclass(frozen=True)
class Limits:
    """What the caller of a backend allows; each backend takes what concerns it."""

    images: int
    """The most that share a pass."""
    threads: int | None = None
    """That compute on the CPU; by default one for each core."""
    ram_budget_bytes: int | None = None
    """For weights that stay in the CPU's memory."""
    vram: VramBudget = VramBudget()
    """For everything on a GPU."""
    device: str | None = None
    """Which card, as its backend names or counts them; None leaves the choice to the backend."""
    form: str | None = None
    """Which of the offer's ``forms`` of graphs; None takes the first."""
    report: Report = silent
    """Told of work that the first opening does once."""
    before_card: "Callable[[CardFacts], None]" = lambda _: None
    """Called with a card before anything is taken of it, to prove it or to open there."""


@dataclass(frozen=True)
class Opened:
    """An engines directory opened on a backend."""

    backend: Backend
    manifest: Manifest
    """Of the engines that were opened; those for a GPU may lie in an engines directory inside the other."""
    running: Manifest
    """Of the packs that are read: the same, except that the cpu backend reads the int8 form of fp8 engines."""
    engines: Path | None = None
    """The engines directory of those packs, if it lies inside the one that was opened."""


@dataclass(frozen=True)
class CardFacts:
    """What a proof of a backend holds for: another card, driver or library must prove itself anew."""

    name: str
    driver: str = ""
    """Its version, as far as the backend can ask for it."""
    libraries: Mapping[str, str] = field(default_factory=dict)
    """``package -> version`` of what computes there."""
    software: bool = False
    """A renderer on the CPU: ``auto`` never takes it."""


@dataclass(frozen=True)
class BackendStatus:
    """What was found out about a backend."""

    name: str
    works: bool
    reason: str
    remedy: str = ""
    """What to install or change; empty if it works."""
    cards: tuple[CardFacts, ...] = ()
    """What it could compute on, the one that it takes by itself first; none for the CPU or where it does not work."""


@dataclass(frozen=True)
class Offer:
    """What a backend's room gives to the registry, as ``OFFER``."""

    find: Callable[[], BackendStatus]
    """Does it work on this machine?"""
    open: Callable[[Path, Manifest, Limits], Opened]
    """Open an engines directory, whose manifest this is and whose files were checked."""
    forms: tuple[str, ...] = ()
    """Names of the graphs' forms that it can run, the safest first; none where there is only one."""
    card: Callable[[str | None], CardFacts | None] | None = None
    """The card that a name or number (:attr:`Limits.device`) stands for, or the one taken without; None: by the cards
    of the status."""
    arithmetic: Mapping[str, Arithmetic] = field(default_factory=dict)
    """``precision of the packs that run -> its products' operands``; float32 where it does not say."""
