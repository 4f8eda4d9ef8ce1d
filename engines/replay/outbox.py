"""Pinned host memory that results are copied to while the device goes on computing, and what becomes of them there.

A pass asks for its pieces in the same order and sizes each time, and gets the same addresses: so a recorded pass copies
to where the host will look. Blocks are never moved and are kept, as pinning takes milliseconds.

What was copied is copied once more, as the next pass writes there: into a home of the block's size. New memory costs
ten times the copy, page by page (40 MB: 36 ms in 476 arrays, 9 ms in one, 4 ms where it was used before; AMD Zen 4,
busy). So a home is used again once nobody holds an array in it.

Each piece is looked through for values that are no numbers right behind its copy, all arrays in it at once, while the
processor's cache still holds it. What lies between them is looked at too: so a piece may seem to have some, never none.
"""

import ctypes
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from ..base import Array

BLOCK_BYTES = 16 << 20
"""The adapter's factors are 40 MB an image."""
ALIGN = 256


def references(homes: Sequence[NDArray[np.uint8] | None], index: int) -> int:
    """How often a home is referred to, by its list and by this counting too; an array in it adds one."""
    return sys.getrefcount(homes[index])


HELD_HERE = references([np.empty(0, np.uint8)], 0)
"""Where nobody else holds it. Counted, not assumed: what counting adds is Python's and differs between versions."""


@dataclass(frozen=True)
class Piece:
    """Pinned memory for one copy."""

    address: int
    nbytes: int
    block: int
    offset: int
    """In its block."""


class Outputs(dict[str, Array]):
    """An engine's outputs that were looked through for values that are no numbers."""

    finite = False
    """There are none; otherwise there may be."""


class Outbox:
    """Gives out pinned memory, piece behind piece.

    Args:
        pin: ``bytes -> address``; raises where no more can be pinned.
        unpin: gives a block back.
    """

    def __init__(self, pin: Callable[[int], int], unpin: Callable[[int], None]) -> None:
        self._pin, self._unpin = pin, unpin
        self._blocks: list[tuple[int, int]] = []
        """``(address, bytes)``"""
        self._homes: list[NDArray[np.uint8] | None] = []
        self._block = self._offset = 0

    def take(self, nbytes: int) -> Piece:
        """The next piece, good until :meth:`begin`."""
        while self._block < len(self._blocks):
            address, size = self._blocks[self._block]
            if self._offset + nbytes <= size:
                piece = Piece(address + self._offset, nbytes, self._block, self._offset)
                self._offset += -(-nbytes // ALIGN) * ALIGN
                return piece
            self._block, self._offset = self._block + 1, 0
        size = max(nbytes, BLOCK_BYTES)
        self._blocks.append((self._pin(size), size))
        self._homes.append(None)
        return self.take(nbytes)

    def copied(self, piece: Piece, places: Mapping[str, tuple[int, Sequence[int]]]) -> Outputs:
        """The float32 arrays of a piece, to keep; ``places``: where in it each begins, in bytes, and its shape."""
        home = self._homes[piece.block]
        if home is None:
            home = self._homes[piece.block] = np.empty(self._blocks[piece.block][1], np.uint8)
        start, end = piece.offset, piece.offset + piece.nbytes
        ctypes.memmove(home.ctypes.data + start, piece.address, piece.nbytes)
        outputs = Outputs(
            (name, np.ndarray(shape, np.float32, home, start + at)) for name, (at, shape) in places.items()
        )
        outputs.finite = bool(np.isfinite(home[start:end].view(np.float32)).all())
        return outputs

    def begin(self) -> None:
        """From the first piece again."""
        self._block = self._offset = 0
        for index in range(len(self._homes)):
            if references(self._homes, index) > HELD_HERE:
                self._homes[index] = None

    def close(self) -> None:
        """Give all blocks back."""
        self._block = self._offset = 0
        self._homes.clear()
        while self._blocks:
            self._unpin(self._blocks.pop()[0])


def pinned_for(sizes: Iterable[int]) -> int:
    """The bytes of the blocks that pieces of these sizes, taken one after another, will lie in."""
    blocks: list[int] = []

    def count(nbytes: int) -> int:
        blocks.append(nbytes)
        return 0

    outbox = Outbox(count, lambda _: None)
    for nbytes in sizes:
        outbox.take(nbytes)
    return sum(blocks)
