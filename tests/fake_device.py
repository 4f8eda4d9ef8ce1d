"""A device that runs late and in any order that its events allow, to catch a streamer that forgot one.

Memory is real bytes, work is queued in two lanes, and a seeded choice decides which lane goes on. A copy lands in two
halves. So work that is not ordered by an event does, under some seed, see bytes of another chunk. Activations are
onnxruntime's, on the host.
"""

import ctypes
import random
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnxruntime as ort

from i2l.engines.base import Array
from i2l.engines.cpu.backend import OrtEngine
from i2l.engines.device import tensor
from i2l.engines.device.device import Lane, TimedCopy
from i2l.engines.directory.dtypes import ELEMENT_TYPES, FLOAT32
from i2l.engines.directory.tensorfile import TensorInfo
from i2l.errors import OutOfDeviceMemory

Work = Callable[[], None]


@dataclass
class Mark:
    """An event."""

    done: bool = False
    at: int = -1
    """How many pieces of work the device had done, if that was asked for."""


@dataclass(frozen=True)
class DeviceTensor:
    """A value of the fake device."""

    device: "FakeDevice"
    address: int
    info: TensorInfo

    def read(self) -> bytes:
        return self.device.read(self.address, self.info.nbytes)


class FakeDevice:
    """Implements :class:`Device`.

    Args:
        capacity_bytes: what can be allocated in all.
        seed: of the order of work.
        haste: probability that the copy lane goes on rather than the compute lane, where both can.
        failures: numbers of the allocations, counted from 0, that fail whatever is free.
    """

    name = "fake device"

    def __init__(
        self, capacity_bytes: int, *, seed: int = 0, haste: float = 0.5, failures: frozenset[int] = frozenset()
    ) -> None:
        self.capacity_bytes = capacity_bytes
        self.peak_bytes = 0
        self.allocations = 0
        self.copied: list[int] = []
        """Bytes of every copy that was asked for."""
        self.kept: list[int] = []
        """Bytes of what is to be kept in the host's memory."""
        self._memory: dict[int, bytearray] = {}
        self._timed: list[TimedCopy] | None = None
        self._lanes: dict[Lane, deque[Work | Mark]] = {"copy": deque(), "compute": deque()}
        self._done = 0
        self._random = random.Random(seed)
        self._haste = haste
        self._failures = failures

    @property
    def used_bytes(self) -> int:
        return sum(len(memory) for memory in self._memory.values())

    def free_bytes(self) -> int:
        return max(self.capacity_bytes - self.used_bytes, 0)

    def close(self) -> None:
        assert not self._memory, "closed before its memory was given back"

    def allocate(self, nbytes: int) -> int:
        number, self.allocations = self.allocations, self.allocations + 1
        if number in self._failures or nbytes > self.free_bytes():
            raise OutOfDeviceMemory(self.name, nbytes, self.free_bytes())
        address = self._placed(number, nbytes)
        self.peak_bytes = max(self.peak_bytes, self.used_bytes)
        return address

    def _placed(self, number: int, nbytes: int) -> int:
        address = (1 << 20) * (1 + number)
        self._memory[address] = bytearray(b"\xee" * nbytes)
        return address

    def free(self, address: int) -> None:
        assert not any(self._lanes.values()), "memory given back under running work"
        del self._memory[address]

    def copy_async(self, source: memoryview, address: int) -> None:
        self.copied.append(len(source))
        half = len(source) // 2
        begin = None if self._timed is None else self.record("copy", timed=True)
        self.enqueue("copy", lambda: self._write(address, source[:half]))
        self.enqueue("copy", lambda: self._write(address + half, source[half:]))
        if self._timed is not None:
            self._timed.append(TimedCopy(begin, self.record("copy", timed=True), len(source)))

    def time_copies(self, copies: list[TimedCopy] | None) -> None:
        self._timed = copies

    def pinned_rate(self, address: int, nbytes: int) -> float:
        """In bytes for a million pieces of work."""
        self.finish()
        begin = self.record("copy", timed=True)
        self.copy_async(memoryview(bytes(nbytes)), address)
        end = self.record("copy", timed=True)
        self.finish()
        return 1e6 * nbytes / self.elapsed_us(begin, end)

    def keep_on_host(self, sources: Sequence[memoryview], floor_bytes: int) -> None:  # noqa: ARG002
        self.kept = [source.nbytes for source in sources]

    def record(self, lane: Lane, *, timed: bool = False) -> Mark:
        mark = Mark()

        def done() -> None:
            mark.done = True
            if timed:
                mark.at = self._done

        self.enqueue(lane, done)
        return mark

    def elapsed_us(self, first: Mark, last: Mark) -> float:
        assert min(first.at, last.at) >= 0, "CUDA refuses events that are not timed or not done"
        return float(last.at - first.at)

    def wait(self, lane: Lane, event: Mark) -> None:
        self.enqueue(lane, event)

    def value(self, address: int, info: TensorInfo) -> DeviceTensor:
        assert address % 256 == 0, "TensorRT refuses such an address"
        return DeviceTensor(self, address, info)

    def upload(self, array: Array, address: int) -> ort.OrtValue:  # noqa: ARG002 - activations are on the host
        return ort.OrtValue.ortvalue_from_numpy(array)

    def download(self, value: ort.OrtValue) -> Array:
        return np.asarray(value.numpy(), np.float32)

    def fetch(self, values: Mapping[str, ort.OrtValue]) -> Callable[[], dict[str, Array]]:
        arrays = {name: self.download(value) for name, value in values.items()}
        return lambda: arrays

    def finish(self) -> None:
        self.drain("compute")
        self.drain("copy")

    # --- what only the fake has -----------------------------------------------------------------------------------

    def enqueue(self, lane: Lane, work: "Work | Mark") -> None:
        self._lanes[lane].append(work)
        for _ in range(self._random.randrange(4)):
            self._advance()

    def drain(self, lane: Lane) -> None:
        """Let time pass until a lane has nothing left to do."""
        while self._lanes[lane]:
            assert self._advance(), "both lanes wait for each other"

    def read(self, address: int, nbytes: int) -> bytes:
        memory, start = self._find(address, nbytes)
        return bytes(memory[start : start + nbytes])

    def array(self, tensor: DeviceTensor, dtype: type[np.generic]) -> np.ndarray:
        return np.frombuffer(tensor.read(), dtype).reshape(tensor.info.shape)

    def _advance(self) -> bool:
        able = list(self._able())
        if not able:
            return False
        lane = able[0] if len(able) == 1 else ("copy" if self._random.random() < self._haste else "compute")
        work = self._lanes[lane].popleft()
        self._done += 1
        if not isinstance(work, Mark):
            work()
        return True

    def _able(self) -> Iterator[Lane]:
        for lane, queue in self._lanes.items():
            if queue and not (isinstance(queue[0], Mark) and not queue[0].done):
                yield lane

    def _write(self, address: int, data: memoryview) -> None:
        memory, start = self._find(address, len(data))
        memory[start : start + len(data)] = data

    def _find(self, address: int, nbytes: int) -> tuple[bytearray, int]:
        for base, memory in self._memory.items():
            if base <= address and address + nbytes <= base + len(memory):
                return memory, address - base
        raise AssertionError(f"{nbytes} bytes at {address:#x} are not allocated")


