"""Calls to the CUDA driver: one card's context, current in whatever thread calls, and every error as one of ours.

A context belongs to threads one by one: a call from a thread in which it was not made current fails. After some errors
(an illegal address, a card that fell off the bus) every later call fails too; so what gives things back must not stop
at the first failure.
"""

import logging
import threading
from collections.abc import Callable
from typing import Any, TypeVar

from ..errors import BackendUnavailable, DeviceFailed, OutOfDeviceMemory, WorkNotRepeatable

log = logging.getLogger(__name__)
T = TypeVar("T")
REMEDY = "see what nvidia-smi says, or use --backend cpu"


class DriverCalls:
    """The driver's functions on the card number ``index``.

    Args:
        index: among the cards that CUDA sees.
        backend: what it is opened for, for errors.

    Raises:
        BackendUnavailable: there is no driver or no such card.
        OutOfDeviceMemory, DeviceFailed: the card has no room for a context, or does not answer.
    """

    def __init__(self, index: int, backend: str) -> None:
        from cuda.bindings import driver  # noqa: PLC0415 - the leaf: nobody else pays for it

        self._driver = driver
        self._current = threading.local()
        self.name = f"GPU number {index}"
        try:
            status = driver.cuInit(0)[0]
        except RuntimeError as error:  # cuda-bindings finds no library of that name
            raise BackendUnavailable(backend, f"the NVIDIA driver does not load ({error})", REMEDY) from error
        if status != driver.CUresult.CUDA_SUCCESS:
            raise BackendUnavailable(backend, f"the NVIDIA driver does not start ({status.name})", REMEDY)
        count = self._called("cuDeviceGetCount")
        if index >= count:
            raise BackendUnavailable(backend, f"there is no GPU number {index} ({count} found)", REMEDY)
        self._device = self._called("cuDeviceGet", index)
        self.name = self._called("cuDeviceGetName", 256, self._device).split(b"\0")[0].decode(errors="replace")
        self._context = self._called("cuDevicePrimaryCtxRetain", self._device)

    @property
    def sm(self) -> int:
        """The compute capability, 89 for 8.9."""
        kinds = self._driver.CUdevice_attribute
        parts = (
            kinds.CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR,
            kinds.CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR,
        )
        major, minor = (int(self("cuDeviceGetAttribute", part, self._device)) for part in parts)
        return 10 * major + minor

    def __call__(self, function: str, *arguments: Any, wanted_bytes: int = 0) -> Any:
        """What a driver function gives.

        Raises:
            OutOfDeviceMemory: the card has no room for ``wanted_bytes``.
            DeviceFailed: any other error.
        """
        if not getattr(self._current, "is_here", False):
            self._called("cuCtxSetCurrent", self._context)
            self._current.is_here = True
        return self._called(function, *arguments, wanted_bytes=wanted_bytes)

    def give_back(self, function: str, *arguments: Any) -> None:
        """The same for what cannot be helped: a failure is logged, as a card that is lost refuses this too."""
        try:
            self(function, *arguments)
        except (DeviceFailed, OutOfDeviceMemory) as error:
            log.debug("while giving back: %s", error)

    def close(self) -> None:
        """Let the context go, which is alive as long as somebody else in this process holds it."""
        self.give_back("cuDevicePrimaryCtxRelease", self._device)

    def _called(self, function: str, *arguments: Any, wanted_bytes: int = 0) -> Any:
        status, *values = getattr(self._driver, function)(*arguments)
        if status == self._driver.CUresult.CUDA_ERROR_OUT_OF_MEMORY:
            found, *free = self._driver.cuMemGetInfo()
            known = found == self._driver.CUresult.CUDA_SUCCESS
            raise OutOfDeviceMemory(self.name, wanted_bytes, int(free[0]) if known else None)
        if status != self._driver.CUresult.CUDA_SUCCESS:
            raise DeviceFailed(self.name, f"{function}: {status.name}")
        return values[0] if len(values) == 1 else values


