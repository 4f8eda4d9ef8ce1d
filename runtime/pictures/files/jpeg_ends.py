"""JPEG files whose end marker is missing: is every pixel there all the same?

libjpeg fills what is missing with grey and says nothing that reaches Python. But what lies behind the last pixel cannot
change it: so the file is decoded with several ends, and if the pictures differ, something is missing. In a
progressive file whole scans may be missing, which changes nothing behind them: so its scans must reach every bit.
"""

import hashlib
import struct
from collections.abc import Callable, Iterator
from typing import IO

from PIL import Image

from .splicing import Piece, size_of, spliced

END = b"\xff\xd9"
ENDS = (END, b"\x00" * 64 + END, b"\x55" * 64 + END, b"\xaa" * 64 + END)
BAND_ROWS = 256
"""Rows that are compared at once."""
PADDING = 4
"""So many zeros at the end are what a program left that had reserved the room; pixels do not end like that."""
TAIL = 64 << 10
BAREHEADED = frozenset({0x01, *range(0xD0, 0xD9)})
"""Markers without a length."""
PROGRESSIVE = frozenset({0xC2, 0xC6, 0xCA, 0xCE})


def is_padded(file: IO[bytes]) -> bool:
    """Does the file end in reserved room, with no end marker before it? libjpeg would take the zeros for pixels."""
    nbytes = size_of(file)
    length = _without_padding(file, nbytes)
    file.seek(max(0, length - 2))
    padded = length < nbytes - 1 and file.read(2) != END
    file.seek(0)
    return padded


def with_an_end(file: IO[bytes], opened: Callable[[IO[bytes]], Image.Image]) -> IO[bytes] | None:
    """The file with its end marker, None if pixels are missing.

    Args:
        file: a JPEG file that Pillow calls truncated.
        opened: opens it.

    Raises:
        OSError, SyntaxError, ValueError: it is damaged besides.
    """
    length = _without_padding(file, size_of(file))
    if not _scans_are_complete(file, length):
        return None
    seen = set()
    for end in ENDS:
        with opened(_ended(file, length, end)) as image:
            image.load()
            seen.add(_digest(image))
        if len(seen) > 1:
            return None
    return _ended(file, length, END)


def _digest(image: Image.Image) -> bytes:
    digest = hashlib.sha256()
    for top in range(0, image.height, BAND_ROWS):
        digest.update(image.crop((0, top, image.width, min(top + BAND_ROWS, image.height))).tobytes())
    return digest.digest()


def _ended(file: IO[bytes], length: int, end: bytes) -> IO[bytes]:
    pieces: list[Piece] = [(0, length), end]
    return spliced(file, pieces)


def _without_padding(file: IO[bytes], nbytes: int) -> int:
    """Bytes of the file without zeros at its end, and without half a marker."""
    end = nbytes
    while end:
        start = max(0, end - TAIL)
        file.seek(start)
        tail = file.read(end - start)
        kept = tail.rstrip(b"\0")
        end = start + len(kept)
        if kept:
            break
    if nbytes - end < PADDING:
        end = nbytes
    file.seek(max(0, end - 1))
    return end - 1 if file.read(1) == b"\xff" else end


def _scans_are_complete(file: IO[bytes], length: int) -> bool:
    """Do the scans give every component, and in a progressive file every bit of it?"""
    file.seek(0)
    data = file.read(length)
    missing: dict[tuple[int, int], int] = {}
    progressive = False
    scans = 0
    for marker, body in _segments(data):
        if marker in PROGRESSIVE or marker in {0xC0, 0xC1}:
            progressive = marker in PROGRESSIVE
            components = [body[6 + 3 * index] for index in range(body[5])]
            missing = {(component, index): 14 for component in components for index in range(64)}
        elif marker == 0xDA:
            scans += 1
            count = body[0]
            first, last, bits = body[1 + 2 * count : 4 + 2 * count]
            for component in body[1 : 1 + 2 * count : 2]:
                for index in range(first, last + 1):
                    missing[component, index] = bits & 15 if progressive else 0
    return bool(scans) and not any(missing.values())


def _segments(data: bytes) -> Iterator[tuple[int, bytes]]:
    """``(marker, body)`` of every whole segment; pixels in between are passed over."""
    at = 2
    while (at := data.find(b"\xff", at)) >= 0 and at + 4 <= len(data):
        marker = data[at + 1]
        if marker in {0x00, 0xFF} or marker in BAREHEADED:
            at += 1 if marker == 0xFF else 2
            continue
        if marker == END[1]:
            return
        (size,) = struct.unpack(">H", data[at + 2 : at + 4])
        if at + 2 + size > len(data):
            return
        yield marker, data[at + 4 : at + 2 + size]
        at += 2 + size
