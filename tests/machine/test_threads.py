"""How many threads: cores rather than their siblings, and never more than a container may use."""

import os
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from i2l.machine.cgroups import cpu_quota
from i2l.machine.threads import default_threads, physical_cores, usable_cpus


def write(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="ascii")


@pytest.mark.skipif(sys.platform == "win32", reason="of /proc and /sys")
@given(cores=st.integers(1, 16), siblings=st.integers(1, 4), data=st.data())
def test_siblings_count_once(
    tmp_path_factory: pytest.TempPathFactory, cores: int, siblings: int, data: st.DataObject
) -> None:
    system = tmp_path_factory.mktemp("system")
    for cpu in range(cores * siblings):
        mates = ",".join(str(cpu % cores + cores * mate) for mate in range(siblings))
        write(system / f"cpu{cpu}/topology/thread_siblings_list", f"{mates}\n")
    usable = data.draw(st.frozensets(st.integers(0, cores * siblings - 1), min_size=1))
    assert physical_cores(usable, system) == len({cpu % cores for cpu in usable})


def test_every_cpu_is_a_core_where_the_system_does_not_tell(tmp_path: Path) -> None:
    assert physical_cores(frozenset({0, 3, 5}), tmp_path) == 3


@pytest.mark.parametrize(("quota", "wanted"), [("50000 100000", 1), ("150000 100000", 2), ("99900000 100000", 4)])
def test_threads_are_cores_within_the_quota(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, quota: str, wanted: int
) -> None:
    from i2l.machine import threads

    write(tmp_path / "cpu.max", quota)
    monkeypatch.setattr(threads, "SYSTEM_CPUS", tmp_path)
    write(tmp_path / "membership", "0::/\n")
    monkeypatch.setattr(threads, "cpu_quota", lambda: cpu_quota(tmp_path / "membership", tmp_path))
    monkeypatch.setattr(threads, "usable_cpus", lambda: frozenset(range(4)))
    assert default_threads() == wanted


@pytest.mark.skipif(sys.platform != "linux", reason="this system has no CPU affinity")
def test_affinity_is_respected() -> None:
    if sys.platform != "linux":
        pytest.skip("Linux alone has this call")
    before = os.sched_getaffinity(0)
    try:
        os.sched_setaffinity(0, {min(before)})
        assert usable_cpus() == {min(before)}
        assert default_threads() == 1
    finally:
        os.sched_setaffinity(0, before)
