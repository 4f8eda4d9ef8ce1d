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
    proven: bool = True
    """False: nobody has run it on such a device yet; ``auto`` passes it over."""


def detect_backends() -> tuple[BackendStatus, ...]:
    """The state of every backend, best last."""
    return (_cpu(), _cuda(), _tensorrt())


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
    best = [status for status in statuses.values() if status.works and status.proven][-1]
    passed = (status for status in statuses.values() if not (status.works and status.proven))
    others = "; ".join(f"{status.name}: {status.reason}" for status in passed)
    return best.name, f"auto: the best that works here ({others})"


def _cpu() -> BackendStatus:
    import onnxruntime  # noqa: PLC0415 - half a second that `i2l --help` must not pay

    return BackendStatus("cpu", works=True, reason=f"onnxruntime {onnxruntime.__version__}")


def _cuda() -> BackendStatus:
    import onnxruntime  # noqa: PLC0415 - as above

    if status := _without_driver("cuda"):
        return status
    if "CUDAExecutionProvider" not in onnxruntime.get_available_providers():
        remedy = "pip uninstall onnxruntime && pip install 'i2l-engines[cuda]'"
        return BackendStatus("cuda", works=False, reason="onnxruntime is the build for the CPU", remedy=remedy)
    for package in ("core", "bindings"):
        if importlib.util.find_spec("cuda") is None or importlib.util.find_spec(f"cuda.{package}") is None:
            reason = f"cuda.{package} of cuda-python is not installed"
            return BackendStatus("cuda", works=False, reason=reason, remedy="pip install 'i2l-engines[cuda]'")
    reason = f"onnxruntime {onnxruntime.__version__}; the code is there but was never run on a GPU: ask for it by name"
    return BackendStatus("cuda", works=True, reason=reason, remedy="try --backend cuda", proven=False)


def _tensorrt() -> BackendStatus:
    if status := _without_driver("tensorrt"):
        return status
    if not any(importlib.util.find_spec(module) for module in ("tensorrt", "tensorrt_rtx")):
        reason, remedy = "tensorrt or tensorrt_rtx is not installed", "pip install 'i2l-engines[tensorrt]'"
        return BackendStatus("tensorrt", works=False, reason=reason, remedy=remedy)
    reason = "this version of i2l builds plans for it but does not run them"
    return BackendStatus("tensorrt", works=False, reason=reason, remedy="use --backend cpu")


def _without_driver(name: str) -> BackendStatus | None:
    """Name what the machine lacks first."""
    if ctypes.util.find_library("cuda") is None and ctypes.util.find_library("nvcuda") is None:
        return BackendStatus(name, works=False, reason="no NVIDIA driver on this machine", remedy="use --backend cpu")
    return None
