"""Folders as input: the images in them, in the order in which a file manager shows them.

Whatever looks like a picture, by its name or by what it holds, is meant: if it cannot be read, that is an error and not
a file that was passed over.
"""

import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from ...machine.wording import printable, some
from .errors import FolderEmpty, FolderUnreadable
from .files.formats import SUFFIXES, looks_like_picture


@dataclass(frozen=True)
class ImageList:
    """The images that the user meant."""

    images: tuple[Path, ...]
    skipped: tuple[Path, ...]
    """What else lies in the folders given, hidden files aside."""


def list_images(paths: Iterable[Path], *, recursive: bool = False) -> ImageList:
    """Replace every folder in ``paths`` by the images in it; files stay as they are, whatever they are called.

    Raises:
        FolderEmpty: a folder holds no image.
        FolderUnreadable: a folder may not be looked into.
    """
    images: list[Path] = []
    skipped: list[Path] = []
    for path in paths:
        if not path.is_dir():
            images.append(path)
            continue
        before = len(images)
        for folder in folders_of(path, recursive=recursive):
            found, others = images_in(folder)
            images += found
            skipped += [other for other in others if not (recursive and other.is_dir())]
        if len(images) == before:
            raise FolderEmpty(path, SUFFIXES)
    return ImageList(tuple(images), tuple(skipped))


def folders_of(folder: Path, *, recursive: bool, without: Path | None = None) -> Iterator[Path]:
    """A folder, and if ``recursive`` all folders below it, each followed by those in it, in natural order.

    Hidden ones and ``without`` are left out; one that links lead to again comes once, so no circle of links is endless.
    """
    seen = {without.resolve()} if without else set()
    waiting = [folder]
    while waiting:
        here = waiting.pop()
        if (real := here.resolve()) in seen:
            continue
        seen.add(real)
        yield here
        if recursive:
            waiting += [path for path in reversed(images_in(here)[1]) if path.is_dir()]


def images_in(folder: Path) -> tuple[list[Path], list[Path]]:
    """``(images, other entries)`` of a folder in natural order, hidden ones left out; a folder inside is no image."""
    try:
        entries = sorted((p for p in folder.iterdir() if not p.name.startswith(".")), key=natural_key)
    except OSError as error:
        raise FolderUnreadable(folder, error) from error
    # Opening a pipe waits for whoever writes into it; a link to nothing is somebody's picture.
    images = [path for path in entries if (path.is_file() or not path.exists()) and looks_like_picture(path)]
    taken = set(images)
    return images, [path for path in entries if path not in taken]


def natural_key(path: Path) -> tuple[tuple[tuple[int, str], ...], str]:
    """Sorts ``2.jpg`` before ``10.jpg``, upper and lower case together; the name itself breaks ties."""
    parts = re.split("([0-9]+)", path.name.casefold())
    return tuple((int(part), "") if index % 2 else (0, part) for index, part in enumerate(parts)), path.name


def skipped_line(skipped: Sequence[Path]) -> str:
    """One sentence about what was passed over: files that are no pictures, and folders."""
    folders = [path for path in skipped if path.is_dir()]
    files = [path for path in skipped if path not in set(folders)]
    parts = []
    if files:
        parts.append(f"{len(files)} that {'is' if len(files) == 1 else 'are'} not a picture: {_few(files)}")
    if folders:
        parts.append(f"{len(folders)} folder{'s' * (len(folders) != 1)}, which --recursive looks into: {_few(folders)}")
    return f"skipped {'; '.join(parts)}"


def skipped_beside_folders(skipped: Sequence[Path]) -> str:
    """The same where each folder becomes one LoRA."""
    return f"skipped {len(skipped)} beside folders with images: {_few(skipped)}"


def _few(paths: Sequence[Path]) -> str:
    return some([printable(path.name) for path in paths], shown=3)
