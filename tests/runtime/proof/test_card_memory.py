"""Who tells what a process holds of a card, and what follows from it."""

import os
import subprocess
import sys
from pathlib import Path
from textwrap import dedent
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

from i2l.runtime.proof import card_memory
from i2l.runtime.proof.card_memory import Told, drm_bytes, growth, told_memory
from i2l.runtime.proof.judging import DRIVERS_BYTES, memory_failure, time_failure

AMD = """pos:\t0
drm-driver:\tamdgpu
drm-client-id:\t{client}
drm-memory-vram:\t2048 KiB
drm-memory-gtt: \t16 KiB
drm-engine-gfx:\t4711 ns
"""
INTEL = """drm-driver:\ti915
drm-client-id:\t7
drm-total-system0:\t3 MiB
drm-resident-system0:\t1 MiB
"""


def test_the_kernel_counts_a_client_once_and_the_cards_own_memory_before_the_machines() -> None:
    assert drm_bytes([AMD.format(client=1), AMD.format(client=1), "pos:\t0\n"]) == 2 << 20
    assert drm_bytes([AMD.format(client=1), AMD.format(client=2), INTEL]) == 4 << 20
    assert drm_bytes([INTEL]) == 1 << 20
    assert drm_bytes(["no card"]) == 0


class NVMLError(Exception):
    """Of the played library."""


def nvml(compute: list[Any], graphics: list[Any], *, works: bool = True, sliced: bool = False) -> ModuleType:
    """NVML with two cards, the second of which is not opened; ``sliced``: it is on a slice of the first."""
    module = ModuleType("pynvml")
    place: object = ("slice", 2) if sliced else 0

    def refuse(why: str) -> None:
        raise NVMLError(why)

    def begin() -> None:
        if not works:
            refuse("Driver Not Loaded")

    def listed(at: object, processes: list[Any]) -> list[Any]:
        if sliced and at == 0:
            refuse("Insufficient Permissions")
        return processes if at == place else []

    members: dict[str, Any] = {
        "NVMLError": NVMLError,
        "nvmlInit": begin,
        "nvmlShutdown": lambda: None,
        "nvmlDeviceGetCount": lambda: 2,
        "nvmlDeviceGetHandleByIndex": lambda index: index,
        "nvmlDeviceGetMigMode": lambda card: (1, 1) if sliced and card == 0 else refuse("Not Supported"),
        "NVML_DEVICE_MIG_ENABLE": 1,
        "nvmlDeviceGetMaxMigDeviceCount": lambda _: 7,
        "nvmlDeviceGetMigDeviceHandleByIndex": lambda _, index: (
            ("slice", index) if index in {0, 2} else refuse("Not Found")
        ),
        "nvmlDeviceGetComputeRunningProcesses": lambda at: listed(at, compute),
        "nvmlDeviceGetGraphicsRunningProcesses": lambda at: listed(at, graphics),
    }
    vars(module).update(members)
    return module


def used(nbytes: int | None, pid: int | None = None) -> SimpleNamespace:
    return SimpleNamespace(pid=pid or os.getpid(), usedGpuMemory=nbytes)


@pytest.mark.parametrize(
    ("module", "wanted"),
    [
        (nvml([used(5 << 30), used(9 << 30, pid=1)], [used(5 << 30)]), Told(5 << 30, "NVML")),
        (nvml([used(2 << 30)], [], sliced=True), Told(2 << 30, "NVML")),
        (nvml([], [used(3 << 30)]), Told(3 << 30, "NVML")),  # by Vulkan
        (nvml([used(None)], []), None),  # Windows' driver does not tell
        (nvml([], [], works=False), None),
        (None, None),  # not installed
    ],
)
def test_nvml_is_asked_for_this_process(
    monkeypatch: pytest.MonkeyPatch, module: ModuleType | None, wanted: Told | None
) -> None:
    monkeypatch.setitem(sys.modules, "pynvml", module)
    monkeypatch.setattr(card_memory, "drm_bytes", lambda _: 0)
    assert told_memory(software=False) == wanted


def test_the_kernel_is_asked_where_there_is_no_nvml(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pynvml", None)
    monkeypatch.setattr(card_memory, "FDINFO", tmp_path)
    assert told_memory(software=False) is None
    (tmp_path / "3").write_text(AMD.format(client=1))
    (tmp_path / "4").symlink_to(tmp_path / "closed since")
    assert told_memory(software=False) == Told(2 << 20, "the kernel")
    monkeypatch.setattr(card_memory, "FDINFO", tmp_path / "no Linux")
    assert told_memory(software=False) is None


@pytest.mark.skipif(sys.platform != "linux", reason="other systems do not tell a process's own memory apart")
def test_a_renderer_in_software_is_this_process() -> None:
    """In a process of its own: what another test's garbage gives back meanwhile would be taken off the growth."""
    code = """
        from i2l.runtime.proof.card_memory import growth, told_memory
        before = told_memory(software=True)
        held = bytearray(b"\\1" * (64 << 20))
        grown = growth(before, told_memory(software=True))
        print(grown.by, grown.nbytes)
    """
    done = subprocess.run([sys.executable, "-c", dedent(code)], capture_output=True, text=True, check=True)
    by, _, nbytes = done.stdout.rpartition(" ")
    assert by == "the process"
    assert int(nbytes) + (1 << 20) >= 64 << 20


def test_what_came_since_is_of_one_count() -> None:
    assert growth(Told(5, "NVML"), None) is None
    assert growth(None, Told(5, "NVML")) == Told(5, "NVML")


def test_over_the_budget_is_a_failure_by_either_count() -> None:
    assert memory_failure(None, None) == ""
    assert memory_failure(5, 5, Told(5 + DRIVERS_BYTES, "NVML")) == ""
    assert memory_failure(6 << 30, 5 << 30).startswith("it took 6.00 GiB of the card, 5.00 GiB were allowed")
    wrong = memory_failure(5 << 30, 5 << 30, Told(6 << 30, "NVML"))
    assert wrong == "it holds 6.00 GiB of the card by the count of NVML, 5.00 GiB were allowed"


def test_a_clock_that_stops_before_the_card_is_not_believed() -> None:
    assert time_failure(None, 1, 1.0) == time_failure(1.0, None, 1.0) == time_failure(1.0, 1, None) == ""
    assert time_failure(1000.0, 10 << 30, float(10 << 30)) == ""
    assert time_failure(400.0, 10 << 30, float(10 << 30)) == ""  # hidden behind computing, or a rate that varies
    wrong = time_failure(3.0, 10 << 30, float(10 << 30))
    assert wrong == "its times cannot be true: an image in 3 ms, whose uploads alone take 1e+03 ms"
