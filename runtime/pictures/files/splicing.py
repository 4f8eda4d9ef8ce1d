"""Files read as if some bytes were others: without chunks that are no picture, with an end that is missing.

Nothing is copied: the pieces name ranges of the file, and bytes that stand in between.
"""

import io
from collections.abc import Sequence
from typing import IO, Any, TypeAlias

Piece: TypeAlias = tuple[int, int] | bytes
"""``(first byte, number of bytes)`` of the file, or bytes of its own."""


class SplicedFile(io.RawIOBase):
    """Pieces one after another, as one file."""

    def __init__(self, file: IO[bytes], pieces: Sequence[Piece]) -> None:
        super().__init__()
        self._file = file
        self._pieces: list[tuple[int, Piece]] = []
        self._end = self._at = 0
        for piece in pieces:
            self._pieces.append((self._end, piece))
            self._end += len(piece) if isinstance(piece, bytes) else piece[1]

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET, /) -> int:
        self._at = max(0, offset + {io.SEEK_SET: 0, io.SEEK_CUR: self._at, io.SEEK_END: self._end}[whence])
        return self._at

    def readinto(self, buffer: Any, /) -> int:
        view = memoryview(buffer).cast("B")
        done = 0
        for start, piece in self._pieces:
            length = len(piece) if isinstance(piece, bytes) else piece[1]
            inside = self._at - start
            if not 0 <= inside < length or done == len(view):
                continue
            count = min(length - inside, len(view) - done)
            if isinstance(piece, bytes):
                data = piece[inside : inside + count]
            else:
                self._file.seek(piece[0] + inside)
                data = self._file.read(count)
            view[done : done + len(data)] = data
            done += len(data)
            self._at += len(data)
            if len(data) < count:
                break
        return done


def spliced(file: IO[bytes], pieces: Sequence[Piece]) -> IO[bytes]:
    """A file of these pieces, buffered."""
    return io.BufferedReader(SplicedFile(file, pieces), 1 << 16)


def size_of(file: IO[bytes]) -> int:
    """Bytes of an open file, which then stands at its beginning."""
    size = file.seek(0, io.SEEK_END)
    file.seek(0)
    return size
