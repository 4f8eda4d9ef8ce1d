"""How much memory this process has needed, and how much there is."""

import sys
from pathlib import Path

from .cgroups import memory_limit


def peak_resident_bytes() -> int:
    """The highest resident set of this process; 0 where the system does not tell.

    ``VmHWM`` starts afresh at exec, while ``ru_maxrss`` can inherit the parent's size, so it is asked first.
    """
    status = Path("/proc/self/status")
    if status.exists():
        line = next(line for line in status.read_text(encoding="ascii").splitlines() if line.startswith("VmHWM:"))
        return int(line.split()[1]) * 1024
    try:
        import resource  # noqa: PLC0415 - absent on Windows
    except ImportError:
        return 0
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def available_bytes() -> int | None:
    """What could be used without swapping, cached files included, within the container's limit; None where unknown."""
    limits = [memory_limit()]
    meminfo = Path("/proc/meminfo")
    if meminfo.exists():
        lines = meminfo.read_text(encoding="ascii").splitlines()
        limits += [int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:")]
    return min((limit for limit in limits if limit is not None), default=None)
