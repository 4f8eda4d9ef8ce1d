"""Which chunks of those that come again in every pass are kept in pinned host memory. Pure; nothing here pins anything.

A kept chunk is copied to the card at the link's speed. Any other passes through a ring of pinned buffers, and filling
that runs at the speed of the host's memory, shared by all its readers (benchmarks/fill.py). The copies of kept chunks
give the ring time to fill, so they are spread evenly; the first of every model is among them, as there the ring is
empty. The set is fixed: what is used in a circle is always thrown out just before it comes round again.

Pinned memory is taken from everybody else until it is given back. The ring, and what inputs and results pass through,
are wanted in any case; the cache takes what these leave of half of the memory that is available when the weights are
laid out, and nothing once less than that half is left, whoever took it: several pipelines that open at once share it.

This is about CUDA. Plugin providers such as webgpu take pageable memory and stage it themselves.
"""

from collections import deque
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass

from ....specs import Family
from ...directory.manifest import Chunk, Model
from ...replay.outbox import pinned_for
from ..residency import GraphMemory, Place, spread

SHARE = 2
"""One part in so many of what is available may be pinned."""
PAGE_BYTES = 4096
BUFFERS = 4
PIECE_BYTES = 32 << 20
"""Large enough that a copy runs at the link's speed, small enough that the first one begins at once."""
RING_BYTES = BUFFERS * PIECE_BYTES
VALUE_BYTES = 1 << 20
"""Of a buffer for what goes in; pixels of four pictures are a few MB."""
FILL_GBPS = 10.0
"""At which a ring is filled from a pack in the page cache: a Zen 4 core did 10.1 (``benchmarks/fill.py``)."""


@dataclass(frozen=True)
class HostCache:
    """What is pinned of the host's memory."""

    kept: tuple[Place, ...]
    """Chunks, the most worth keeping first."""
    cache_bytes: int
    """Of kept chunks."""
    ring_bytes: int
    """What the others pass through, and those that stay on the card once."""
    values_bytes: int
    """What inputs and results pass through."""
    streamed_bytes: int
    """Of all chunks that come in every pass."""
    floor_bytes: int
    """Nothing is pinned where less than this would be left available."""


def plan_host_cache(
    chunks: Mapping[Family, Sequence[Chunk]],
    resident: Mapping[Family, Collection[int]],
    available_bytes: int | None,
    ring_bytes: int = RING_BYTES,
    *,
    values_bytes: int,
) -> HostCache:
    """Fill half of the available memory with chunks, beside what is pinned in any case.

    Args:
        chunks: of each model, in the order of running.
        resident: indices of those that stay on the card.
        available_bytes: of the host's memory; None, where the system does not tell, keeps nothing.
        ring_bytes: of the buffers that the others pass through.
        values_bytes: of those that inputs and results pass through, see :func:`values_pinned`.
    """
    rows = [[(family, i) for i in range(len(row)) if i not in resident[family]] for family, row in chunks.items()]
    sizes = {(family, i): pages(chunks[family][i].nbytes) for row in rows for family, i in row}
    available = available_bytes or 0
    room = available // SHARE - ring_bytes - values_bytes
    kept, cache_bytes = [], 0
    for place in preference(rows):
        if cache_bytes + sizes[place] <= room:
            kept.append(place)
            cache_bytes += sizes[place]
    return HostCache(
        kept=tuple(kept),
        cache_bytes=cache_bytes,
        ring_bytes=ring_bytes,
        values_bytes=values_bytes,
        streamed_bytes=sum(chunks[family][i].nbytes for family, i in sizes),
        floor_bytes=available - available // SHARE,
    )


def values_pinned(adapter: Model, graphs: Mapping[str, GraphMemory]) -> int:
    """What inputs and results pass through at most: the factors of all steps of the adapter are fetched together.

    Args:
        adapter: of the manifest; the encoders' one result each is less.
        graphs: memory of every graph, at the largest batch. Each step's input is counted too: at full size it comes to
            196 MiB for four images, of which 164 were pinned over the stand-ins.
    """
    results = (graphs[step.graph].value_bytes for chunk in adapter.chunks for step in chunk.steps)
    return BUFFERS * VALUE_BYTES + pinned_for(results)


def preference(rows: Sequence[Sequence[Place]]) -> Iterator[Place]:
    """The chunks of these models that pass through, the most worth keeping first."""
    yield from (row[0] for row in rows if row)
    others = [place for row in rows for place in row[1:]]
    yield from (others[index] for index in spread(len(others)))


def pages(nbytes: int) -> int:
    """Rounded up to whole pages."""
    return -(-nbytes // PAGE_BYTES) * PAGE_BYTES


def link_share(
    chunks: Mapping[Family, Sequence[Chunk]],
    resident: Mapping[Family, Collection[int]],
    kept: Collection[Place],
    *,
    link_gbps: float,
    fill_gbps: float,
) -> float:
    """The part of the link's speed that a pass over the streamed chunks reaches, 0 to 1; 1 if there are none.

    A model: pieces are copied one after another at the link's rate; a piece of a chunk that is not kept is filled
    before, one after another, into the buffer of the ring that was copied longest ago. Not in it: computing, which
    only lets the ring fill; reading from the disk; copies that slow the filling down, as both read the same memory.

    Args:
        chunks: of each model, in the order of running.
        resident: indices of those that stay on the card.
        kept: what is in the cache, and filled.
        link_gbps: of copies from pinned memory, 10^9 bytes per second.
        fill_gbps: at which a ring is filled.
    """
    filled = copied = 0.0
    streamed = 0
    freed = deque([0.0] * BUFFERS)
    for family, row in chunks.items():
        for index in sorted(set(range(len(row))) - set(resident[family])):
            streamed += row[index].nbytes
            for offset in range(0, row[index].nbytes, PIECE_BYTES):
                piece = min(PIECE_BYTES, row[index].nbytes - offset) / 1e9
                if (family, index) in kept:
                    copied += piece / link_gbps
                    continue
                filled = max(filled, freed.popleft()) + piece / fill_gbps
                copied = max(copied, filled) + piece / link_gbps
                freed.append(copied)
    return streamed / 1e9 / link_gbps / copied if streamed else 1.0
