"""Files that appear whole or not at all.

A file is written beside its final place, handed to the disk and moved over that place when it is complete, so that a
crash, a full disk, Ctrl-C or a loss of power leaves what was there before. The temporary file is made first, so an
unwritable folder is found before any work. Its name is random: two threads do not meet in it, and nobody who may write
in the folder can lay a link there beforehand. A process that is killed leaves it; whoever writes there next removes it.
"""

import errno
import hashlib
import os
import platform
import re
import secrets
import shutil
import stat
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from .errors import DiskFull, OutputInUse, OutputUnwritable
from .filenames import windows_problem
from .platforms.windows import IN_USE

UNWRITABLE = frozenset(
    {errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR, errno.EISDIR, errno.EEXIST, errno.ENOENT}
    | {errno.ENAMETOOLONG, errno.ELOOP, errno.EFBIG, errno.EINVAL, errno.EBUSY}
)
"""What the operating system says of a place that cannot be written."""
LEFTOVER = re.compile(r"\.i2l-(?P<host>[0-9a-f]{6})-(?P<pid>[0-9]{1,10})-[0-9a-f]{16}\.part")
LEFTOVER_SECONDS = 24 * 3600
SMALL_BYTES = 64 << 20
"""Of a file of facts. The manifest of full size has 1 MB."""


@contextmanager
def explained_os_errors(path: Path) -> Iterator[None]:
    """Turn the operating system's refusals to write ``path`` into errors that say what to do."""
    try:
        yield
    except (DiskFull, OutputUnwritable):
        raise
    except OSError as error:
        if getattr(error, "winerror", None) in IN_USE and (kept := _a_file_of(error, path)):
            raise OutputInUse(kept) from error
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise DiskFull(path, None, free_bytes(path)) from error
        if error.errno in UNWRITABLE:
            raise OutputUnwritable(path, os.strerror(error.errno)) from error
        raise


def _a_file_of(error: OSError, path: Path) -> Path | None:
    """The file that a refusal is about: ``path``, or one inside if that is a folder."""
    names = (error.filename2, error.filename)
    places = (path, *(Path(os.fsdecode(name)) for name in names if name and not isinstance(name, int)))
    return next((place for place in places if place.is_file()), None)


def remove_folder(folder: Path) -> str:
    """Remove a folder as far as the system lets; return why some of it stays, empty if it is gone."""
    shutil.rmtree(folder, ignore_errors=True)
    try:
        if folder.exists():
            with explained_os_errors(folder):
                shutil.rmtree(folder)
    except OSError as error:
        return str(error) if folder.exists() else ""  # somebody else may have removed it meanwhile
    return ""


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
        temporary = temporary_path(path.parent)
        try:
            create_temporary(temporary)  # named before it is made: Ctrl-C comes between any two lines
            yield temporary
            sync_file(temporary)
            temporary.replace(path)
            sync_folder(path.parent)
        finally:
            temporary.unlink(missing_ok=True)


def require_writable(path: Path) -> None:
    """Find out before any work whether ``path`` can be written; raises like :func:`atomic_path`, leaves nothing."""
    with explained_os_errors(path):
        _require_replaceable(path)
        with suppress(FileNotFoundError):
            path.lstat()  # the system says here that a name is too long
        temporary = temporary_path(_existing(path.absolute().parent, path))
        try:
            create_temporary(temporary)
        finally:
            temporary.unlink(missing_ok=True)


def temporary_path(folder: Path) -> Path:
    """A name in ``folder`` that no other thread, process or user has; its length fits every disk."""
    return folder / f".i2l-{_host()}-{os.getpid()}-{secrets.token_hex(8)}.part"


def create_temporary(path: Path) -> None:
    """Make an empty file, never following a link that lies in its place."""
    os.close(os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY | getattr(os, "O_NOFOLLOW", 0), 0o666))


def remove_leftovers(folder: Path) -> None:
    """Remove the temporary files of processes that are dead, or older than a day where that cannot be known."""
    with suppress(OSError):  # a folder that is not there, or not ours: then so is what lies in it
        for entry in list(os.scandir(folder)):
            if (name := LEFTOVER.fullmatch(entry.name)) and _is_dead(name["host"], int(name["pid"]), entry):
                with suppress(OSError):
                    Path(entry).unlink()


def _is_dead(host: str, pid: int, entry: "os.DirEntry[str]") -> bool:
    if time.time() - entry.stat(follow_symlinks=False).st_mtime > LEFTOVER_SECONDS:
        return True
    if host != _host() or os.name == "nt":  # a number of another machine, or a system where asking ends the process
        return False
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return True
    except (OSError, OverflowError):
        return False
    return False


def _host() -> str:
    """Tells machines and containers apart, which count their processes alike."""
    return hashlib.sha256(platform.node().encode("utf-8", "replace")).hexdigest()[:6]


def sync_file(path: Path) -> None:
    """Wait until the bytes of a file are on the disk; on macOS also through the disk's own cache."""
    descriptor = os.open(path, os.O_RDWR)
    try:
        _sync(descriptor)
    finally:
        os.close(descriptor)


def sync_folder(path: Path) -> None:
    """Wait until the names in a folder are on the disk; where a system knows no such thing, nothing happens."""
    if os.name == "nt":
        return
    descriptor = os.open(path, os.O_RDONLY)
    try:
        _sync(descriptor)
    finally:
        os.close(descriptor)


def sync_tree(folder: Path) -> None:
    """:func:`sync_file` for all files below a folder, and :func:`sync_folder` for all folders."""
    for place, _, names in os.walk(folder):
        for name in names:
            sync_file(Path(place) / name)
        sync_folder(Path(place))


def _sync(descriptor: int) -> None:
    try:
        if sys.platform != "win32":
            import fcntl  # noqa: PLC0415 - absent on Windows

            if (full := getattr(fcntl, "F_FULLFSYNC", None)) is not None:
                with suppress(OSError):  # a disk that is mounted over a network
                    fcntl.fcntl(descriptor, full)
                    return
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in {errno.EINVAL, errno.ENOTSUP, errno.ENOSYS, errno.EACCES, errno.EPERM}:
            raise


def regular_file_problem(path: Path) -> str:
    """Why ``path`` cannot be read as a file; empty if it can be tried.

    Opening a named pipe waits for somebody who writes into it: so it is not opened.
    """
    try:
        mode = path.stat().st_mode
    except FileNotFoundError:
        return ""  # whoever opens it says so
    except (OSError, ValueError) as error:  # a name with a null byte
        return getattr(error, "strerror", None) or str(error)
    if stat.S_ISREG(mode):
        return ""
    return os.strerror(errno.EISDIR) if stat.S_ISDIR(mode) else "it is a pipe, a socket or a device, not a file"


def read_small(path: Path, most_bytes: int = SMALL_BYTES) -> bytes:
    """The bytes of a file of facts, such as a manifest or a record.

    Raises:
        OSError: it cannot be read, is no file, or is larger than any of its kind: sparse files cost nothing to make.
    """
    path.stat()  # the system's own error where there is none
    if problem := regular_file_problem(path):
        raise OSError(errno.EINVAL, problem)
    with path.open("rb") as file:
        data = file.read(most_bytes + 1)
    if len(data) > most_bytes:
        raise OSError(errno.EFBIG, os.strerror(errno.EFBIG))
    return data


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
