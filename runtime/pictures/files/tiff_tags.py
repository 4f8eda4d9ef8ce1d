"""What a TIFF file says of its greys, read from its first directory, as Pillow leaves some of it out.

Pillow takes 16-bit WhiteIsZero for the negative in files of one byte order, and knows none in the other; and it gives
12-bit greys as they are, a sixteenth of their brightness.
"""

import struct
from dataclasses import dataclass
from typing import IO

from .splicing import size_of, spliced

SUBFILE, BITS, PHOTOMETRIC, SAMPLES, SUB_DIRECTORIES, FORMAT = 254, 258, 262, 277, 330, 339
TYPES = {1: "B", 3: "H", 4: "L", 16: "Q"}
"""Of the numbers that are looked at, by the number of their type."""


@dataclass(frozen=True)
class Greys:
    """How a file's values become brightness."""

    negative: bool = False
    """The highest value is black; Pillow was told that it is white."""
    bits: int = 16
    """Of a deep grey."""
    preview: bool = False
    """The first picture is a small one of another, as in raw files of cameras."""


def read_greys(file: IO[bytes]) -> tuple[IO[bytes], Greys]:
    """The file as Pillow shall see it, and what has to be done with its deep greys afterwards.

    Raises:
        struct.error: the directory is cut.
    """
    nbytes = size_of(file)
    tags = _first_directory(file)
    file.seek(0)
    bits = tags.get(BITS, (0, 1))[1]
    preview = bool(tags.get(SUBFILE, (0, 0))[1] & 1) and SUB_DIRECTORIES in tags
    if tags.get(SAMPLES, (0, 1))[1] != 1 or bits not in {12, 16} or tags.get(FORMAT, (0, 1))[1] != 1:
        return file, Greys(preview=preview)
    place, photometric = tags.get(PHOTOMETRIC, (0, 1))
    if photometric != 0 or not place:
        return file, Greys(bits=bits, preview=preview)
    order = _order(file)
    black_is_zero = struct.pack(f"{order}H", 1)
    pieces = ((0, place), black_is_zero, (place + 2, nbytes - place - 2))
    return spliced(file, pieces), Greys(negative=True, bits=bits, preview=preview)


def _order(file: IO[bytes]) -> str:
    file.seek(0)
    order = "<" if file.read(2) == b"II" else ">"
    file.seek(0)
    return order


def _first_directory(file: IO[bytes]) -> dict[int, tuple[int, int]]:
    """``tag -> (where its first number stands, the number)`` of the tags that hold whole numbers."""
    order = _order(file)
    head = file.read(16)
    (version,) = struct.unpack(f"{order}H", head[2:4])
    big = version == 43
    (at,) = struct.unpack(f"{order}{'Q' if big else 'L'}", head[8:16] if big else head[4:8])
    counter, entry, inside = ("Q", 20, 8) if big else ("H", 12, 4)
    file.seek(at)
    (count,) = struct.unpack(f"{order}{counter}", file.read(struct.calcsize(counter if big else "H")))
    at += 8 if big else 2
    table = file.read(entry * min(count, 4096))
    found = {}
    for index in range(len(table) // entry):
        place = at + index * entry
        tag, kind = struct.unpack(f"{order}HH", table[index * entry : index * entry + 4])
        (number,) = struct.unpack(f"{order}{'Q' if big else 'L'}", table[index * entry + 4 :][: 8 if big else 4])
        if kind not in TYPES:
            continue
        value = place + (12 if big else 8)
        width = struct.calcsize(f"{order}{TYPES[kind]}")
        if number * width > inside:
            raw = table[index * entry + (12 if big else 8) :][:inside]
            (value,) = struct.unpack(f"{order}{'Q' if big else 'L'}", raw)
        file.seek(value)
        raw = file.read(width)
        if len(raw) == width:
            found[tag] = (value, int(struct.unpack(f"{order}{TYPES[kind]}", raw)[0]))
    return found
