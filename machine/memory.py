"""How much memory this process has needed, and how much there is."""

import os
import sys
from pathlib import Path

from .cgroups import memory_room
from .platforms import windows

STATUS, MEMINFO = Path("/proc/self/status"), Path("/proc/meminfo")


def peak_resident_bytes() -> int:
    """The highest resident set of this process; 0 where the system does not tell.

    ``VmHWM`` starts afresh at exec, while ``ru_maxrss`` can inherit the parent's size, so it is asked first.
    """
    if sys.platform == "win32":
        return windows.peak_working_set_bytes()
    if (peak := _kib(STATUS, "VmHWM")) is not None:
        return peak
    import resource  # noqa: PLC0415 - absent on Windows

    largest = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return largest if sys.platform == "darwin" else largest * 1024


def anonymous_bytes() -> int | None:
    """What this process holds of its own, files left out; None where the system does not tell."""
    return _kib(STATUS, "RssAnon")


def available_bytes() -> int | None:
    """What could be used without swapping, cached files included, within a container's limit; None where unknown."""
    if sys.platform == "win32":
        memory = windows.memory_bytes()
        return memory[1] if memory else None
    limits = (memory_room(), _kib(MEMINFO, "MemAvailable"))
    return min((limit for limit in limits if limit is not None), default=None)


def total_bytes() -> int | None:
    """The machine's memory; None where unknown."""
    if sys.platform == "win32":
        memory = windows.memory_bytes()
        return memory[0] if memory else None
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def _kib(path: Path, name: str) -> int | None:
    """A line ``NAME:  N kB`` of a file of /proc, in bytes; None if it is not there, as in gVisor."""
    try:
        lines = path.read_text(encoding="ascii").splitlines()
    except OSError:
        return None
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{name}:")), None)
