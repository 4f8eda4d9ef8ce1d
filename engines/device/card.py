"""A CUDA card as a :class:`Device`: two streams, raw memory, events, copies from pinned memory.

Every call to CUDA is in this file. Streams and events are cuda-core's; memory comes from the driver's own functions,
since slots must not move and a pool would keep what the budget takes back.

A copy is asynchronous only from pinned memory. A pack is pinned where it lies, once, read-only. Where the driver
refuses that (it may for mapped files, and WSL caps pinned memory), the host copies each chunk into one of two pinned
buffers first, and waits for the copy that used the buffer before.
"""

import ctypes
import logging
import time
from dataclasses import dataclass
from typing import Any

import numpy as np

from ..base import Array
from ..directory.dtypes import ELEMENT_TYPES, FLOAT32
from ..directory.tensorfile import TENSOR_ALIGN, TensorInfo
from ..errors import BackendUnavailable, DeviceFailed, OutOfDeviceMemory
from .device import Event, Lane
from .tensor import DeviceTensor

log = logging.getLogger(__name__)
BUFFERS = 2
"""Pinned buffers where packs cannot be pinned: one is filled while the other is copied."""


@dataclass
class PinnedBuffer:
    """Host memory that a chunk passes through."""

    address: int
    nbytes: int
    copied: Event = None
    """Behind the last copy out of it."""


