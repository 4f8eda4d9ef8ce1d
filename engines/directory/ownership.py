"""Whose folder is this? Engines are built only where nothing else lies."""

from pathlib import Path

from ...machine.files import read_small
from ..errors import FolderNotEngines
from .manifest import MANIFEST

LOCK = ".build.lock"
"""The first file of every build; it stays."""


def require_own(directory: Path) -> None:
    """Raise :class:`FolderNotEngines` unless a folder is absent, empty, or holds engines, whole or begun.

    Hidden files, which systems leave everywhere, do not count; a folder of engines directories, which the nodes make,
    is one too.
    """
    if not directory.is_dir() or _is_own(directory):
        return
    for entry in sorted(directory.iterdir()):
        if not entry.name.startswith(".") and not (entry.is_dir() and _is_own(entry)):
            raise FolderNotEngines(directory, entry)


def _is_own(directory: Path) -> bool:
    if (directory / LOCK).is_file():
        return True
    try:
        return read_small(directory / MANIFEST).startswith(b'{"format":')  # other programs have files of this name too
    except OSError:
        return False
