"""A card behind a plugin provider: values on it, sessions on it, and every failure as an error of ours.

A tensor there has no address: it is an ``OrtValue`` of fixed shape. One queue takes copies and computations in order,
so a value may be written while an earlier run still reads it: the copy comes behind. Only two things must be waited
for: results, and copies on their way, which the provider holds once more in memory of its own until the queue has come
to them. Reading any value waits for all that was asked for before; :meth:`PluginDevice.settle` reads the smallest.
"""

import re
from contextlib import ExitStack
from typing import Any
from weakref import WeakSet

import numpy as np
import onnxruntime as ort
from numpy.typing import NDArray
from onnxruntime.capi.onnxruntime_pybind11_state import EngineError, EPFail, Fail, RuntimeException

from ...machine.memory import available_bytes
from ..errors import OutOfDeviceMemory
from .errors import ProviderFailed
from .loading import ErrorLog, library_of, listening
from .providers import Provider
from .vulkan import VulkanCard

FAILURES = (RuntimeError, EngineError, EPFail, Fail, RuntimeException)
"""What onnxruntime and its providers raise."""
NO_MEMORY = re.compile(
    r"out.of.(device.|host.)?memory|error\(3\)|exceeds the max buffer size|failed to (allocate|create gpu buffer)",
    re.IGNORECASE,
)
"""How providers say that memory ran out: they have no error class for it."""


class DeviceValue:
    """A tensor on the card, which can be taken back whoever still holds this."""

    __slots__ = ("__weakref__", "held", "nbytes")

    def __init__(self, held: ort.OrtValue, nbytes: int = 0) -> None:
        self.held: ort.OrtValue | None = held
        self.nbytes = nbytes
        """0 of what a run made: that counts as the run's."""

    def shape(self) -> list[int]:
        assert self.held is not None, "the backend is closed"
        return [int(size) for size in self.held.shape()]