class CudaDevice:
    """The card number ``index``; used by one thread.

    Args:
        index: among the cards that CUDA sees.
        backend: what it is opened for, for errors.

    Raises:
        BackendUnavailable: there is no driver or no such card.
    """

    def __init__(self, index: int = 0, *, backend: str = "cuda") -> None:
        self._driver, self._device = open_card(index, backend)
        self.index = index
        self.name = str(self._device.name)
        major, minor = self._device.compute_capability
        self.sm = 10 * int(major) + int(minor)
        """The compute capability, 89 for 8.9."""
        options = _core().StreamOptions(nonblocking=True)
        self._streams: dict[Lane, Any] = {
            "copy": self._device.create_stream(options=options),
            "compute": self._device.create_stream(options=options),
        }
        self._pinned: dict[int, int] = {}
        self._buffers: list[PinnedBuffer] = []
        self._free_at_start = self.free_bytes()
        self.peak_bytes = 0
        """The most by which free memory fell since this device was opened, seen at allocations and downloads. Other
        programs count too; CUDA's context does not, as it was there before."""

    @property
    def compute_stream(self) -> int:
        """The compute lane's stream, as onnxruntime and TensorRT want it."""
        return int(self._streams["compute"].handle)

    # --- memory ---------------------------------------------------------------------------------------------------

    @property
    def used_bytes(self) -> int:
        return self._free_at_start - self.free_bytes()

    def free_bytes(self) -> int:
        free, _ = self._call("cuMemGetInfo")
        return int(free)

    def allocate(self, nbytes: int) -> int:
        address = int(self._call("cuMemAlloc", nbytes, wanted_bytes=nbytes))
        assert address % TENSOR_ALIGN == 0, "cuMemAlloc promises as much"
        self._look()
        return address

    def free(self, address: int) -> None:
        self._call("cuMemFree", address)

    def pin(self, memory: memoryview) -> None:
        """Pin a pack where it lies; where the driver refuses, copies go through buffers, which is said."""
        address = address_of(memory)
        flags = self._driver.CU_MEMHOSTREGISTER_READ_ONLY
        status = self._driver.cuMemHostRegister(address, memory.nbytes, flags)[0]
        if status == self._driver.CUresult.CUDA_SUCCESS:
            self._pinned[address] = memory.nbytes
            log.info("%s: pinned %d MiB of a pack where it lies", self.name, memory.nbytes >> 20)
        else:
            log.warning(
                "%s: the driver does not pin a pack of %d MiB (%s): its chunks are copied through %d pinned buffers, "
                "which the host fills", self.name, memory.nbytes >> 20, status.name, BUFFERS,
            )  # fmt: skip

    def close(self) -> None:
        """Give back what :meth:`allocate` did not give: pins and buffers."""
        self.finish()
        for address in self._pinned:
            self._call("cuMemHostUnregister", address)
        self._pinned.clear()
        while self._buffers:
            self._call("cuMemFreeHost", self._buffers.pop().address)

    def pinned_bandwidth(self, nbytes: int = 256 << 20, copies: int = 8) -> float:
        """Bytes per second of plain copies from pinned memory: what the streamer is measured against."""
        host = int(self._call("cuMemAllocHost", nbytes, wanted_bytes=nbytes))
        address = self.allocate(nbytes)
        try:
            seconds = []
            for _ in range(2):  # the first warms up
                self.finish()
                start = time.perf_counter()
                for _ in range(copies):
                    self._enqueue_copy(address, host, nbytes)
                self.finish()
                seconds.append(time.perf_counter() - start)
        finally:
            self.free(address)
            self._call("cuMemFreeHost", host)
        return copies * nbytes / seconds[-1]

    # --- lanes ----------------------------------------------------------------------------------------------------

    def copy_async(self, source: memoryview, address: int) -> None:
        host = address_of(source)
        if any(start <= host and host + source.nbytes <= start + nbytes for start, nbytes in self._pinned.items()):
            self._enqueue_copy(address, host, source.nbytes)
            return
        buffer = self._buffer(source.nbytes)
        ctypes.memmove(buffer.address, host, source.nbytes)
        self._enqueue_copy(address, buffer.address, source.nbytes)
        buffer.copied = self.record("copy")
        self._buffers.append(buffer)

    def record(self, lane: Lane, *, timed: bool = False) -> Event:
        return self._streams[lane].record(options=_core().EventOptions(timing_enabled=timed))

    def elapsed_us(self, first: Event, last: Event) -> float:
        return 1000 * float(last - first)  # cuda-core's difference is in milliseconds

    def wait(self, lane: Lane, event: Event) -> None:
        self._streams[lane].wait(event)

    def finish(self) -> None:
        for stream in self._streams.values():
            stream.sync()

    # --- values ---------------------------------------------------------------------------------------------------

    def value(self, address: int, info: TensorInfo) -> DeviceTensor:
        return DeviceTensor(address, tuple(info.shape), ELEMENT_TYPES[info.dtype][1])

    def upload(self, array: Array, address: int) -> DeviceTensor:
        array = np.ascontiguousarray(array, np.float32)
        self._streams["compute"].sync()  # the last pass may still read what lies there
        self._call("cuMemcpyHtoD", address, array.ctypes.data, array.nbytes)
        return DeviceTensor(address, array.shape, FLOAT32)

    def download(self, value: Any) -> Array:
        self._streams["compute"].sync()
        self._look()
        array = np.empty(value.shape(), np.float32)
        self._call("cuMemcpyDtoH", array.ctypes.data, value.data_ptr(), array.nbytes)
        return array

    # --------------------------------------------------------------------------------------------------------------

    def _buffer(self, nbytes: int) -> PinnedBuffer:
        """The pinned buffer that was used longest ago, large enough and no longer read."""
        if len(self._buffers) < BUFFERS:
            return PinnedBuffer(int(self._call("cuMemAllocHost", nbytes)), nbytes)
        buffer = self._buffers.pop(0)
        buffer.copied.sync()
        if buffer.nbytes < nbytes:
            self._call("cuMemFreeHost", buffer.address)
            return PinnedBuffer(int(self._call("cuMemAllocHost", nbytes)), nbytes)
        return buffer

    def _enqueue_copy(self, address: int, host: int, nbytes: int) -> None:
        self._call("cuMemcpyHtoDAsync", address, host, nbytes, self._streams["copy"].handle)

    def _look(self) -> None:
        self.peak_bytes = max(self.peak_bytes, self.used_bytes)

    def _call(self, function: str, *arguments: Any, wanted_bytes: int = 0) -> Any:
        """What a driver function gives; its error as ours."""
        status, *values = getattr(self._driver, function)(*arguments)
        if status == self._driver.CUresult.CUDA_ERROR_OUT_OF_MEMORY:
            raise OutOfDeviceMemory(self.name, wanted_bytes, self.free_bytes())
        if status != self._driver.CUresult.CUDA_SUCCESS:
            raise DeviceFailed(self.name, f"{function}: {status.name}")
        return values[0] if len(values) == 1 else values


def open_card(index: int, backend: str) -> tuple[Any, Any]:
    """``(driver functions, cuda-core's device)``, the device's context current in this thread."""
    from cuda.bindings import driver  # noqa: PLC0415 - the leaf: nobody else pays for it

    remedy = "see what nvidia-smi says, or use --backend cpu"
    status = driver.cuInit(0)[0]
    if status != driver.CUresult.CUDA_SUCCESS:
        raise BackendUnavailable(backend, f"the NVIDIA driver does not start ({status.name})", remedy)
    _, count = driver.cuDeviceGetCount()
    if index >= count:
        raise BackendUnavailable(backend, f"there is no GPU number {index} ({count} found)", remedy)
    device = _core().Device(index)
    device.set_current()
    return driver, device


def address_of(memory: memoryview) -> int:
    """Where the bytes lie in this process; read-only ones too, which ctypes does not tell."""
    return int(np.frombuffer(memory, np.uint8).ctypes.data)


def _core() -> Any:
    import cuda.core  # noqa: PLC0415 - the leaf, as above

    return cuda.core
