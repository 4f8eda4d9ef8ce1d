"""The cpu backend: onnxruntime, weights fed from a memory-mapped pack.

One session per graph, however many blocks it serves. A step's weights are ``OrtValue``s laid over the mapped file:
nothing is copied or deserialised. A thread reads some chunks ahead, and what was used is given back: one chunk is
resident, the next are in the page cache, which keeps all for the next run.
"""

import contextlib
from collections.abc import Callable, Mapping
from concurrent.futures import Executor, ThreadPoolExecutor
from pathlib import Path

import numpy as np
import onnxruntime as ort
from numpy.typing import NDArray

from ...machine.memory import available_bytes
from ...machine.platforms.mapping import give_back, open_mapped, populate
from ...machine.threads import default_threads
from ...specs import FAMILIES, Family
from ..base import Array, BackendStatus, Limits, Offer, Opened
from ..device.residency import resident_chunks
from ..directory.dtypes import ELEMENT_TYPES
from ..directory.integrity import fingerprint, require_unchanged
from ..directory.manifest import IMAGES_MEET, Chunk, Manifest, Model, Step
from ..directory.tensorfile import TensorInfo
from ..errors import OutOfDeviceMemory, ShapeMismatch
from .converted import cpu_engines
from .fitting import explained, require_fitting
from .readahead import ReadAhead

AHEAD_BYTES = (512 << 20, 2 << 30)
"""How far the disk reads ahead, at least and at most; between them a quarter of the memory that is available. SigLIP2
computes longer than its pack is read; the disk uses that time for DINOv3's, where it is the other way round."""
ABREAST_BYTES = 256 << 20
"""Of chunks that are in use at a time by steps that need nothing of each other: 5 of the adapter's at full width."""


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
        self._reader = ThreadPoolExecutor(1, thread_name_prefix="i2l-read-ahead")
        self._stores: dict[Family, MappedPack] = {}
        ahead_bytes = bytes_ahead(available_bytes())
        following = None
        for family in reversed([family for family in FAMILIES if family in manifest.models]):
            model, kept = manifest.models[family], (resident or {}).get(family, frozenset())
            following = MappedPack(
                folder / model.pack, model, self._reader, self._threads, ahead_bytes, kept, following
            )
            self._stores[family] = following
        adapter = manifest.models.get("adapter")
        self._abreast = {step.graph for chunk in adapter.chunks for step in chunk.steps} if adapter else set()
        """Graphs that several threads run at a time."""
        self._engines: dict[str, OrtEngine] = {}
        self._manifest = manifest
        self.fingerprint = fingerprint(directory, [store.opened for store in self._stores.values()])

    def engine(self, graph: str) -> "OrtEngine":
        if graph not in self._engines:
            threads = 1 if graph in self._abreast else self._threads
            engine = OrtEngine(graph, self._graphs[graph], threads)
            require_fitting(graph, engine.inputs, engine.outputs, self._manifest)
            self._engines[graph] = engine
        return self._engines[graph]

    def store(self, family: Family) -> "MappedPack":
        """The weights of a model, if its pack is still the one that was opened."""
        self._stores[family].require_unchanged()
        return self._stores[family]

    def value(self, array: Array) -> ort.OrtValue:
        return ort.OrtValue.ortvalue_from_numpy(array)

    def array(self, value: ort.OrtValue) -> Array:
        return np.asarray(value.numpy(), dtype=np.float32)

    def later(self, values: Mapping[str, ort.OrtValue]) -> Callable[[], dict[str, Array]]:
        arrays = {name: self.array(value) for name, value in values.items()}
        return lambda: arrays

    def shrink(self, cause: OutOfDeviceMemory) -> None:
        raise cause

    def close(self) -> None:
        self._engines.clear()
        for store in self._stores.values():
            store.close()
        self._reader.shutdown()


def takes_batches(session: ort.InferenceSession) -> bool:
    """Whether the graph gives each picture of a batch what it gives it alone, to the bit."""
    return bool(session.get_modelmeta().custom_metadata_map.get(IMAGES_MEET) == "no")


class OrtEngine:
    """An onnxruntime session of one graph."""

    def __init__(self, graph: str, model: bytes, threads: int) -> None:
        options = ort.SessionOptions()
        options.intra_op_num_threads = threads
        options.log_severity_level = 3  # errors; warnings about unused outputs help nobody here
        self._graph = graph
        with explained(graph):
            self._session = ort.InferenceSession(model, options, providers=["CPUExecutionProvider"])
        self.inputs = self._session.get_inputs()
        self.activation: str = self.inputs[0].name
        self._shape = self.inputs[0].shape[1:]
        self.outputs = [output.name for output in self._session.get_outputs()]
        self._batches = takes_batches(self._session)

    def run(self, activation: ort.OrtValue, weights: Mapping[str, ort.OrtValue]) -> dict[str, ort.OrtValue]:
        shape = activation.shape()
        if list(shape[1:]) != list(self._shape):
            raise ShapeMismatch(self._graph, self.activation, str(list(shape)), str(["batch", *self._shape]))
        if self._batches or shape[0] == 1:
            return self._run(activation, weights)
        alone = [ort.OrtValue.ortvalue_from_numpy(image[None]) for image in activation.numpy()]
        each = [self._run(image, weights) for image in alone]
        return {name: _owning(np.concatenate([outputs[name].numpy() for outputs in each])) for name in self.outputs}

    def _run(self, activation: ort.OrtValue, weights: Mapping[str, ort.OrtValue]) -> dict[str, ort.OrtValue]:
        feed = {self.activation: activation, **weights}
        with explained(self._graph):
            return dict(zip(self.outputs, self._session.run_with_ort_values(self.outputs, feed), strict=True))


