"""Pinned host memory that results are copied to while the device goes on computing.

A pass asks for its pieces in the same order and sizes each time, and gets the same addresses: so a recorded pass copies
to where the host will look. Blocks are never moved and are kept, as pinning takes milliseconds.
"""

from collections.abc import Callable

BLOCK_BYTES = 16 << 20
"""The adapter's factors are 40 MB an image."""
ALIGN = 256


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
        self._block = self._offset = 0

    def take(self, nbytes: int) -> int:
        """The address of the next piece, good until the pieces begin anew."""
        while self._block < len(self._blocks):
            address, size = self._blocks[self._block]
            if self._offset + nbytes <= size:
                start = address + self._offset
                self._offset += -(-nbytes // ALIGN) * ALIGN
                return start
            self._block, self._offset = self._block + 1, 0
        size = max(nbytes, BLOCK_BYTES)
        self._blocks.append((self._pin(size), size))
        return self.take(nbytes)

    def begin(self) -> None:
        """From the first piece again."""
        self._block = self._offset = 0

    def close(self) -> None:
        """Give all blocks back."""
        self.begin()
        while self._blocks:
            self._unpin(self._blocks.pop()[0])
