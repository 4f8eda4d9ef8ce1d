"""How many threads are worth starting.

Two threads on one core share its multipliers, so matrix products gain nothing from the second; and a container's quota
stops all threads together once it is used up, so threads beyond it only wait. onnxruntime looks at neither quota.
"""

import math
import os
from pathlib import Path

from .cgroups import cpu_quota
from .errors import ThreadsInvalid

MOST_THREADS = 1024
SYSTEM_CPUS = Path("/sys/devices/system/cpu")


def require_threads(threads: int | None) -> None:
    """Raise :class:`ThreadsInvalid` unless this is a number of threads that can be started."""
    if threads is not None and not (type(threads) is int and 1 <= threads <= MOST_THREADS):
        raise ThreadsInvalid(threads, MOST_THREADS)


def default_threads() -> int:
    """Physical cores that this process may run on, within its container's quota; at least one."""
    cores = physical_cores(usable_cpus(), SYSTEM_CPUS)
    quota = cpu_quota()
    return max(1, cores if quota is None else min(cores, math.ceil(quota)))


def usable_cpus() -> frozenset[int]:
    """The logical CPUs this process may run on."""
    if hasattr(os, "sched_getaffinity"):
        return frozenset(os.sched_getaffinity(0))
    return frozenset(range(os.cpu_count() or 1))


def physical_cores(cpus: frozenset[int], system: Path) -> int:
    """Cores behind logical CPUs, as Linux tells their siblings; where it does not, every CPU is a core."""
    cores = set()
    for cpu in cpus:
        try:
            siblings = (system / f"cpu{cpu}/topology/thread_siblings_list").read_text(encoding="ascii").strip()
        except OSError:
            siblings = str(cpu)
        cores.add(siblings)
    return len(cores)
