"""Which backends work here, and why the others do not."""

import ctypes.util
import importlib.util
from dataclasses import dataclass

from ..errors import BackendUnavailable

NAMES = ("cpu", "cuda", "tensorrt")


@dataclass(frozen=True)
class BackendStatus:
    """What was found out about a backend."""

    name: str
    works: bool
    reason: str
    remedy: str = ""
    """What to install or change; empty if it works."""


def detect_backends() -> tuple[BackendStatus, ...]:
    """The state of every backend, best last."""
    return (_cpu(), _gpu("cuda", ("onnxruntime",)), _gpu("tensorrt", ("tensorrt", "tensorrt_rtx")))


def choose_backend(name: str) -> tuple[str, str]:
    """``(backend, reason)``: the named one, or the best that works for ``auto``.

    Raises:
        BackendUnavailable: the named backend cannot run here.
    """
    statuses = {status.name: status for status in detect_backends()}
    if name != "auto":
        if name not in statuses:
            raise BackendUnavailable(name, "i2l has no such backend", f"use one of auto, {', '.join(NAMES)}")
        status = statuses[name]
        if not status.works:
            raise BackendUnavailable(name, status.reason, status.remedy)
        return name, "asked for"
    best = [status for status in statuses.values() if status.works][-1]
    others = "; ".join(f"{status.name}: {status.reason}" for status in statuses.values() if not status.works)
    return best.name, f"auto: the best that works here ({others})"


def _cpu() -> BackendStatus:
    import onnxruntime  # noqa: PLC0415 - half a second that `i2l --help` must not pay

    return BackendStatus("cpu", works=True, reason=f"onnxruntime {onnxruntime.__version__}")


def _gpu(name: str, modules: tuple[str, ...]) -> BackendStatus:
    """GPU backends: name what the machine lacks first, as that is what the user can change."""
    if ctypes.util.find_library("cuda") is None and ctypes.util.find_library("nvcuda") is None:
        return BackendStatus(name, works=False, reason="no NVIDIA driver on this machine", remedy="use --backend cpu")
    if not any(importlib.util.find_spec(module) for module in modules):
        install = f"pip install 'i2l-engines[{name}]'"
        return BackendStatus(name, works=False, reason=f"{' or '.join(modules)} is not installed", remedy=install)
    return BackendStatus(
        name, works=False, reason="this version of i2l computes on the CPU only", remedy="use --backend cpu"
    )
