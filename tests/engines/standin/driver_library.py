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
        launch = self._library.standin_launch
        launch.argtypes = (ctypes.c_void_p, FUNCTION, ctypes.c_int, ctypes.c_void_p)
        if launch(stream, function, len(ranges), ctypes.cast(rows, ctypes.c_void_p)):
            raise RuntimeError("CUDA_ERROR_ILLEGAL_ADDRESS while launching a kernel")

    def reset(self) -> None:
        """As after a start."""
        self._library.standin_reset()
        self._kept.clear()
