"""Files that appear whole or not at all.

A file is written beside its final place and moved over it when it is complete, so that a crash, a full disk or Ctrl-C
leaves what was there before. The temporary file is made first, so an unwritable folder is found before any work.
"""

import errno
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from .errors import DiskFull, OutputInUse, OutputUnwritable
from .filenames import windows_problem
from .platforms.windows import IN_USE

UNWRITABLE = frozenset(
    {errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR, errno.EISDIR, errno.EEXIST, errno.ENOENT}
    | {errno.ENAMETOOLONG, errno.ELOOP, errno.EFBIG, errno.EINVAL, errno.EBUSY}
)
"""What the operating system says of a place that cannot be written."""


@contextmanager
def explained_os_errors(path: Path) -> Iterator[None]:
    """Turn the operating system's refusals to write ``path`` into errors that say what to do."""
    try:
        yield
    except (DiskFull, OutputUnwritable):
        raise
    except OSError as error:
        if getattr(error, "winerror", None) in IN_USE and path.is_file():
            raise OutputInUse(path) from error
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise DiskFull(path, None, free_bytes(path)) from error
        if error.errno in UNWRITABLE:
            raise OutputUnwritable(path, os.strerror(error.errno)) from error
        raise


@contextmanager
def atomic_path(path: Path) -> Iterator[Path]:
    """Yield a temporary path in the folder of ``path``; move it over ``path`` if the body ends without an error.

    Raises:
        OutputUnwritable: the folder cannot be made or written, or ``path`` is a folder.
        DiskFull: the disk filled up.
    """
    with explained_os_errors(path):
        _require_replaceable(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_name(f".{path.name}.{os.getpid()}.part")
        temporary.touch()
    try:
        with explained_os_errors(path):
            yield temporary
            temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def require_writable(path: Path) -> None:
    """Find out before any work whether ``path`` can be written; raises like :func:`atomic_path`, leaves nothing."""
    with explained_os_errors(path):
        _require_replaceable(path)
        folder = _existing(path.absolute().parent, path)
        probe = folder / f".{path.name}.{os.getpid()}.probe"
        probe.touch()
        probe.unlink()


def _require_replaceable(path: Path) -> None:
    if os.name == "nt" and (problem := windows_problem(path.name)):
        raise OutputUnwritable(path, problem)
    if path.is_dir():
        raise OutputUnwritable(path, "it is a folder")
    if path.exists() and not path.is_file():  # root could replace /dev/null by a file
        raise OutputUnwritable(path, "it is a device or a pipe, not a file")


def free_bytes(path: Path) -> int:
    """Free bytes on the disk that ``path`` is, or will be, on."""
    return shutil.disk_usage(_existing(path.absolute(), path)).free


def _existing(folder: Path, path: Path) -> Path:
    """``folder``, or the nearest folder above it that is there; on Windows a whole drive may be missing."""
    for place in (folder, *folder.parents):
        if place.exists():
            return place
    raise OutputUnwritable(path, f"there is no drive {folder.drive}")


def require_free(path: Path, needed_bytes: int) -> None:
    """Raise :class:`DiskFull` if ``needed_bytes`` do not fit on the disk of ``path``."""
    if needed_bytes > (free := free_bytes(path)):
        raise DiskFull(path, needed_bytes, free)