class HostDevice(FakeDevice):
    """The fake device over real addresses, so that engines over pointers read what late work wrote."""

    sm = 89
    compute_stream = 77

    def _placed(self, number: int, nbytes: int) -> int:  # noqa: ARG002
        raw = np.full(nbytes + 256, 0xEE, np.uint8)
        start = -raw.ctypes.data % 256
        address = raw.ctypes.data + start
        self._memory[address] = memoryview(raw)[start : start + nbytes]  # type: ignore[assignment, arg-type]
        return address

    def value(self, address: int, info: TensorInfo) -> tensor.DeviceTensor:  # type: ignore[override]
        return tensor.DeviceTensor(address, tuple(info.shape), ELEMENT_TYPES[info.dtype][1])

    def upload(self, array: Array, address: int) -> tensor.DeviceTensor:
        data = np.ascontiguousarray(array, np.float32).tobytes()
        self.enqueue("compute", lambda: self._write(address, memoryview(data)))
        return tensor.DeviceTensor(address, array.shape, FLOAT32)

    def download(self, value: ort.OrtValue | tensor.DeviceTensor) -> Array:
        self.drain("compute")
        array = np.empty(value.shape(), np.float32)
        ctypes.memmove(array.ctypes.data, value.data_ptr(), array.nbytes)
        return array


class FakeEngine:
    """Reads its weights when the compute lane comes to it."""

    def __init__(self, device: FakeDevice, graph: str, path: Path, fail: Callable[[str], None]) -> None:
        self._engine = OrtEngine(graph, path.read_bytes(), 1)
        self._device, self._graph, self._fail = device, graph, fail
        self.activation = self._engine.activation

    def run(self, activation: ort.OrtValue, weights: Mapping[str, DeviceTensor]) -> dict[str, ort.OrtValue]:
        self._fail(self._graph)
        outputs: dict[str, ort.OrtValue] = {}

        def work() -> None:
            values = {}
            for name, weight in weights.items():
                dtype, element = ELEMENT_TYPES[weight.info.dtype]
                array = self._device.array(weight, dtype)
                values[name] = ort.OrtValue.ortvalue_from_numpy_with_onnx_type(array, element)
            outputs.update(self._engine.run(activation, values))

        self._device.enqueue("compute", work)
        self._device.drain("compute")
        return outputs
