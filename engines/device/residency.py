"""Residency: which chunks stay on the device, and which pass through slots. Pure; nothing here touches a device.

The budget covers everything. What only one graph uses at a time is shared by all of them, as models and steps run one
after another: the activations and the values that go in and out count once, at their largest, and the slots serve
whichever model runs. What an open engine keeps (its context) counts for every graph.

The resident set is fixed. A cache that evicts the least recently used chunk would drop each one just before it comes
round again. Which chunks stay:

- the first of every model, whose copy nothing could hide;
- then the models that compute least per byte, as there a copy is hidden least: the adapter sees one row per image,
  DINOv3 201, SigLIP2 576;
- within a model spread evenly, so that the slots refill while resident chunks compute.
"""

from collections.abc import Collection, Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol, TypeAlias, runtime_checkable

from ...specs import AdapterSpec, Family, Spec
from ..directory.manifest import Chunk
from ..errors import BudgetTooSmall
from .device import aligned

SLOTS = 2
"""One is computed from while the next fills. Deeper queues do not help where the copies are the bottleneck."""
RESERVED_BYTES = 512 << 20
"""Assumed, not measured: what a CUDA context and the libraries' code take on the card before anything is allocated."""
CONTEXT_BYTES = 8 << 20
"""Assumed per engine: its code and constants; plans of these graphs are 1 MiB."""
RESIDENT_FIRST: tuple[Family, ...] = ("adapter", "dinov3", "siglip2")

Place: TypeAlias = tuple[Family, int]
"""A chunk: the model and the index among its chunks."""


@dataclass(frozen=True)
class GraphMemory:
    """Device memory of one graph beside its weights."""

    activation_bytes: int
    """While it runs: intermediate tensors and the kernels' scratch."""
    value_bytes: int
    """Its activation input and its outputs."""
    context_bytes: int
    """As long as its engine is open."""


@dataclass(frozen=True)
class Residency:
    """Where the bytes of a budget go; the parts add up to ``peak_bytes``, which is within the budget."""

    budget_bytes: int
    least_bytes: int
    """The smallest budget that works."""
    resident: Mapping[Family, tuple[int, ...]]
    """Indices of the chunks that stay, ascending."""
    slots: int
    slot_bytes: int
    """Bytes of one slot: the largest chunk that passes through."""
    slots_bytes: int
    """Of all slots; there are more where each kind of chunk has its own."""
    staging_bytes: int
    """Of chunks on their way, where the device holds them twice until they are there."""
    resident_bytes: int
    activation_bytes: int
    value_bytes: int
    context_bytes: int
    reserved_bytes: int
    streamed_bytes: int
    """Bytes copied to the device per pass, once the resident chunks are there."""

    @property
    def parts(self) -> dict[str, int]:
        """``what -> bytes``."""
        return {
            "slots": self.slots_bytes,
            **({"staging": self.staging_bytes} if self.staging_bytes else {}),
            "resident": self.resident_bytes,
            "activations": self.activation_bytes,
            "values": self.value_bytes,
            "contexts": self.context_bytes,
            "reserved": self.reserved_bytes,
        }

    @property
    def weight_bytes(self) -> int:
        """Slots and resident chunks."""
        return self.slots_bytes + self.resident_bytes

    @property
    def peak_bytes(self) -> int:
        return sum(self.parts.values())


@runtime_checkable
class Planned(Protocol):
    """A backend that keeps within a plan."""

    @property
    def residency(self) -> Residency:
        """The plan in force."""
        ...


@runtime_checkable
class Counted(Protocol):
    """A backend that counts what it has of a card."""

    @property
    def peak_bytes(self) -> int:
        """The most at one time."""
        ...


@dataclass(frozen=True)
class Slots:
    """How chunks that do not stay pass through."""

    count: int = SLOTS
    """Chunks on the device for one to be used and the others to come."""
    kinds: Mapping[Place, Hashable] = field(default_factory=dict)
    """Chunks of different kinds share no slot; by default all share them."""
    staged: bool = False
    """Whether the device holds a chunk on its way twice."""

    def bytes_of(self, sizes: Mapping[Place, int], resident: Collection[Place]) -> tuple[int, int]:
        """``(bytes of the slots, bytes of chunks on their way)``.

        Chunks that stay come one at a time when the weights are opened, and what they came through is kept.
        """
        passing = {place: size for place, size in sizes.items() if place not in resident}
        rows: dict[Hashable, list[int]] = {}
        for place, size in passing.items():
            rows.setdefault(self.kinds.get(place), []).append(size)
        held = sum(min(self.count, len(row)) * max(row) for row in rows.values())
        if not self.staged:
            return held, 0
        came = max((sizes[place] for place in resident), default=0)
        return held, max(came, min(self.count, len(passing)) * max(passing.values(), default=0))


