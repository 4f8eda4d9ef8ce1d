"""The stand-in for the driver (driver.c), loaded, as far as it answers a test: counters, kernels, a fresh start."""

import ctypes
import os
import traceback
from collections.abc import Callable, Sequence
from typing import Any

FUNCTION = ctypes.CFUNCTYPE(None, ctypes.c_void_p)


class Driver:
    """The stand-in, as far as it answers a test."""

    def __init__(self) -> None:
        self._library = ctypes.CDLL("libcuda.so.1")
        self._kept: list[Any] = []
        self._nothing = FUNCTION(lambda _: None)
        self.hosts = ctypes.c_void_p()
        """Memory that the host writes, of a played library."""

    def __getattr__(self, name: str) -> int:
        function = getattr(self._library, f"standin_{name}")
        function.restype = ctypes.c_ulong
        return int(function())

    def launch(self, stream: int, work: Callable[[], None], ranges: Sequence[tuple[int, int, bool]]) -> None:
        """Enqueue a kernel."""

        def run(_: object) -> None:
            try:
                work()
            except BaseException:  # noqa: BLE001 - in a callback of C: nobody else would hear of it
                traceback.print_exc()
                os._exit(9)

        function = FUNCTION(run)
        self._kept.append(function)
        rows = (ctypes.c_ulong * 3 * len(ranges))(*[(ctypes.c_ulong * 3)(*row) for row in ranges])
        if os.environ.get("I2L_STANDIN_CALLS_HOST"):
            self._library.cuLaunchHostFunc(ctypes.c_void_p(stream), function, None)
            ranges, function = (), self._nothing
        if allocate := os.environ.get("I2L_STANDIN_COPIES_FROM"):
            written = next(start for start, nbytes, is_written in ranges if is_written and nbytes)
            self._copy_from_host(stream, allocate, written)
        launch = self._library.standin_launch
        launch.argtypes = (ctypes.c_void_p, FUNCTION, ctypes.c_int, ctypes.c_void_p)
        if launch(stream, function, len(ranges), ctypes.cast(rows, ctypes.c_void_p)):
            raise RuntimeError("CUDA_ERROR_ILLEGAL_ADDRESS while launching a kernel")

    def _copy_from_host(self, stream: int, allocate: str, address: int) -> None:
        """As a library does that keeps its kernels' arguments in memory that the host writes, by plain addresses."""
        if not self.hosts:
            getattr(self._library, allocate)(ctypes.byref(self.hosts), ctypes.c_size_t(64), 1)
        self._library.cuMemcpyAsync(ctypes.c_void_p(address), self.hosts, ctypes.c_size_t(1), ctypes.c_void_p(stream))

    def give_back(self) -> None:
        """What a played library holds."""
        if self.hosts:
            self._library.cuMemFreeHost(self.hosts)
        self.hosts = ctypes.c_void_p()

    def context_ended(self) -> None:
        """TensorRT's must not go while the card may compute."""
        if self.unfinished:
            self._library.standin_problem(b"a context of TensorRT DESTROYED in use")

    def reset(self) -> None:
        """As after a start."""
        self._library.standin_reset()
        self._kept.clear()
