"""A backend in one file, as an outsider would write it: weights are read when a step asks. Slow, and right."""

from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
import onnxruntime as ort

from i2l.engines.base import Array, BackendStatus, Limits, Offer, Opened, Value
from i2l.engines.directory.dtypes import ELEMENT_TYPES
from i2l.engines.directory.manifest import Chunk, Manifest, Model, Step, inputs_of
from i2l.engines.directory.tensorfile import TensorInfo
from i2l.engines.errors import OutOfDeviceMemory
from i2l.specs import Family


class ToyEngine:
    def __init__(self, model: bytes) -> None:
        self._session = ort.InferenceSession(model, providers=["CPUExecutionProvider"])
        self._outputs = [output.name for output in self._session.get_outputs()]
        self.activation: str = self._session.get_inputs()[0].name

    def run(self, activation: Value, weights: Mapping[str, Value]) -> dict[str, Value]:
        feed = {self.activation: activation, **weights}
        return dict(zip(self._outputs, self._session.run_with_ort_values(self._outputs, feed), strict=True))


class ToyStore:
    slots, abreast, resident = 1, 1, frozenset[Chunk]()

    def __init__(self, pack: Path, model: Model) -> None:
        self._pack, self._model = pack, model

    def prefetch(self, chunk: Chunk) -> None: ...

    acquire = release = prefetch

    def weights(self, step: Step) -> Mapping[str, Value]:
        return {name: self._read(info) for name, info in inputs_of(step, self._model).items()}

    def _read(self, info: TensorInfo) -> Value:
        dtype, element = ELEMENT_TYPES[info.dtype]
        array = np.fromfile(self._pack, dtype, info.nbytes // np.dtype(dtype).itemsize, offset=info.offset)
        return ort.OrtValue.ortvalue_from_numpy_with_onnx_type(array.reshape(info.shape), element)


class ToyBackend:
    name, fingerprint = "toy", ""

    def __init__(self, build: Path, manifest: Manifest) -> None:
        self._graphs = {graph: (build / path).read_bytes() for graph, path in manifest.graphs.items()}
        self._stores = {family: ToyStore(build / model.pack, model) for family, model in manifest.models.items()}

    def engine(self, graph: str) -> ToyEngine:
        return ToyEngine(self._graphs[graph])

    def store(self, family: Family) -> ToyStore:
        return self._stores[family]

    def value(self, array: Array) -> Value:
        return ort.OrtValue.ortvalue_from_numpy(array)

    def array(self, value: Value) -> Array:
        return np.asarray(value.numpy(), dtype=np.float32)

    def later(self, values: Mapping[str, Value]) -> Callable[[], dict[str, Array]]:
        return lambda: {name: self.array(value) for name, value in values.items()}

    def shrink(self, cause: OutOfDeviceMemory) -> None:
        raise cause

    def close(self) -> None: ...


def open_toy(engines: Path, manifest: Manifest, _: Limits) -> Opened:
    return Opened(ToyBackend(engines / manifest.build, manifest), manifest, manifest)


OFFER = Offer(lambda: BackendStatus("toy", works=True, reason="it is a toy"), open_toy)
