"""PNG files without what is no picture: text, times and profiles may be as long or as damaged as they like.

ComfyUI and others keep whole workflows in a PNG. Pillow refuses a file whose texts unpack to more than a MiB, or whose
time has a wrong checksum, though every pixel is there. So only what makes the picture reaches Pillow, as it stands:
the critical chunks and the transparent colour, which stay strict. The orientation is kept where it is whole, and the
colour profile is unpacked here, within a limit of its own.
"""

import struct
import zlib
from collections.abc import Iterator
from typing import IO

from .splicing import Piece, size_of, spliced

SIGNATURE = b"\x89PNG\r\n\x1a\n"
PICTURE = frozenset({b"IHDR", b"PLTE", b"IDAT", b"IEND", b"tRNS"})
"""What Pillow gets whether its checksum is right or not."""
TURNING = (
    (b"eXIf", b""),
    (b"tEXt", b"Raw profile type "),
    (b"zTXt", b"Raw profile type "),
    (b"iTXt", b"XML:com.adobe"),
)
"""Where a picture's orientation may stand: ``(kind of chunk, what it begins with)``."""
MAX_TURNING = 1 << 16
"""Bytes of such a chunk, packed, and 16 times as many unpacked."""
MAX_PROFILE = 16 << 20
"""Bytes of a profile, unpacked. The largest in use, of printing machines, have under 4 MiB."""


def picture_chunks(file: IO[bytes]) -> tuple[IO[bytes], bytes | None]:
    """The file as Pillow shall see it, and its colour profile.

    Returns:
        The profile is None if there is none, and empty if it is damaged or longer than :data:`MAX_PROFILE`.
    """
    pieces: list[Piece] = [SIGNATURE]
    profile: bytes | None = None
    for kind, start, length in _chunks(file, size_of(file)):
        if kind in PICTURE or not kind[:1].islower():
            pieces.append((start - 8, length + 12))
        elif kind == b"iCCP" and profile is None:
            profile = _profile(_whole(file, kind, start, length, MAX_PROFILE))
        elif any(kind == turning for turning, _ in TURNING):
            data = _whole(file, kind, start, length, MAX_TURNING)
            if data is not None and _turns(kind, data):
                pieces.append((start - 8, length + 12))
    return spliced(file, pieces), profile


def _chunks(file: IO[bytes], nbytes: int) -> Iterator[tuple[bytes, int, int]]:
    """``(kind, first byte of the data, bytes)`` up to the end, of the file or of the picture."""
    at = len(SIGNATURE)
    kind = b""
    while at + 8 <= nbytes and kind != b"IEND":
        file.seek(at)
        length, kind = struct.unpack(">I4s", file.read(8))
        yield kind, at + 8, length
        at += length + 12


def _whole(file: IO[bytes], kind: bytes, start: int, length: int, limit: int) -> bytes | None:
    """The data of a chunk, None if it is too long, cut or damaged."""
    if length > limit:
        return None
    file.seek(start)
    data, checksum = file.read(length), file.read(4)
    return data if checksum == struct.pack(">I", zlib.crc32(data, zlib.crc32(kind))) else None


def _profile(data: bytes | None) -> bytes:
    _, _, packed = (data or b"").partition(b"\0")
    return _unpacked(packed[1:], MAX_PROFILE) or b""  # the first byte says how it is packed: there is one way


def _turns(kind: bytes, data: bytes) -> bool:
    """May a chunk hold the orientation, and is it harmless?"""
    if not any(kind == turning and data.startswith(begins) for turning, begins in TURNING):
        return False
    _, _, rest = data.partition(b"\0")
    if kind == b"zTXt":
        return _unpacked(rest[1:], 16 * MAX_TURNING) is not None
    return kind != b"iTXt" or rest[:1] == b"\0"  # a packed one is not looked into


def _unpacked(packed: bytes, limit: int) -> bytes | None:
    """None if it is damaged or longer than the limit."""
    unpacker = zlib.decompressobj()
    try:
        data = unpacker.decompress(packed, limit)
    except zlib.error:
        return None
    return data if unpacker.eof else None
