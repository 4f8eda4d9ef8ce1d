"""The cpu backend: onnxruntime, weights fed from a memory-mapped pack.

One session per graph, however many blocks it serves. A step's weights are ``OrtValue``s laid over the mapped file:
nothing is copied or deserialised. Pages come in by ``madvise(WILLNEED)`` some chunks ahead and leave the process by
``madvise(DONTNEED)`` behind: one chunk is resident, the next are in the page cache, which keeps all for the next run.
"""

import contextlib
import mmap
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import onnxruntime as ort
from numpy.typing import NDArray

from ..errors import OutOfDeviceMemory, ShapeMismatch
from ..specs import Family
from .base import Array
from .manifest import Chunk, Manifest, Step
from .mapping import give_back, populate, read_ahead
from .tensorfile import TensorInfo
from .threads import default_threads

# safetensors dtype -> (numpy dtype of the same width, onnx.TensorProto element type): numpy knows neither bfloat16 nor
# FP8, and the runtime does without the onnx package.
ELEMENT_TYPES: Mapping[str, tuple[type[np.generic], int]] = {
    "F32": (np.float32, 1),
    "U8": (np.uint8, 2),
    "I8": (np.int8, 3),
    "BF16": (np.uint16, 16),
    "F8_E4M3": (np.uint8, 17),
}
AHEAD_BYTES = 512 << 20
"""How far the disk reads ahead. Small chunks are used up before the disk has begun with the next ones."""


class CpuBackend:
    """onnxruntime on the CPU over an engines directory."""

    name = "cpu"

    def __init__(
        self,
        directory: Path,
        manifest: Manifest,
        threads: int | None = None,
        resident: Mapping[Family, frozenset[Chunk]] | None = None,
    ) -> None:
        folder = directory / manifest.build
        self._threads = threads or default_threads()
        # Open from the start, so that a rebuild of the directory changes nothing here: 0.2 ms, where sessions take 80.
        self._graphs = {graph: (folder / path).read_bytes() for graph, path in manifest.graphs.items()}
        kept = resident or {}
        self._stores = {
            family: MappedPack(folder / model.pack, model.tensors, model.chunks, kept.get(family, frozenset()))
            for family, model in manifest.models.items()
        }
        self._engines: dict[str, OrtEngine] = {}

    def engine(self, graph: str) -> "OrtEngine":
        if graph not in self._engines:
            self._engines[graph] = OrtEngine(graph, self._graphs[graph], self._threads)
        return self._engines[graph]

    def store(self, family: Family) -> "MappedPack":
        return self._stores[family]

    def value(self, array: Array) -> ort.OrtValue:
        return ort.OrtValue.ortvalue_from_numpy(array)

    def array(self, value: ort.OrtValue) -> Array:
        return np.asarray(value.numpy(), dtype=np.float32)

    def shrink(self, cause: OutOfDeviceMemory) -> None:
        raise cause

    def close(self) -> None:
        self._engines.clear()
        for store in self._stores.values():
            store.close()


class OrtEngine:
    """An onnxruntime session of one graph."""

    def __init__(self, graph: str, model: bytes, threads: int) -> None:
        options = ort.SessionOptions()
        options.intra_op_num_threads = threads
        options.log_severity_level = 3  # errors; warnings about unused outputs help nobody here
        self._graph = graph
        self._session = ort.InferenceSession(model, options, providers=["CPUExecutionProvider"])
        first = self._session.get_inputs()[0]
        self.activation: str = first.name
        self._shape = first.shape[1:]
        self._outputs = [output.name for output in self._session.get_outputs()]

    def run(self, activation: ort.OrtValue, weights: Mapping[str, ort.OrtValue]) -> dict[str, ort.OrtValue]:
        shape = activation.shape()
        if list(shape[1:]) != list(self._shape):
            raise ShapeMismatch(self._graph, self.activation, str(list(shape)), str(["batch", *self._shape]))
        feed = {self.activation: activation, **weights}
        return dict(zip(self._outputs, self._session.run_with_ort_values(self._outputs, feed), strict=True))


class MappedPack:
    """A pack in the process's address space.

    Args:
        path: the pack.
        tensors: where they lie in it.
        chunks: all of the pack.
        resident: chunks that are not given back.
    """

    def __init__(
        self,
        path: Path,
        tensors: Mapping[str, TensorInfo],
        chunks: Sequence[Chunk],
        resident: frozenset[Chunk] = frozenset(),
    ) -> None:
        with path.open("rb") as file:
            self._map = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        self._values: dict[str, dict[str, ort.OrtValue]] = {}
        self._tensors = tensors
        self.resident = resident
        self.slots = max(2, AHEAD_BYTES // max(chunk.nbytes for chunk in chunks))

    def prefetch(self, chunk: Chunk) -> None:
        read_ahead(self._map, chunk.offset, chunk.nbytes)

    def acquire(self, chunk: Chunk) -> None:
        populate(self._map, chunk.offset, chunk.nbytes)

    def weights(self, step: Step) -> Mapping[str, ort.OrtValue]:
        if step.name not in self._values:
            prefix = f"{step.name}."
            infos = {name.removeprefix(prefix): i for name, i in self._tensors.items() if name.startswith(prefix)}
            self._values[step.name] = {name: self._value(info) for name, info in infos.items()}
        return self._values[step.name]

    def release(self, chunk: Chunk) -> None:
        if chunk not in self.resident:
            give_back(self._map, chunk.offset, chunk.nbytes)

    def close(self) -> None:
        self._values.clear()
        with contextlib.suppress(BufferError):  # an error's traceback still holds weights: the map goes when they go
            self._map.close()

    def _value(self, info: TensorInfo) -> ort.OrtValue:
        dtype, element_type = ELEMENT_TYPES[info.dtype]
        count = info.nbytes // np.dtype(dtype).itemsize
        flat: NDArray[np.generic] = np.frombuffer(self._map, dtype, count, info.offset)
        return ort.OrtValue.ortvalue_from_numpy_with_onnx_type(flat.reshape(info.shape), element_type)
