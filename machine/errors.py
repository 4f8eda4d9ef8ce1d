"""The base of every failure that i2l can explain, and what the machine refuses.

Each room has its errors beside it; :mod:`i2l.errors` shows them all. One rule holds for each: a leaf takes the facts
and owns its sentence, what is wrong, then a colon, then the next command or change that mends it. The command line
prints that sentence after ``error:`` and exits with 1; the Python API raises it. A leaf also inherits the built-in
exception that a Python programmer would catch.
"""

import os
from collections.abc import Sequence
from pathlib import Path

from .wording import format_bytes, format_path


class I2LError(Exception):
    """Base of every error that i2l raises on purpose."""

    def __init_subclass__(cls) -> None:
        """Call each ``i2l.errors.NAME``, where users find it: ComfyUI shows a class with its module, there a path."""
        if cls.__module__.startswith(__name__.removesuffix("machine.errors")):
            cls.__module__ = "i2l.errors"


class PackageMissing(I2LError, ImportError):
    """An optional dependency is not installed."""

    def __init__(self, package: str, purpose: str, extra: str) -> None:
        super().__init__(f'{purpose} needs {package}, which is not installed: pip install "i2l-engines[{extra}]"')


class OutputUnwritable(I2LError, OSError):
    """The output file or directory cannot be written."""

    def __init__(self, path: Path, reason: str) -> None:
        super().__init__(f"cannot write {format_path(path)} ({reason}): choose another place")


class OutputInUse(OutputUnwritable):
    """Windows keeps what a program has open or mapped."""

    def __init__(self, path: Path) -> None:
        I2LError.__init__(
            self,
            f"{format_path(path)} is open in another program, so Windows does not let it be replaced or removed: "
            "close that program, such as ComfyUI or i2l serve, which keep LoRAs and engines open, or choose another "
            "name",
        )


class ThreadsInvalid(I2LError, ValueError):
    """No machine has so many threads, or so few."""

    def __init__(self, threads: object, most: int) -> None:
        super().__init__(f"threads is {threads!r}: give a whole number from 1 to {most}, or none for one for each core")


class OutputTaken(OutputUnwritable, FileExistsError):
    """What is there already must not be replaced."""

    def __init__(self, path: Path, what: str, *, forcible: bool = False) -> None:
        force = ", or give --force (force=True) to replace it" if forcible else ""
        I2LError.__init__(self, f"{format_path(path)} is {what}, which is not replaced: choose another place{force}")


class OutputMisnamed(I2LError, ValueError):
    """A file's name promises another format than it would have."""

    def __init__(self, path: Path, noun: str, suffixes: Sequence[str]) -> None:
        super().__init__(f"{format_path(path)} cannot be {noun}: give it a name that ends in {' or '.join(suffixes)}")


class DiskFull(I2LError, OSError):
    """The disk has no room for what is to be written."""

    def __init__(self, path: Path, needed_bytes: int | None, free_bytes: int) -> None:
        need = f"{format_bytes(needed_bytes)} needed, " if needed_bytes is not None else ""
        super().__init__(
            f"no room on the disk of {format_path(path)} ({need}{format_bytes(free_bytes)} free): free some space or "
            "choose a directory on another disk"
        )


class SystemRefused(I2LError, OSError):
    """The system has no more of something, or will not give it."""

    def __init__(self, cause: BaseException | None) -> None:
        path = getattr(cause, "filename", None)
        where = f" ({format_path(Path(os.fsdecode(path)))})" if isinstance(path, str | bytes) else ""
        reason = "not enough memory" if isinstance(cause, MemoryError) else getattr(cause, "strerror", None) or cause
        super().__init__(f"the system refuses: {reason}{where}: see what is full or limited; --debug shows where")


class StandardOutputUnwritable(I2LError, OSError):
    """What a command prints cannot be written."""

    def __init__(self, reason: str) -> None:
        super().__init__(f"cannot write to standard output ({reason}): send it to another place")
