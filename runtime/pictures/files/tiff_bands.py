"""Huge TIFF files, shrunk band by band: a band is some rows of strips or tiles, as a small TIFF file of its own.

A strip or a tile is compressed by itself, whatever the compression. So its bytes with the tags that say how to read
them are a file that Pillow decodes like any other, and nothing of the rest is in memory.
"""

import io
import itertools
import math
import struct
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from PIL import ExifTags, Image, TiffImagePlugin

WIDTH, HEIGHT, COMPRESSION, PLANAR = 256, 257, 259, 284
ROWS_PER_STRIP, TILE_WIDTH, TILE_HEIGHT = 278, 322, 323
PLACES: Mapping[bool, tuple[int, int]] = {False: (273, 279), True: (324, 325)}
"""``is it in tiles -> (tag of the offsets, tag of the byte counts)``."""
COPIED = (
    *(WIDTH, 258, COMPRESSION, 262, 266, 277, PLANAR, 317, 320, TILE_WIDTH, TILE_HEIGHT, 332, 338, 339, 347),
    *(529, 530, 531, 532),
)
"""Tags that say what the bytes of a strip or tile mean."""
RAW, LONG = 1, 4
BAND_ROWS = 64
"""Rows of the shrunk picture that a band gives, where the pieces allow so few."""
AVERAGED = {"1": "L", "P": "RGB", "I;16": "I", "I;16B": "I", "I;16L": "I"}
"""The mode that pixels are averaged in, where it is not their own."""


@dataclass(frozen=True)
class Rows:
    """Strips, or rows of tiles, that lie above each other."""

    height: int
    """Of each, the last one may be lower."""
    pieces: tuple[tuple[tuple[int, int], ...], ...]
    """``(offset, bytes)`` of the pieces of each."""
    tiled: bool


def shrunk_by_bands(image: TiffImagePlugin.TiffImageFile, most: int, limit_bytes: int) -> Image.Image | None:
    """The picture with both sides divided by a whole number, rounded up; None where its pieces do not allow it.

    Args:
        image: opened, not loaded.
        most: the largest number to divide by.
        limit_bytes: for the pixels of a band, 4 bytes each.
    """
    rows = _rows(image)
    most_rows = limit_bytes // (4 * image.width)
    factors = (f for f in range(most, 1, -1) if rows and math.lcm(rows.height, f) <= most_rows)
    factor = next(factors, None)  # so many rows end on a whole piece and on a whole row of the shrunk picture
    if rows is None or factor is None:
        return None
    least = math.lcm(rows.height, factor)
    step = least // rows.height * max(1, min(BAND_ROWS * factor, most_rows) // least)
    mode = AVERAGED.get(image.mode, image.mode)
    small = Image.new(mode, (-(-image.width // factor), -(-image.height // factor)))
    for first in range(0, len(rows.pieces), step):
        top = first * rows.height
        height = min(step * rows.height, image.height - top)
        with Image.open(io.BytesIO(_file(image, rows, first, first + step, height)), formats=["TIFF"]) as band:
            small.paste(band.convert(mode).reduce(factor), (0, top // factor))
    small.info = {key: value for key, value in image.info.items() if key != "exif"}
    if (turn := image.getexif().get(ExifTags.Base.Orientation)) is not None:
        small.getexif()[ExifTags.Base.Orientation] = turn
    return small


def _rows(image: TiffImagePlugin.TiffImageFile) -> Rows | None:
    """Where the pieces are; None for separate planes, or a file that contradicts itself."""
    tags = image.tag_v2
    tiled = TILE_WIDTH in tags
    offsets, counts = (tuple(tags.get(tag, ())) for tag in PLACES[tiled])
    height = min(tags.get(TILE_HEIGHT if tiled else ROWS_PER_STRIP, image.height), image.height)
    across = -(-image.width // tags[TILE_WIDTH]) if tiled else 1
    planes = tags.get(PLANAR, 1) != 1 and len(image.getbands()) > 1
    if planes or height < 1 or len(offsets) != len(counts) or len(offsets) != across * -(-image.height // height):
        return None
    pieces = tuple(zip(offsets, counts, strict=True))
    row_bytes, rest = divmod(sum(counts), image.height)
    follow = all(at + size == after for (at, size), (after, _) in itertools.pairwise(pieces))
    if not tiled and tags.get(COMPRESSION, RAW) == RAW and follow and not rest:  # every row is a piece
        return Rows(1, tuple(((offsets[0] + row * row_bytes, row_bytes),) for row in range(image.height)), tiled)
    return Rows(height, tuple(pieces[i : i + across] for i in range(0, len(pieces), across)), tiled)


def _file(image: TiffImagePlugin.TiffImageFile, rows: Rows, first: int, stop: int, height: int) -> bytes:
    """A TIFF file of some of the rows, in the byte order of the picture's."""
    order = image.tag_v2.prefix
    head: bytes = order + struct.pack(f"{'<' if order == b'II' else '>'}H", 42)
    directory = TiffImagePlugin.ImageFileDirectory_v2(head + bytes(4))
    for tag in COPIED:
        if tag in image.tag_v2:
            directory.tagtype[tag] = image.tag_v2.tagtype[tag]
            directory[tag] = image.tag_v2[tag]
    pieces = [piece for row in rows.pieces[first:stop] for piece in row]
    counts = tuple(size for _, size in pieces)
    starts = tuple(itertools.accumulate((0, *counts[:-1])))
    directory[HEIGHT] = height
    if not rows.tiled:
        directory[ROWS_PER_STRIP] = rows.height
    offset_tag, count_tag = PLACES[rows.tiled]
    directory.tagtype[offset_tag] = LONG
    directory[offset_tag], directory[count_tag] = starts, counts
    if rows.tiled:  # Pillow adds where the directory ends to the offsets of strips, but not to those of tiles
        end = 8 + len(directory.tobytes(8))
        directory[offset_tag] = tuple(end + start for start in starts)
    link = struct.pack(f"{'<' if order == b'II' else '>'}L", 8)
    return b"".join((head, link, directory.tobytes(8), *_read(image, pieces)))


def _read(image: TiffImagePlugin.TiffImageFile, pieces: list[tuple[int, int]]) -> Iterator[bytes]:
    assert image.fp is not None
    for offset, size in pieces:
        image.fp.seek(offset)
        yield image.fp.read(size)