class MappedPack:
    """A pack in the process's address space.

    Args:
        path: the pack.
        model: what is in it.
        reader: one worker that reads ahead.
        threads: that compute.
        ahead_bytes: how far it may be ahead.
        resident: chunks that are not given back.
        following: the pack that is used after this one; its first chunks are read behind the last ones of this.
    """

    def __init__(
        self,
        path: Path,
        model: Model,
        reader: Executor,
        threads: int,
        ahead_bytes: int,
        resident: frozenset[Chunk],
        following: "MappedPack | None",
    ) -> None:
        self._map = open_mapped(path)
        self.opened = self._map.opened
        self._ahead = ReadAhead(path, self._map, reader)
        self._values: dict[str, dict[str, ort.OrtValue]] = {}
        self._tensors = model.tensors
        self._chunks = model.chunks
        self._following = following
        self.resident = resident
        largest = max(chunk.nbytes for chunk in model.chunks)
        self.slots = max(2, ahead_bytes // largest)
        self.abreast = max(1, min(threads, ABREAST_BYTES // largest))

    def prefetch(self, chunk: Chunk) -> None:
        self._ahead.begin(chunk.offset, chunk.nbytes)
        if chunk == self._chunks[-1] and self._following:
            self._following.prefetch_first()

    def prefetch_first(self) -> None:
        """Begin to bring in as many chunks as may be on their way."""
        for chunk in self._chunks[: self.slots]:
            self._ahead.begin(chunk.offset, chunk.nbytes)

    def require_unchanged(self) -> None:
        """Raise :class:`EngineFileChanged` if the pack is no longer what was opened."""
        require_unchanged(self._map)

    def acquire(self, chunk: Chunk) -> None:
        require_unchanged(self._map)
        self._ahead.wait(chunk.offset)
        populate(self._map, chunk.offset, chunk.nbytes)

    def weights(self, step: Step) -> Mapping[str, ort.OrtValue]:
        if step.name not in self._values:
            prefix = f"{step.name}."
            infos = {name.removeprefix(prefix): i for name, i in self._tensors.items() if name.startswith(prefix)}
            self._values[step.name] = {name: self._value(info) for name, info in infos.items()}
        return self._values[step.name]

    def release(self, chunk: Chunk) -> None:
        self._ahead.forget(chunk.offset)
        if chunk == self._chunks[-1]:  # before what was computed goes anywhere
            require_unchanged(self._map)
        if chunk not in self.resident:
            give_back(self._map, chunk.offset, chunk.nbytes)

    def close(self) -> None:
        self._ahead.close()
        self._values.clear()
        with contextlib.suppress(BufferError):  # an error's traceback still holds weights: the map goes when they go
            self._map.close()

    def _value(self, info: TensorInfo) -> ort.OrtValue:
        dtype, element_type = ELEMENT_TYPES[info.dtype]
        count = info.nbytes // np.dtype(dtype).itemsize
        flat: NDArray[np.generic] = np.frombuffer(self._map, dtype, count, info.offset)
        return ort.OrtValue.ortvalue_from_numpy_with_onnx_type(flat.reshape(info.shape), element_type)


def _owning(array: Array) -> ort.OrtValue:
    """A copy of an array with memory of its own: ``ortvalue_from_numpy`` borrows it, and so does what is made of it."""
    value = ort.OrtValue.ortvalue_from_shape_and_type(array.shape, array.dtype.type)
    value.update_inplace(array)
    return value


def bytes_ahead(available: int | None) -> int:
    """How far to read ahead with so much memory available: what is read too early is dropped before it is used."""
    least, most = AHEAD_BYTES
    return least if available is None else min(max(available // 4, least), most)


def find_cpu() -> BackendStatus:
    """It works wherever onnxruntime does."""
    return BackendStatus("cpu", works=True, reason=f"onnxruntime {ort.__version__}")


def open_cpu(engines: Path, manifest: Manifest, limits: Limits) -> Opened:
    """Open an engines directory, or the int8 form of an fp8 one, which is made now if it is not there.

    Raises:
        ManifestInvalid, CpuPacksUnwritable, DiskFull: see :func:`.converted.cpu_engines`.
        BudgetTooSmall: the largest chunk is over the budget for weights that stay.
    """
    directory, running = cpu_engines(engines, manifest, threads=limits.threads, report=limits.report)
    kept = {}
    if limits.ram_budget_bytes is not None:
        chunks = {family: model.chunks for family, model in running.models.items()}
        kept = resident_chunks(chunks, limits.ram_budget_bytes)
    return Opened(CpuBackend(directory, running, limits.threads, kept), manifest, running, directory)


OFFER = Offer(find_cpu, open_cpu, arithmetic={"int8": "int8"})
