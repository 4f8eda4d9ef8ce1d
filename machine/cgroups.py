"""What a container may use: limits of the process's control groups, versions 1 and 2.

A limit holds for a group and all below it, so the smallest on the way to the root counts. Version 2 has one file per
limit, which says ``max`` for none; version 1 has a tree for every controller and says -1, or a number near 2**63.
"""

from collections.abc import Iterator
from pathlib import Path

MEMBERSHIP = Path("/proc/self/cgroup")
ROOT = Path("/sys/fs/cgroup")


def cpu_quota(membership: Path = MEMBERSHIP, root: Path = ROOT) -> float | None:
    """CPUs' worth of time that may be used; None if nothing limits it."""
    quotas = []
    for folder in _folders("cpu", membership, root):
        version_1 = [*_words(folder / "cpu.cfs_quota_us"), *_words(folder / "cpu.cfs_period_us")]
        match _words(folder / "cpu.max") or version_1:
            case [quota, period] if quota != "max" and int(quota) > 0:
                quotas.append(int(quota) / int(period))
    return min(quotas, default=None)


def memory_room(membership: Path = MEMBERSHIP, root: Path = ROOT) -> int | None:
    """Bytes of memory that may still be taken; None if nothing limits it.

    What the group has of cached files counts as free, as the system gives it back when it is asked for more.
    """
    return min((limit - _held(folder) for folder, limit in _memory_limits(membership, root)), default=None)


def _memory_limits(membership: Path, root: Path) -> Iterator[tuple[Path, int]]:
    """``(folder, bytes)`` of each group that is limited."""
    for folder in _folders("memory", membership, root):
        for word in _words(folder / "memory.max") or _words(folder / "memory.limit_in_bytes"):
            if word != "max" and 0 < int(word) < 1 << 62:
                yield folder, int(word)


def _held(folder: Path) -> int:
    """Bytes that a group has and would not give back: without cached files; 0 where the system does not tell."""
    used = _words(folder / "memory.current") or _words(folder / "memory.usage_in_bytes") or ["0"]
    words = _words(folder / "memory.stat")
    counts = dict(zip(words[::2], map(int, words[1::2]), strict=False))
    below = "" if (folder / "memory.max").exists() else "total_"  # version 1 counts the groups below apart
    files = sum(counts.get(f"{below}{name}", 0) for name in ("inactive_file", "active_file"))
    return max(0, int(used[0]) - files)


def _words(path: Path) -> list[str]:
    try:
        return path.read_text(encoding="ascii").split()
    except OSError:
        return []


def _folders(controller: str, membership: Path, root: Path) -> Iterator[Path]:
    """The folders of the process's control groups up to the root: lines are ``id:controllers:path``."""
    try:
        lines = membership.read_text(encoding="utf-8").splitlines()
    except OSError:
        return
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if controllers and controller not in controllers.split(","):
            continue
        top = root / controllers if controllers else root
        here = top / path.lstrip("/")
        yield from (here, *(parent for parent in here.parents if parent.is_relative_to(top)))