class CudaEvent:
    """A point in a stream; destroyed with this object."""

    def __init__(self, call: DriverCalls, stream: Any, *, timed: bool) -> None:
        flags = call._driver.CUevent_flags  # noqa: SLF001 - of this module
        self._call = call
        self.handle = call("cuEventCreate", (flags.CU_EVENT_DEFAULT if timed else flags.CU_EVENT_DISABLE_TIMING).value)
        call("cuEventRecord", self.handle, stream)

    def sync(self) -> None:
        """Wait until the point is reached."""
        self._call("cuEventSynchronize", self.handle)

    def __del__(self) -> None:
        if hasattr(self, "handle"):
            self._call.give_back("cuEventDestroy", self.handle)


class CudaGraph:
    """Work of a stream, recorded, to be launched again; destroyed with this object, once the stream is done with it.

    Recording is of the stream's kind that forbids nothing to anybody, other threads of this process included: what
    cannot be recorded still fails. Two things are recorded that must not be repeated, and a graph with one is refused:
    calls of the host, where libraries give back once what their work has used, and copies from the host's memory, which
    they may have given back.
    """

    def __init__(self, call: DriverCalls, stream: Any) -> None:
        self._call, self._stream = call, stream
        call("cuStreamBeginCapture", stream, call._driver.CUstreamCaptureMode.CU_STREAM_CAPTURE_MODE_RELAXED)  # noqa: SLF001

    def recorded(self, enqueue: Callable[[], T]) -> T:
        """Record what ``enqueue`` enqueues; what it gives."""
        try:
            given = enqueue()
        except BaseException:
            self._call.give_back("cuStreamEndCapture", self._stream)  # a part of it, or an error: nobody wants either
            raise
        graph = self._call("cuStreamEndCapture", self._stream)
        try:
            self._refuse_host(graph)
            self.handle = self._call("cuGraphInstantiate", graph, 0)
        finally:
            self._call.give_back("cuGraphDestroy", graph)
        return given

    def _refuse_host(self, graph: Any) -> None:
        call, driver = self._call, self._call._driver  # noqa: SLF001
        _, count = call("cuGraphGetNodes", graph)
        nodes, _ = call("cuGraphGetNodes", graph, count)
        for node in nodes:
            kind = call("cuGraphNodeGetType", node)
            if kind == driver.CUgraphNodeType.CU_GRAPH_NODE_TYPE_HOST:
                raise WorkNotRepeatable("a library's work calls the host")
            copies = kind == driver.CUgraphNodeType.CU_GRAPH_NODE_TYPE_MEMCPY
            if copies and not self._from_card(call("cuGraphMemcpyNodeGetParams", node)):
                raise WorkNotRepeatable("a library's work copies from the host's memory")

    def _from_card(self, copy: Any) -> bool:
        """Whether the source of a copy is memory of the card, and none that the host writes too.

        A copy that was asked for by plain addresses (``cuMemcpyAsync``) calls its source unified, wherever it lies.
        Memory that CUDA moves between host and card (managed) is told by an attribute of its own.
        """
        kinds, attributes = self._call._driver.CUmemorytype, self._call._driver.CUpointer_attribute  # noqa: SLF001
        if copy.srcMemoryType not in {kinds.CU_MEMORYTYPE_DEVICE, kinds.CU_MEMORYTYPE_UNIFIED}:
            return False

        def asked(attribute: Any) -> int:
            return int(self._call("cuPointerGetAttribute", attribute, copy.srcDevice))

        try:
            lies_in = asked(attributes.CU_POINTER_ATTRIBUTE_MEMORY_TYPE)
            managed = asked(attributes.CU_POINTER_ATTRIBUTE_IS_MANAGED)
        except DeviceFailed:  # it knows no such memory: the host's, pageable
            return False
        return lies_in == kinds.CU_MEMORYTYPE_DEVICE and not managed

    def launch(self) -> None:
        """Enqueue it all."""
        self._call("cuGraphLaunch", self.handle, self._stream)

    def __del__(self) -> None:
        if hasattr(self, "handle"):
            self._call.give_back("cuGraphExecDestroy", self.handle)
