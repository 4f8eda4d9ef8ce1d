"""The size of a JPEG XL picture, from its first bytes: its plugin decodes a file whole before it tells one.

A file is a codestream, or boxes as in MP4 with the codestream in one (``jxlc``) or in several (``jxlp``). A codestream
begins with two marker bytes and a size header whose bits are read from the lowest of each byte up (ISO/IEC 18181-1,
"SizeHeader").
"""

from typing import IO

JXL_MARKER = b"\xff\x0a"
HEADER_BYTES = 16
"""More than a size header can have: 2 bytes of marker and at most 68 bits."""
WIDTHS = ((1, 1), (12, 10), (4, 3), (3, 2), (16, 9), (5, 4), (2, 1))
"""Width over height, where the header names a ratio instead of a width."""
LENGTHS = (9, 13, 18, 30)
"""Bits of a side's length, by the two bits before it."""


def jxl_size(file: IO[bytes]) -> tuple[int, int] | None:
    """``(width, height)`` before any rotation; None where the file is too short or oddly put together to tell."""
    file.seek(0)
    start = file.read(HEADER_BYTES)
    codestream = start if start.startswith(JXL_MARKER) else _codestream_in_boxes(file)
    if not codestream.startswith(JXL_MARKER) or len(codestream) < HEADER_BYTES:
        return None
    return _parsed(int.from_bytes(codestream[2:], "little"))


def _parsed(bits: int) -> tuple[int, int]:
    def take(count: int) -> int:
        nonlocal bits
        value = bits & ((1 << count) - 1)
        bits >>= count
        return value

    in_eighths = take(1)

    def side() -> int:
        return 8 * (take(5) + 1) if in_eighths else take(LENGTHS[take(2)]) + 1

    height = side()
    if ratio := take(3):
        numerator, denominator = WIDTHS[ratio - 1]
        return height * numerator // denominator, height
    return side(), height


def _codestream_in_boxes(file: IO[bytes]) -> bytes:
    """The first bytes of the codestream in a container; parts of several boxes joined."""
    found, at = b"", 0
    while len(found) < HEADER_BYTES:
        file.seek(at)
        head = file.read(16)
        if len(head) < 8:
            break
        size, kind, body = int.from_bytes(head[:4], "big"), head[4:8], 8
        if size == 1:
            size, body = int.from_bytes(head[8:16], "big"), 16
        if kind in (b"jxlc", b"jxlp"):
            begin = at + body + 4 * (kind == b"jxlp")  # a part's number comes first
            file.seek(begin)
            held = HEADER_BYTES if size == 0 else max(0, at + size - begin)
            found += file.read(min(HEADER_BYTES, held))
        if size == 0 or size < body:  # it reaches to the end, or is no box
            break
        at += size
    return found[:HEADER_BYTES]
