"""What every backend on a CUDA card needs of the machine, as far as that can be told without opening the card."""

import ctypes.util
import importlib.util

from ..base import BackendStatus


def without_driver(name: str) -> BackendStatus | None:
    """Name what the machine lacks first."""
    if ctypes.util.find_library("cuda") is None and ctypes.util.find_library("nvcuda") is None:
        return BackendStatus(name, works=False, reason="no NVIDIA driver on this machine", remedy="use --backend cpu")
    return None


def without_cuda_python(name: str) -> BackendStatus | None:
    """Name the first package of cuda-python that is not there."""
    for package in ("core", "bindings"):
        if importlib.util.find_spec("cuda") is None or importlib.util.find_spec(f"cuda.{package}") is None:
            reason, remedy = f"cuda.{package} of cuda-python is not installed", f'pip install "i2l-engines[{name}]"'
            return BackendStatus(name, works=False, reason=reason, remedy=remedy)
    return None


def untried(name: str, what: str) -> BackendStatus:
    """It could run, but nobody ever ran it."""
    reason = f"{what}; the code is there but was never run on a GPU: ask for it by name"
    return BackendStatus(name, works=True, reason=reason, remedy=f"try --backend {name}", proven=False)
