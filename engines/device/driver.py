"""What every backend on a CUDA card needs of the machine, as far as that can be told without opening the card."""

import ctypes
import importlib.util
import re
from collections.abc import Mapping
from pathlib import Path

from ..base import BackendStatus, CardFacts

NAME_BYTES = 256


def without_driver(name: str) -> BackendStatus | None:
    """Name what the machine lacks first."""
    if _driver_library() is None:
        return BackendStatus(name, works=False, reason="no NVIDIA driver on this machine", remedy="use --backend cpu")
    return None


def without_cuda_python(name: str) -> BackendStatus | None:
    """Name the package of cuda-python that is used, if it is not there."""
    if importlib.util.find_spec("cuda") is None or importlib.util.find_spec("cuda.bindings") is None:
        reason, remedy = "cuda.bindings of cuda-python is not installed", f'pip install "i2l-engines[{name}]"'
        return BackendStatus(name, works=False, reason=reason, remedy=remedy)
    return None


def on_cards(name: str, what: str, libraries: Mapping[str, str]) -> BackendStatus:
    """It could run, on these cards."""
    cards = nvidia_cards(libraries)
    if not cards:
        remedy = "see what nvidia-smi says, or use --backend cpu"
        return BackendStatus(name, works=False, reason="the NVIDIA driver finds no GPU", remedy=remedy)
    return BackendStatus(name, works=True, reason=what, cards=cards)


def nvidia_cards(libraries: Mapping[str, str]) -> tuple[CardFacts, ...]:
    """The cards that CUDA sees, in its order, without opening one.

    Args:
        libraries: ``package -> version`` of what will compute there.
    """
    cuda = _driver_library()
    if cuda is None or cuda.cuInit(0):
        return ()
    count, version, name = ctypes.c_int(), ctypes.c_int(), ctypes.create_string_buffer(NAME_BYTES)
    if cuda.cuDeviceGetCount(ctypes.byref(count)) or cuda.cuDriverGetVersion(ctypes.byref(version)):
        return ()
    release = driver_release() or f"for CUDA {version.value // 1000}.{version.value % 1000 // 10}"
    names = []
    for index in range(count.value):
        device = ctypes.c_int()
        if not cuda.cuDeviceGet(ctypes.byref(device), index):
            cuda.cuDeviceGetName(name, NAME_BYTES, device)
            names.append(name.value.decode(errors="replace"))
    return tuple(CardFacts(card, release, dict(libraries)) for card in names)


def driver_release(path: Path = Path("/proc/driver/nvidia/version")) -> str:
    """The driver's own version, such as 580.95.05; empty where the system does not tell."""
    try:
        found = re.search(r"Module\S*(?: for \S+)?\s+(\d+(?:\.\d+)+)", path.read_text(encoding="utf-8"))
    except OSError:
        return ""
    return found[1] if found else ""


def _driver_library() -> ctypes.CDLL | None:
    """As the loader finds it: in containers only LD_LIBRARY_PATH names it, which ``find_library`` does not look at."""
    for library in ("libcuda.so.1", "nvcuda.dll"):
        try:
            return ctypes.CDLL(library)
        except OSError:
            continue
    return None
