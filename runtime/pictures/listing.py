"""Folders as input: the images in them, in the order in which a file manager shows them.

Whatever looks like a picture, by its name or by what it holds, is meant: if it cannot be read, that is an error and not
a file that was passed over.
"""

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from ...machine.wording import format_path, printable
from .errors import FolderEmpty, ImageUnreadable
from .files.formats import SUFFIXES, looks_like_picture


@dataclass(frozen=True)
class ImageList:
    """The images that the user meant."""

    images: tuple[Path, ...]
    skipped: tuple[Path, ...]
    """What else lies in the folders given, hidden files aside."""


def list_images(paths: Iterable[Path]) -> ImageList:
    """Replace every folder in ``paths`` by the images in it; files stay as they are, whatever they are called.

    Raises:
        FolderEmpty: a folder holds no image.
        ImageUnreadable: a folder may not be looked into.
    """
    images: list[Path] = []
    skipped: list[Path] = []
    for path in paths:
        if not path.is_dir():
            images.append(path)
            continue
        found, others = images_in(path)
        if not found:
            raise FolderEmpty(path, SUFFIXES)
        images += found
        skipped += others
    return ImageList(tuple(images), tuple(skipped))


def images_in(folder: Path) -> tuple[list[Path], list[Path]]:
    """``(images, other entries)`` of a folder in natural order, hidden ones left out; a folder inside is no image."""
    try:
        entries = sorted((p for p in folder.iterdir() if not p.name.startswith(".")), key=natural_key)
    except OSError as error:
        raise ImageUnreadable(format_path(folder), error.strerror or str(error)) from error
    # Opening a pipe waits for whoever writes into it; a link to nothing is somebody's picture.
    images = [path for path in entries if (path.is_file() or not path.exists()) and looks_like_picture(path)]
    taken = set(images)
    return images, [path for path in entries if path not in taken]


def natural_key(path: Path) -> tuple[tuple[tuple[int, str], ...], str]:
    """Sorts ``2.jpg`` before ``10.jpg``, upper and lower case together; the name itself breaks ties."""
    parts = re.split("([0-9]+)", path.name.casefold())
    return tuple((int(part), "") if index % 2 else (0, part) for index, part in enumerate(parts)), path.name


def skipped_line(skipped: Sequence[Path], wanted: str = "a picture", shown: int = 3) -> str:
    """One sentence about what was passed over."""
    names = ", ".join(printable(path.name) for path in skipped[:shown])
    more = f" and {len(skipped) - shown} more" if len(skipped) > shown else ""
    return f"skipped {len(skipped)} that {'is' if len(skipped) == 1 else 'are'} not {wanted}: {names}{more}"
