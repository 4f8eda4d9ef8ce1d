"""Windows' forms of what other systems do through ``madvise`` and ``/proc``.

Written by Microsoft's documentation of kernel32 and never run on Windows: the tests play the library. Nothing here is
needed for a right result, so where a call fails its caller goes on as on a system that has no such call.
"""

import ctypes
import sys
from typing import Any

ERROR_NOT_LOCKED = 158
"""What VirtualUnlock says of pages that were not locked: it has then taken them out of the working set."""
IN_USE = frozenset({5, 32, 33, 1224})
"""What the system says if a file that is to be replaced is open or mapped: access denied, sharing violation, lock
violation, user-mapped section open."""


class MemoryStatus(ctypes.Structure):
    """``MEMORYSTATUSEX``."""

    _fields_ = [
        ("dwLength", ctypes.c_uint32),
        ("dwMemoryLoad", ctypes.c_uint32),
        *((name, ctypes.c_ulonglong) for name in ("ullTotalPhys", "ullAvailPhys", "ullTotalPageFile")),
        *((name, ctypes.c_ulonglong) for name in ("ullAvailPageFile", "ullTotalVirtual", "ullAvailVirtual")),
        ("ullAvailExtendedVirtual", ctypes.c_ulonglong),
    ]


class MemoryCounters(ctypes.Structure):
    """``PROCESS_MEMORY_COUNTERS``."""

    _fields_ = [
        ("cb", ctypes.c_uint32),
        ("PageFaultCount", ctypes.c_uint32),
        *((name, ctypes.c_size_t) for name in ("PeakWorkingSetSize", "WorkingSetSize", "QuotaPeakPagedPoolUsage")),
        *((name, ctypes.c_size_t) for name in ("QuotaPagedPoolUsage", "QuotaPeakNonPagedPoolUsage")),
        *((name, ctypes.c_size_t) for name in ("QuotaNonPagedPoolUsage", "PagefileUsage", "PeakPagefileUsage")),
    ]


class MemoryRange(ctypes.Structure):
    """``WIN32_MEMORY_RANGE_ENTRY``."""

    _fields_ = [("VirtualAddress", ctypes.c_void_p), ("NumberOfBytes", ctypes.c_size_t)]


def kernel32() -> Any:
    """The library, with the arguments of what is used here.

    Raises:
        OSError: this is not Windows.
    """
    if sys.platform != "win32":
        raise OSError("there is no kernel32 on this system")
    library = ctypes.WinDLL("kernel32", use_last_error=True)
    library.GetCurrentProcess.restype = ctypes.c_void_p
    library.GlobalMemoryStatusEx.argtypes = [ctypes.POINTER(MemoryStatus)]
    library.K32GetProcessMemoryInfo.argtypes = [ctypes.c_void_p, ctypes.POINTER(MemoryCounters), ctypes.c_uint32]
    library.VirtualUnlock.argtypes = [ctypes.c_void_p, ctypes.c_size_t]
    library.PrefetchVirtualMemory.argtypes = [
        ctypes.c_void_p, ctypes.c_size_t, ctypes.POINTER(MemoryRange), ctypes.c_uint32,
    ]  # fmt: skip
    return library


def last_error() -> int:
    """Why the last call of the library failed."""
    if sys.platform != "win32":
        return 0
    return ctypes.get_last_error()


def memory_bytes() -> tuple[int, int] | None:
    """``(all, available)`` memory of the machine; None if Windows does not tell."""
    status = MemoryStatus(dwLength=ctypes.sizeof(MemoryStatus))
    if not kernel32().GlobalMemoryStatusEx(ctypes.byref(status)):
        return None
    return status.ullTotalPhys, status.ullAvailPhys


def peak_working_set_bytes() -> int:
    """The largest working set that this process has had; 0 if Windows does not tell."""
    library, counters = kernel32(), MemoryCounters(cb=ctypes.sizeof(MemoryCounters))
    if not library.K32GetProcessMemoryInfo(library.GetCurrentProcess(), ctypes.byref(counters), counters.cb):
        return 0
    return int(counters.PeakWorkingSetSize)


def drop_from_working_set(address: int, nbytes: int) -> bool:
    """Take pages out of this process's memory, clean ones of a file into the cache; whether that was done.

    VirtualUnlock is documented to do so with pages that are not locked, and to fail with :data:`ERROR_NOT_LOCKED`.
    """
    return bool(kernel32().VirtualUnlock(address, nbytes)) or last_error() == ERROR_NOT_LOCKED


def prefetch(address: int, nbytes: int) -> bool:
    """Read pages of a mapped file into memory in large pieces, not into the working set; since Windows 8."""
    library, region = kernel32(), MemoryRange(address, nbytes)
    return bool(library.PrefetchVirtualMemory(library.GetCurrentProcess(), 1, ctypes.byref(region), 0))
