"""How many threads are worth starting.

Two threads on one core share its multipliers, so matrix products gain nothing from the second; and a container's quota
stops all threads together once it is used up, so threads beyond it only wait. onnxruntime looks at neither quota.
"""

import math
import os
from pathlib import Path

SYSTEM_CPUS = Path("/sys/devices/system/cpu")
CGROUPS = Path("/sys/fs/cgroup")


def default_threads() -> int:
    """Physical cores that this process may run on, within its container's quota; at least one."""
    cores = physical_cores(usable_cpus(), SYSTEM_CPUS)
    quota = cgroup_quota(Path("/proc/self/cgroup"), CGROUPS)
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


def cgroup_quota(membership: Path, root: Path) -> float | None:
    """CPUs' worth of time that the process's control group, or one above it, may use; None if nothing limits it.

    Version 2 of the control groups has ``cpu.max`` ("quota period", or "max period"), version 1 ``cpu.cfs_quota_us``
    (-1: no limit) and ``cpu.cfs_period_us``.
    """
    quotas = []
    for folder in _group_folders(membership, root):
        try:
            quota, period = (folder / "cpu.max").read_text(encoding="ascii").split()
        except OSError:
            try:
                quota, period = (
                    (folder / f"cpu.cfs_{name}_us").read_text(encoding="ascii") for name in ("quota", "period")
                )
            except OSError:
                continue
        if quota.strip() != "max" and int(quota) > 0:
            quotas.append(int(quota) / int(period))
    return min(quotas, default=None)


def _group_folders(membership: Path, root: Path) -> list[Path]:
    """The folders of the process's control groups up to the root: lines are ``id:controllers:path``."""
    try:
        lines = membership.read_text(encoding="utf-8").splitlines()
    except OSError:
        return []
    folders = []
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if controllers and "cpu" not in controllers.split(","):
            continue
        top = root / controllers if controllers else root
        here = top / path.lstrip("/")
        folders += [here, *(parent for parent in here.parents if parent.is_relative_to(top))]
    return folders
