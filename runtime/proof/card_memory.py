"""What this process holds of cards, by others than our own count: what a driver took for itself shows only there.

Three can be asked, none of them through the provider. NVML, by process, where the package ``nvidia-ml-py`` is there
and the driver tells (Windows' does not for cards with a screen). Linux's kernel: the drivers of AMD, Intel and others
write what a process holds into ``/proc/self/fdinfo``, as the kernel's Documentation/gpu/drm-usage-stats.rst says. And
for a renderer in software the process's own memory, whose growth is the card's. Elsewhere nobody can, which is said.
"""

import os
import re
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ...machine.memory import anonymous_bytes

FDINFO = Path("/proc/self/fdinfo")
CLIENT = re.compile(r"^drm-client-id:\s*(\d+)", re.MULTILINE)
REGION = re.compile(
    r"^drm-(?P<what>resident|memory|total)-(?P<region>\w+):\s*(?P<number>\d+) ?(?P<unit>[KM]iB)?", re.MULTILINE
)
UNITS = {None: 1, "KiB": 1 << 10, "MiB": 1 << 20}
WHATS = ("resident", "memory", "total")
"""What is told of a region, the best first."""
CARDS_OWN = ("vram", "local")
"""Regions on a card begin so; a card that has none uses the machine's memory."""


@dataclass(frozen=True)
class Told:
    """An answer, and whose it is."""

    nbytes: int
    by: str


def told_memory(*, software: bool) -> Told | None:
    """What this process holds of all cards now; None where nobody can tell.

    Args:
        software: the card is a renderer on the CPU.
    """
    if software:
        nbytes = anonymous_bytes()
        return None if nbytes is None else Told(nbytes, "the process")
    return _by_nvml() or _by_kernel()


def growth(before: Told | None, after: Told | None) -> Told | None:
    """What came since; a driver's answers are of cards alone, and a card was not open before."""
    if after is None or before is None or before.by != after.by:
        return after
    return Told(max(0, after.nbytes - before.nbytes), after.by)


def _by_nvml() -> Told | None:
    try:
        import pynvml  # noqa: PLC0415 - of nvidia-ml-py, which nobody must have
    except ImportError:
        return None
    try:
        pynvml.nvmlInit()
        cards = [pynvml.nvmlDeviceGetHandleByIndex(index) for index in range(pynvml.nvmlDeviceGetCount())]
        nbytes = sum(_largest(pynvml, part) for card in cards for part in _slices(pynvml, card))
        pynvml.nvmlShutdown()
    except pynvml.NVMLError:
        return None
    return Told(nbytes, "NVML") if nbytes else None


def _slices(nvml: Any, card: object) -> list[object]:
    """The slices of a card in MIG mode, which answer to everybody; the card where it is whole."""
    try:
        mode, _ = nvml.nvmlDeviceGetMigMode(card)
    except nvml.NVMLError:  # most cards know no such mode
        return [card]
    if mode != nvml.NVML_DEVICE_MIG_ENABLE:
        return [card]
    slices = []
    for index in range(nvml.nvmlDeviceGetMaxMigDeviceCount(card)):
        with suppress(nvml.NVMLError):  # no slice was made there
            slices.append(nvml.nvmlDeviceGetMigDeviceHandleByIndex(card, index))
    return slices


def _largest(nvml: Any, card: object) -> int:
    """What this process has on a card: one that computes and draws stands in both lists, with the same number."""
    lists = (nvml.nvmlDeviceGetComputeRunningProcesses, nvml.nvmlDeviceGetGraphicsRunningProcesses)
    mine = [process for ask in lists for process in ask(card) if process.pid == os.getpid()]
    return max((process.usedGpuMemory or 0 for process in mine), default=0)


def _by_kernel() -> Told | None:
    texts = []
    try:
        for path in FDINFO.iterdir():
            try:
                texts.append(path.read_text(encoding="ascii", errors="replace"))
            except OSError:  # closed since it was listed
                continue
    except OSError:
        return None
    nbytes = drm_bytes(texts)
    return Told(nbytes, "the kernel") if nbytes else None


def drm_bytes(texts: Iterable[str]) -> int:
    """Bytes that the files of ``fdinfo`` tell of: of the cards' own regions, or of all where there is none such.

    A client that was opened twice stands in two files, which say the same.
    """
    clients = {client[1]: text for text in texts if (client := CLIENT.search(text))}
    own, machine = 0, 0
    for text in clients.values():
        rows = [match.groupdict() for match in REGION.finditer(text)]
        sizes = {(row["what"], row["region"]): int(row["number"]) * UNITS[row["unit"]] for row in rows}
        for region in {region for _, region in sizes}:
            nbytes = next(sizes[what, region] for what in WHATS if (what, region) in sizes)
            if region.startswith(CARDS_OWN):
                own += nbytes
            else:
                machine += nbytes
    return own or machine