def plan_residency(
    chunks: Mapping[Family, Sequence[Chunk]],
    graphs: Mapping[str, GraphMemory],
    budget_bytes: int,
    *,
    slots: Slots | int = SLOTS,
    reserved_bytes: int = RESERVED_BYTES,
    memory: str = "VRAM",
) -> Residency:
    """Fill the budget with resident chunks beside the slots that the others need.

    Args:
        chunks: of each model, in the order of running.
        graphs: memory of every graph of these models, at the largest batch.
        budget_bytes: for all of it.
        slots: how chunks pass through, or how many may be on the device.
        reserved_bytes: gone before anything is allocated.
        memory: how the error calls what the budget is of.

    Raises:
        BudgetTooSmall: not even the smallest plan fits; the error names the budget that does.
    """
    slots = Slots(slots) if isinstance(slots, int) else slots
    sizes = {(family, i): aligned(chunk.nbytes) for family, row in chunks.items() for i, chunk in enumerate(row)}
    activations = max((memory.activation_bytes for memory in graphs.values()), default=0)
    values = max((memory.value_bytes for memory in graphs.values()), default=0)
    contexts = sum(memory.context_bytes for memory in graphs.values())
    fixed = activations + values + contexts + reserved_bytes
    forced = [{place for place, size in sizes.items() if size > largest} for largest in {0, *sizes.values()}]
    least = fixed + min(weight_bytes(sizes, resident, slots) for resident in forced)
    if least > budget_bytes:
        raise BudgetTooSmall(budget_bytes, least, memory)
    order = list(preference(chunks))
    room = budget_bytes - fixed
    plans = [filled(sizes, start, order, slots, room) for start in forced if weight_bytes(sizes, start, slots) <= room]
    resident = max(plans, key=lambda plan: sum(sizes[place] for place in plan))
    passing = {place: size for place, size in sizes.items() if place not in resident}
    slots_bytes, staging_bytes = slots.bytes_of(sizes, resident)
    return Residency(
        budget_bytes=budget_bytes,
        least_bytes=least,
        resident={
            family: tuple(i for i in range(len(row)) if (family, i) in resident) for family, row in chunks.items()
        },
        slots=min(slots.count, len(passing)),
        slot_bytes=max(passing.values(), default=0),
        slots_bytes=slots_bytes,
        staging_bytes=staging_bytes,
        resident_bytes=sum(sizes[place] for place in resident),
        activation_bytes=activations,
        value_bytes=values,
        context_bytes=contexts,
        reserved_bytes=reserved_bytes,
        streamed_bytes=sum(chunks[family][i].nbytes for family, i in sizes if (family, i) not in resident),
    )


def resident_chunks(chunks: Mapping[Family, Sequence[Chunk]], ram_budget_bytes: int) -> dict[Family, frozenset[Chunk]]:
    """The chunks that the CPU keeps mapped between images; the budget is for weights alone.

    One other chunk is mapped while it is used. The next one waits in the page cache, which is the system's memory.

    Raises:
        BudgetTooSmall: the largest chunk does not fit.
    """
    plan = plan_residency(chunks, {}, ram_budget_bytes, slots=1, reserved_bytes=0, memory="RAM")
    return {family: frozenset(chunks[family][index] for index in kept) for family, kept in plan.resident.items()}


def weight_bytes(sizes: Mapping[Place, int], resident: set[Place], slots: Slots) -> int:
    """Device bytes of the weights: resident chunks, and slots for the largest of the others."""
    return sum(sizes[place] for place in resident) + sum(slots.bytes_of(sizes, resident))


def filled(
    sizes: Mapping[Place, int], start: set[Place], order: Sequence[Place], slots: Slots, room_bytes: int
) -> set[Place]:
    """Add chunks to a resident set, in this order, until no other fits."""
    resident = set(start)
    grown = True
    while grown:  # again, as the slots shrink when the last of the largest chunks stays
        grown = False
        for place in order:
            if place not in resident and weight_bytes(sizes, resident | {place}, slots) <= room_bytes:
                resident.add(place)
                grown = True
    return resident


def preference(chunks: Mapping[Family, Sequence[Chunk]]) -> Iterator[Place]:
    """Every chunk, the best to keep first (see the module's text)."""
    rows = [(family, spread(len(chunks[family]))) for family in RESIDENT_FIRST if family in chunks]
    yield from ((family, index) for family, order in rows for index in order[:1])
    yield from ((family, index) for family, order in rows for index in order[1:])


def spread(count: int) -> list[int]:
    """``0 ... count - 1`` in an order whose every beginning is spread evenly: van der Corput's, bits reversed."""
    digits = max(count - 1, 0).bit_length()
    return sorted(range(count), key=lambda index: f"{index:0{digits}b}"[::-1])


def estimated_memory(spec: Spec, images: int) -> dict[str, GraphMemory]:
    """Memory of a model's graphs where no plan says it: every intermediate in float32 and nothing reused in place.

    The attention's scores are counted although fused kernels do not keep them. TensorRT-RTX plans less for the blocks,
    which are the largest: 20 of 45 MB for one of DINOv3 in FP8.
    """
    if isinstance(spec, AdapterSpec):
        rows = {f"adapter.{kind}": [spec.rank * (a + b) for _, a, b in targets] for kind, targets in spec.kinds}
        return {
            graph: GraphMemory(
                4 * images * (2 * sum(outputs) + 2 * len(outputs) * spec.compress + spec.embedding),
                4 * images * (sum(outputs) + spec.embedding),
                CONTEXT_BYTES,
            )
            for graph, outputs in rows.items()
        }
    hidden = 4 * images * spec.tokens * spec.hidden
    pixels = 4 * images * 3 * spec.image_size**2
    scores = 4 * images * spec.heads * spec.tokens**2
    block = 6 * hidden + 12 * images * spec.tokens * spec.intermediate + scores
    return {
        f"{spec.family}.embed": GraphMemory(2 * (hidden + pixels), hidden + pixels, CONTEXT_BYTES),
        f"{spec.family}.block": GraphMemory(block, 2 * hidden, CONTEXT_BYTES),
        f"{spec.family}.head": GraphMemory(block, 2 * hidden, CONTEXT_BYTES),
    }
