"""Uploaded pictures: from files with names that nobody chose but us to the squares that the encoders look at.

A client's file name is only ever shown. The file on disk is called ``picture-1.jpg``: the number is ours, the suffix,
at most eight letters and digits, tells some formats from others and is kept.
"""

import re
import struct
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from ..machine.wording import format_path
from ..runtime.pictures.errors import ImageError
from ..runtime.pictures.files.formats import open_picture, plugin_format
from ..runtime.pictures.files.jxl_size import jxl_size
from ..runtime.pictures.sources import colours_mark, images_mark, load_squares
from .errors import PictureTooLarge
from .spool import keep_squares

PNG_SIZE = slice(16, 24)
HEADER_ERRORS = (OSError, SyntaxError, ValueError, RuntimeError, struct.error)
"""What Pillow raises on headers; what is wrong is then said by the reading itself."""


@dataclass(frozen=True)
class Upload:
    """One picture of a request."""

    path: Path
    shown: str
    """What errors call it."""


def upload(folder: Path, number: int, filename: str) -> Upload:
    """Where the picture of this number goes; ``filename`` is the client's, and never becomes a path."""
    suffix = re.search(r"\.[A-Za-z0-9]{1,8}\Z", filename)
    shown = "".join(letter if letter.isprintable() else "?" for letter in filename[-60:]) or "without a name"
    return Upload(folder / f"picture-{number}{suffix[0].lower() if suffix else ''}", f"picture {number} ({shown})")


def read_pictures(folder: Path, uploads: Sequence[Upload], max_pixels: int) -> dict[str, str]:
    """Decode every picture and keep its square beside it; the header entries that name them.

    Raises:
        PictureTooLarge: by its header, before anything is decoded.
        ImageError: a picture cannot be used; the sentence has the client's name for it.
        DiskFull, OutputUnwritable: the squares cannot be kept.
    """
    for each in uploads:
        size = header_size(each.path)
        if size is not None and size[0] * size[1] > max_pixels:
            raise PictureTooLarge(each.shown, *size, max_pixels)
    try:
        squares, hashes = load_squares([each.path for each in uploads])
    except ImageError as error:
        raise _renamed(error, uploads) from error
    keep_squares(folder, squares)
    for each in uploads:
        each.path.unlink()
    return images_mark(hashes) | colours_mark(ignore_icc=False)


def header_size(path: Path) -> tuple[int, int] | None:
    """Width and height as the file's header says; None if it says none that can be read."""
    with path.open("rb") as file:
        begin = file.read(32)
        if begin.startswith(b"\x89PNG\r\n\x1a\n") and len(begin) == 32:  # Pillow also reads its texts, and refuses some
            width, height = struct.unpack(">II", begin[PNG_SIZE])
            return int(width), int(height)
        file.seek(0)
        if plugin_format(begin) == "JPEG XL":  # Pillow's plugin decodes it at once
            return jxl_size(file)
        with suppress(*HEADER_ERRORS, ImageError):
            return open_picture(file, path.name).size
    return None


def _renamed(error: ImageError, uploads: Sequence[Upload]) -> ImageError:
    """The same error, which names the client's files and not ours."""
    text = str(error)
    for each in uploads:
        text = text.replace(format_path(each.path), each.shown)
    renamed = error.with_traceback(None)
    renamed.args = (text,)
    return renamed
