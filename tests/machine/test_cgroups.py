"""Limits of control groups, as a container's process finds them."""

import sys
from pathlib import Path

import pytest

from i2l.machine import memory
from i2l.machine.cgroups import cpu_quota, memory_room


def write(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="ascii")


QUOTAS = {
    "version 2": ({"a/b/cpu.max": "150000 100000\n"}, "0::/a/b\n", 1.5),
    "version 2, of the group above": ({"a/cpu.max": "50000 100000\n", "a/b/cpu.max": "max 100000\n"}, "0::/a/b\n", 0.5),
    "version 2, no limit": ({"a/b/cpu.max": "max 100000\n"}, "0::/a/b\n", None),
    "version 2, seen from inside a container": ({"cpu.max": "200000 100000\n"}, "0::/docker/1234\n", 2.0),
    "version 1": (
        {"cpu,cpuacct/a/cpu.cfs_quota_us": "300000\n", "cpu,cpuacct/a/cpu.cfs_period_us": "100000\n"},
        "4:memory:/a\n3:cpu,cpuacct:/a\n",
        3.0,
    ),
    "version 1, no limit": (
        {"cpu/a/cpu.cfs_quota_us": "-1\n", "cpu/a/cpu.cfs_period_us": "100000\n"},
        "3:cpu:/a\n",
        None,
    ),
    "no control groups": ({}, "", None),
}


@pytest.mark.parametrize("case", QUOTAS)
def test_the_quota_of_a_control_group(tmp_path: Path, case: str) -> None:
    files, membership, wanted = QUOTAS[case]
    for name, text in files.items():
        write(tmp_path / "groups" / name, text)
    write(tmp_path / "membership", membership)
    assert cpu_quota(tmp_path / "membership", tmp_path / "groups") == wanted


def test_no_proc_no_limit(tmp_path: Path) -> None:
    assert cpu_quota(tmp_path / "absent", tmp_path) is None
    assert memory_room(tmp_path / "absent", tmp_path) is None


LIMITS = {
    "version 2, of the group above": ({"a/memory.max": "3000\n", "a/b/memory.max": "max\n"}, "0::/a/b\n", 3000),
    "version 2, the smaller": ({"a/memory.max": "3000\n", "a/b/memory.max": "2000\n"}, "0::/a/b\n", 2000),
    "version 2, no limit": ({"memory.max": "max\n"}, "0::/\n", None),
    "version 1": (
        {"memory/a/memory.limit_in_bytes": "4096\n", "memory/memory.limit_in_bytes": "9223372036854771712\n"},
        "4:memory:/a\n3:cpu:/b\n",
        4096,
    ),
    "version 2, the fuller, cached files left out": (
        {
            "a/memory.max": "9000\n",
            "a/memory.current": "6000\n",
            "a/b/memory.max": "4000\n",
            "a/memory.stat": "anon 4500\nfile 1500\ninactive_file 900\nactive_file 100\n",
        },
        "0::/a/b\n",
        4000,
    ),
    "version 2, of the group above, taken by others": (
        {"a/memory.max": "9000\n", "a/memory.current": "8800\n", "a/b/memory.max": "4000\n"},
        "0::/a/b\n",
        200,
    ),
    "version 1, groups below counted in": (
        {
            "memory/a/memory.limit_in_bytes": "9000\n",
            "memory/a/memory.usage_in_bytes": "6000\n",
            "memory/a/memory.stat": "inactive_file 1\ntotal_inactive_file 2000\ntotal_active_file 500\n",
        },
        "4:memory:/a\n",
        5500,
    ),
    "no control groups": ({}, "", None),
}


@pytest.mark.parametrize("case", LIMITS)
def test_the_memory_of_a_control_group(tmp_path: Path, case: str) -> None:
    files, membership, wanted = LIMITS[case]
    for name, text in files.items():
        write(tmp_path / "groups" / name, text)
    write(tmp_path / "membership", membership)
    assert memory_room(tmp_path / "membership", tmp_path / "groups") == wanted


@pytest.mark.skipif(sys.platform == "win32", reason="of /proc and /sys")
def test_available_memory_is_within_the_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "memory_room", lambda: None)
    unlimited = memory.available_bytes()
    monkeypatch.setattr(memory, "memory_room", lambda: 12345)
    assert memory.available_bytes() == 12345
    assert unlimited is None or unlimited > 12345


@pytest.mark.skipif(sys.platform == "win32", reason="of /proc and getrusage")
def test_the_peak_without_a_line_for_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """gVisor's /proc/self/status has none; the LoRA is written by then, so this must not fail."""
    for name, text in (("status", "Name:\tpython\n"), ("absent", None)):
        if text:
            (tmp_path / name).write_text(text)
        monkeypatch.setattr(memory, "STATUS", tmp_path / name)
        assert 1 << 20 < memory.peak_resident_bytes() < 1 << 46
    (tmp_path / "status").write_text("Name:\tpython\nVmHWM:\t    1234 kB\n")
    monkeypatch.setattr(memory, "STATUS", tmp_path / "status")
    assert memory.peak_resident_bytes() == 1234 * 1024