class PluginDevice:
    """One card, used by one thread.

    Args:
        provider: behind which it is.
        name: of the card, for errors.
        choice: what the provider is told about which card to take.
        index: among onnxruntime's devices.
        card: what Vulkan says of it, where it is asked.

    Raises:
        ProviderFailed: the provider does not come up.
    """

    def __init__(
        self, provider: Provider, name: str, *, choice: str = "", index: int = 0, card: VulkanCard | None = None
    ) -> None:
        self.name = name
        self._provider = provider
        self._card = card
        self._options = {**provider.options, **({provider.choice_option: choice} if choice else {})}
        self._index = index
        self._errors = ErrorLog(provider.error_log)
        self._values: WeakSet[DeviceValue] = WeakSet()
        self._unsettled_bytes = 0
        self._ran: dict[int, int] = {}
        """``session -> bytes`` that its runs computed in, which the provider keeps."""
        self.allocated_bytes = 0
        """The most at one time of values that were asked for by :meth:`allocate`; what runs take is the provider's."""
        self.staged_bytes = 0
        """The most at one time of copies on their way."""
        self.read_bytes = 0
        """Of the largest value that was read: it comes through a buffer that the provider keeps."""
        with ExitStack() as undo:
            self._library = library_of(provider)
            self._library.begin()
            undo.callback(self._library.end)
            undo.enter_context(listening(self._errors))
            self._opened = undo.pop_all()

    def open(self) -> None:
        """Allocate what waits; once the first session has brought the provider up."""
        self._smallest = self.allocate(np.float32, (1,))

    @property
    def peak_bytes(self) -> int:
        """The most of the card by this count: a provider tells neither what it holds nor what it keeps for reuse."""
        ran = sum(self._ran.values())
        copies = self.staged_bytes + self.read_bytes
        return self.allocated_bytes + copies + ran + self.reserved_bytes

    @property
    def reserved_bytes(self) -> int:
        """What the provider takes beside the tensors."""
        software = self._card is not None and self._card.kind == "software"
        return self._provider.reserved_in_software_bytes if software else self._provider.reserved_bytes

    # --- memory ---------------------------------------------------------------------------------------------------

    def free_bytes(self) -> int | None:
        """What an allocation could get now; None where nobody says."""
        if self._card is None:
            return None
        free = self._card.heap_bytes if self._card.free_bytes is None else self._card.free_bytes
        if self._card.kind in {"software", "integrated"}:  # its memory is the machine's
            free = min(free, available_bytes() or free)
        return free

    def allocate(self, dtype: type[np.generic], shape: tuple[int, ...]) -> DeviceValue:
        """A new value, not written yet.

        Raises:
            OutOfDeviceMemory: there is no room, as far as the provider says so.
            ProviderFailed: it is larger than the card lets a buffer be.
        """
        nbytes = int(np.prod(shape, dtype=np.int64)) * np.dtype(dtype).itemsize
        if self._card and nbytes > self._card.largest_bytes:
            reason = f"its buffers hold {self._card.largest_bytes} bytes at most, and a tensor needs {nbytes}"
            raise ProviderFailed(self._provider.backend, self.name, reason)
        try:
            held = ort.OrtValue.ortvalue_from_shape_and_type(list(shape), dtype, self._provider.memory, 0)
        except FAILURES as error:
            raise self._failure(str(error), nbytes) from error
        self._check(nbytes)
        value = self._keep(held, nbytes)
        self.allocated_bytes = max(self.allocated_bytes, sum(value.nbytes for value in self._values))
        return value

    def write(self, value: DeviceValue, array: NDArray[np.generic]) -> None:
        """Enqueue a copy to the card; the array is free again at once."""
        assert value.held is not None, "the device is closed"
        try:
            value.held.update_inplace(array)
        except FAILURES as error:
            raise self._failure(str(error), array.nbytes) from error
        self._check(array.nbytes)
        self._unsettled_bytes += array.nbytes
        self.staged_bytes = max(self.staged_bytes, self._unsettled_bytes)

    def read(self, value: DeviceValue) -> NDArray[Any]:
        """A value as an array, once it is computed."""
        assert value.held is not None, "the device is closed"
        try:
            array: NDArray[Any] = value.held.numpy()
        except FAILURES as error:
            raise self._failure(str(error), 0) from error
        self._check(array.nbytes)
        self._unsettled_bytes = 0
        self.read_bytes = max(self.read_bytes, array.nbytes)
        return array

    def settle(self) -> None:
        """Wait until no copy is on its way."""
        if self._unsettled_bytes:
            self.read(self._smallest)

    # --- sessions -------------------------------------------------------------------------------------------------

    def session(self, graph: str, model: bytes) -> ort.InferenceSession:
        """A session of a graph on the card."""
        options = ort.SessionOptions()
        options.intra_op_num_threads = 1
        options.log_severity_level = 3
        # In the graph's order, so that one dequantised matrix is used before the next is made: by default all come
        # first (203 against 123 MiB for six of 16 MiB).
        options.execution_order = ort.ExecutionOrder.PRIORITY_BASED
        # Or else a Squeeze behind DequantizeLinear would be done on bytes, with a QuantizeLinear on the CPU.
        options.add_session_config_entry("session.disable_quant_qdq", "1")
        options.add_session_config_entry("session.record_ep_graph_assignment_info", "1")
        self.add_provider(options)
        try:
            session = ort.InferenceSession(model, options)
        except FAILURES as error:
            raise self._failure(f"{graph}: {error}", len(model)) from error
        self._check(len(model))
        self._library.made.add(session)
        return session

    def add_provider(self, options: ort.SessionOptions) -> None:
        """Make the provider the session's."""
        options.add_provider_for_devices([self._library.devices()[self._index]], self._options)

    def run(
        self, session: ort.InferenceSession, feed: dict[str, DeviceValue], outputs: list[str], wanted_bytes: int
    ) -> dict[str, DeviceValue]:
        """Enqueue a run that computes in so many bytes; what comes out stays on the card."""
        binding = session.io_binding()
        self._library.made.add(binding)
        for name, value in feed.items():
            binding.bind_ortvalue_input(name, value.held)
        for name in outputs:
            binding.bind_output(name, self._provider.memory, 0)
        try:
            session.run_with_iobinding(binding)
        except FAILURES as error:
            raise self._failure(str(error), wanted_bytes) from error
        self._check(wanted_bytes)
        self._ran[id(session)] = wanted_bytes
        return {name: self._keep(held) for name, held in zip(outputs, binding.get_outputs(), strict=True)}

    def close(self) -> None:
        """Give everything back. Whoever still holds a value holds nothing."""
        for value in self._values:
            value.held = None
        self._opened.close()

    # --------------------------------------------------------------------------------------------------------------

    def _keep(self, held: ort.OrtValue, nbytes: int = 0) -> DeviceValue:
        self._library.made.add(held)
        value = DeviceValue(held, nbytes)
        self._values.add(value)
        return value

    def _check(self, nbytes: int) -> None:
        """Raise what the provider has only logged."""
        if self._errors.messages:
            messages = "; ".join(self._errors.messages)
            self._errors.messages.clear()
            raise self._failure(messages, nbytes)

    def _failure(self, message: str, nbytes: int) -> OutOfDeviceMemory | ProviderFailed:
        logged = "; ".join(self._errors.messages)
        self._errors.messages.clear()
        if NO_MEMORY.search(f"{message}; {logged}"):
            return OutOfDeviceMemory(self.name, nbytes, self.free_bytes())
        line = next((line.strip() for line in message.splitlines() if line.strip()), "it says nothing")
        return ProviderFailed(self._provider.backend, self.name, line)
