"""Which backends work here, and why the others do not."""

import ctypes.util
import importlib.util
from dataclasses import dataclass

from ..machine.errors import PackageMissing
from .errors import BackendUnavailable
from .tensorrt.library import current_sm, find_flavour, knows

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
    return _without_cuda_python("cuda") or _untried("cuda", f"onnxruntime {onnxruntime.__version__}")


def _tensorrt() -> BackendStatus:
    if status := _without_driver("tensorrt") or _without_tensorrt() or _without_cuda_python("tensorrt"):
        return status
    flavour = find_flavour()
    try:
        sm = current_sm()
    except BackendUnavailable:
        remedy = "see what nvidia-smi says, or use --backend cpu"
        return BackendStatus("tensorrt", works=False, reason="the NVIDIA driver finds no GPU", remedy=remedy)
    if not knows(flavour, sm):
        reason = f"{flavour} does not know this GPU, sm{sm}"
        return BackendStatus("tensorrt", works=False, reason=reason, remedy="use --backend cuda")
    return _untried("tensorrt", f"{flavour}, sm{sm}")


def _without_tensorrt() -> BackendStatus | None:
    try:
        find_flavour()
    except PackageMissing:
        reason, remedy = "tensorrt or tensorrt_rtx is not installed", "pip install 'i2l-engines[tensorrt]'"
        return BackendStatus("tensorrt", works=False, reason=reason, remedy=remedy)
    except (ImportError, OSError) as error:  # its libraries do not load
        remedy = "install it again, or use --backend cuda"
        return BackendStatus("tensorrt", works=False, reason=f"TensorRT does not load ({error})", remedy=remedy)
    return None


def _without_cuda_python(name: str) -> BackendStatus | None:
    for package in ("core", "bindings"):
        if importlib.util.find_spec("cuda") is None or importlib.util.find_spec(f"cuda.{package}") is None:
            reason, remedy = f"cuda.{package} of cuda-python is not installed", f"pip install 'i2l-engines[{name}]'"
            return BackendStatus(name, works=False, reason=reason, remedy=remedy)
    return None


def _untried(name: str, what: str) -> BackendStatus:
    reason = f"{what}; the code is there but was never run on a GPU: ask for it by name"
    return BackendStatus(name, works=True, reason=reason, remedy=f"try --backend {name}", proven=False)


def _without_driver(name: str) -> BackendStatus | None:
    """Name what the machine lacks first."""
    if ctypes.util.find_library("cuda") is None and ctypes.util.find_library("nvcuda") is None:
        return BackendStatus(name, works=False, reason="no NVIDIA driver on this machine", remedy="use --backend cpu")
    return None
