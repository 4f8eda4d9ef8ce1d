"""What a device must offer so that weights can stream to it: memory, two lanes of work, and events between them.

The host only enqueues. A lane does its work in order, and the two lanes know nothing of each other except through
events: ``record`` marks a point in a lane, ``wait`` keeps the later work of a lane back until the marked work is done.
(On CUDA a lane is a stream.) So all rules of streaming can be stated, and tested on a fake device, in these few calls.
"""

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol, TypeAlias, TypeVar

from ..base import Array, Value
from ..directory.tensorfile import TENSOR_ALIGN, TensorInfo
from ..errors import DeviceFailed, OutOfDeviceMemory

log = logging.getLogger(__name__)

Lane: TypeAlias = Literal["copy", "compute"]
Event: TypeAlias = Any
"""A marked point in a lane; only the device that made it looks inside."""


@dataclass(frozen=True)
class TimedCopy:
    """A copy of the copy lane between two timed events, without what it waited for and the filling of pinned memory."""

    begin: Event
    end: Event
    nbytes: int


class Device(Protocol):
    """One accelerator, used by one thread."""

    name: str

    @property
    def peak_bytes(self) -> int:
        """The most that was allocated at a time, as far as the device can tell."""
        ...

    def close(self) -> None:
        """Give back what is not given back by :meth:`free`."""
        ...

    def free_bytes(self) -> int:
        """Bytes that an allocation could get now."""
        ...

    def allocate(self, nbytes: int) -> int:
        """Address of new memory, a multiple of 256.

        Raises:
            OutOfDeviceMemory: there is not so much.
        """
        ...

    def free(self, address: int) -> None:
        """Give memory back that :meth:`allocate` gave, once all enqueued work is done."""
        ...

    def copy_async(self, source: memoryview, address: int) -> None:
        """Enqueue one copy from host to device in the copy lane; ``source`` must not change until it is done."""
        ...

    def keep_on_host(self, sources: Sequence[memoryview], floor_bytes: int) -> None:
        """These will be copied again and again, the ones most worth keeping first, instead of others.

        What makes their copies faster is kept, unless less than ``floor_bytes`` of the host's memory would be left.
        """
        ...

    @property
    def used_bytes(self) -> int:
        """What is allocated now, as far as the device can tell."""
        ...

    def record(self, lane: Lane, *, timed: bool = False) -> Event:
        """Mark the end of what was enqueued in a lane so far; ``timed``: for :meth:`elapsed_us`."""
        ...

    def elapsed_us(self, first: Event, last: Event) -> float:
        """Microseconds between two timed events, once both are done."""
        ...

    def time_copies(self, copies: list[TimedCopy] | None) -> None:
        """Add each copy that the copy lane makes from now on to a list; None: no more."""
        ...

    def pinned_rate(self, address: int, nbytes: int) -> float:
        """Bytes per second, by the device's events, of plain copies from pinned memory to this address.

        Raises:
            OutOfDeviceMemory: so much of the host's memory cannot be pinned.
        """
        ...

    def wait(self, lane: Lane, event: Event) -> None:
        """Keep what is enqueued in a lane from now on back until ``event``."""
        ...

    def value(self, address: int, info: TensorInfo) -> Value:
        """The tensor at an address, for the engines of this device."""
        ...

    def upload(self, array: Array, address: int) -> Value:
        """An array as a value at this address, once the computing that was enqueued is done."""
        ...

    def download(self, value: Value) -> Array:
        """A value as an array, once it is computed."""
        ...

    def fetch(self, values: Mapping[str, Value]) -> Callable[[], dict[str, Array]]:
        """Ask for an engine's outputs as arrays; the host waits when they are taken, once for all that was asked for.

        They are to be taken before the next upload.
        """
        ...

    def finish(self) -> None:
        """Wait until all enqueued work is done."""
        ...


@dataclass
class Workspace:
    """The memory that all engines of a device share, as they run one after another: scratch, then values.

    A graph's outputs lie at the end of the values away from its input. An only output may be the next graph's input
    there. So a value is good while the graph runs that reads it; what runs after that may write over it.
    """

    address: int = 0
    scratch_bytes: int = 0
    values_bytes: int = 0
    """Enough for the input and the outputs of any one graph."""

    @property
    def values_address(self) -> int:
        """The beginning of the values, where what the host uploads goes."""
        return self.address + self.scratch_bytes

    def place(self, input_address: int, input_bytes: int, sizes: Mapping[str, int]) -> dict[str, int]:
        """``output -> address`` for outputs of these sizes, clear of the input."""
        total = sum(map(aligned, sizes.values()))
        start = self.values_address
        if input_address < start + total and start < input_address + input_bytes:
            start += self.values_bytes - total
            assert input_address + input_bytes <= start, "the plan counted less than the input and the outputs"
        addresses = {}
        for name, nbytes in sizes.items():
            addresses[name] = start
            start += aligned(nbytes)
        return addresses


def aligned(nbytes: int) -> int:
    """Rounded up to where the next tensor may begin."""
    return -(-nbytes // TENSOR_ALIGN) * TENSOR_ALIGN


class Closing(Protocol):
    """What is ended by hand."""

    def close(self) -> None:
        """Let go of what a library made."""
        ...


EngineT = TypeVar("EngineT", bound=Closing)


def close_engines(engines: dict[str, EngineT]) -> None:
    """End engines before the card goes: whoever holds an error holds its frames, and they may know an engine."""
    for engine in engines.values():
        engine.close()
    engines.clear()


def finish_at_last(device: Device) -> None:
    """Wait for enqueued work before what it uses goes. Never raises: a card that is lost does no more of it."""
    try:
        device.finish()
    except (DeviceFailed, OutOfDeviceMemory) as error:
        log.debug("giving back what a card that does not answer had: %s", error)
