"""A TensorRT played over host memory: its plans are ONNX files, its contexts compute with onnxruntime, late.

It has what i2l calls of ``tensorrt_rtx`` and no more, and is strict where the real one is undefined: pointers must be
aligned and set, scratch must be large enough. A context overwrites the scratch that it was given.
"""

import ctypes
import hashlib
import importlib.machinery
import itertools
import json
import math
import types
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import onnxruntime as ort

from fake_device import HostDevice
from i2l.engines.cuda.session import CpuTarget, OrtDeviceEngine
from i2l.engines.device.device import Workspace
from i2l.engines.device.tensor import DeviceTensor
from i2l.engines.directory.manifest import read_manifest, spec_hash
from i2l.engines.tensorrt.plans import BATCHES, FACTS, PlanFacts, PlanKey, plans_folder, plans_to_json

ELEMENTS = {"tensor(float)": 1, "tensor(uint8)": 2, "tensor(int8)": 3, "tensor(bfloat16)": 16}
BYTES = {"tensor(float)": 4, "tensor(bfloat16)": 2}
LARGEST_BATCH = 8
Fail = Callable[[str], str]
"""Told ``load``, ``context``, ``size``, ``scratch`` or ``run`` before that is done; an error message makes it fail."""
Launch = Callable[[int, Callable[[], None], Sequence[tuple[int, int, bool]]], None]


def in_lane(device: HostDevice | None) -> Launch:
    """Work goes into the compute lane of a device of the tests."""
    assert device is not None

    def launch(stream: int, work: Callable[[], None], _: Sequence[tuple[int, int, bool]]) -> None:
        assert stream == device.compute_stream
        device.enqueue("compute", work)

    return launch


def write_plans(directory: Path, graphs: Mapping[str, bytes], flavour: str = "tensorrt_rtx", sm: int = 89) -> None:
    """Plans that the played TensorRT reads: the graphs themselves."""
    manifest = read_manifest(directory)
    folder = plans_folder(directory, sm, manifest.precision)
    folder.mkdir(parents=True, exist_ok=True)
    facts = {}
    for graph, data in graphs.items():
        digest = hashlib.sha256(data).hexdigest()
        spec = next(model.spec for model in manifest.models.values() if graph.startswith(model.spec.family))
        key = PlanKey(digest, spec_hash(spec), flavour, "1.7.1", sm, manifest.precision, BATCHES)
        facts[graph] = PlanFacts(key, digest, len(data), 0)
        for suffix in ("onnx", "plan"):
            (folder / f"{graph}.{suffix}").write_bytes(data)
    (folder / FACTS).write_text(plans_to_json(facts))


def own_graphs(directory: Path) -> dict[str, bytes]:
    """The CPU's graphs."""
    manifest = read_manifest(directory)
    return {graph: (directory / manifest.build / path).read_bytes() for graph, path in manifest.graphs.items()}


class Played:
    """One played TensorRT and what happened to it.

    Args:
        device: whose memory it computes in.
        fail: see :data:`Fail`.
        scratch: bytes of scratch for a number of images.
        rtx: play TensorRT-RTX, or else TensorRT, which has no runtime cache.
        launch: puts work into a stream: ``(stream, work, [(address, bytes, written)])``; by default the device's lane.
        ended: called where a context goes.
    """

    def __init__(
        self,
        device: Any,
        *,
        fail: Fail = lambda _: "",
        scratch: Callable[[int], int] = lambda images: 1000 * images,
        rtx: bool = True,
        launch: "Launch | None" = None,
        ended: Callable[[], None] = lambda: None,
    ) -> None:
        self.device, self.fail, self.scratch = device, fail, scratch
        self.launch = launch or in_lane(device)
        self.ended = ended
        self.name = "tensorrt_rtx" if rtx else "tensorrt"
        self.accepts_cache = True
        self.loaded_cache = b""
        self.configs: list[PlainConfig] = []
        self.said: Callable[[str], None] = lambda _: None
        self.compiled: set[tuple[str, int]] = set()
        self.module = types.ModuleType(self.name)
        self.module.__spec__ = importlib.machinery.ModuleSpec(self.name, None)
        members: dict[str, Any] = {
            "__version__": "1.7.1",
            "ILogger": Logger,
            "float32": "float32",
            "Runtime": lambda log: Runtime(self, log),
            "TensorIOMode": types.SimpleNamespace(INPUT="input", OUTPUT="output"),
            "ProfilingVerbosity": types.SimpleNamespace(NONE="none", DETAILED="detailed"),
            "ExecutionContextAllocationStrategy": types.SimpleNamespace(USER_MANAGED="user managed"),
            "LayerInformationFormat": types.SimpleNamespace(JSON="json"),
        }
        if rtx:
            members["ComputeCapability"] = types.SimpleNamespace(SM86=86, SM89=89, SM120=120)
            members["DynamicShapesKernelSpecializationStrategy"] = types.SimpleNamespace(EAGER="eager")
        vars(self.module).update(members)

    def fails(self, what: str) -> bool:
        """Whether a step fails; then it is in the log."""
        if message := self.fail(what):
            self.said(message)
        return bool(message)


class Logger:
    ERROR, INTERNAL_ERROR = "error", "internal error"


class Runtime:
    def __init__(self, played: Played, log: Any) -> None:
        self._played = played
        played.said = lambda message: log.log(Logger.ERROR, message)

    def deserialize_cuda_engine(self, plan: bytes) -> "Engine | None":
        return None if self._played.fails("load") else Engine(self._played, plan)


class Engine:
    def __init__(self, played: Played, plan: bytes) -> None:
        self.played = played
        self.runner = OrtDeviceEngine("played", plan, CpuTarget(), Workspace())
        session: ort.InferenceSession = self.runner._session
        self.inputs = {value.name: value for value in session.get_inputs()}
        self.tensors = {value.name: value for value in (*session.get_inputs(), *session.get_outputs())}
        self.num_io_tensors = len(self.tensors)

    def get_tensor_name(self, index: int) -> str:
        return str(list(self.tensors)[index])

    def get_tensor_mode(self, name: str) -> str:
        return "input" if name in self.inputs else "output"

    def get_tensor_shape(self, name: str) -> Iterator[int]:
        return iter(size if isinstance(size, int) else -1 for size in self.tensors[name].shape)

    def get_tensor_dtype(self, name: str) -> str:
        return {"tensor(float)": "float32"}.get(self.tensors[name].type, "other")

    def create_runtime_config(self) -> "PlainConfig":
        self.played.configs.append(Config(self.played) if self.played.name == "tensorrt_rtx" else PlainConfig())
        return self.played.configs[-1]

    def create_execution_context(self, config: "PlainConfig") -> "Context | None":
        assert config.strategy == "user managed"
        return None if self.played.fails("context") else Context(self)

    def create_engine_inspector(self) -> "Inspector":
        return Inspector()


class PlainConfig:
    """TensorRT's."""

    strategy = ""

    def set_execution_context_allocation_strategy(self, strategy: str) -> None:
        self.strategy = strategy


class Config(PlainConfig):
    """TensorRT-RTX's."""

    dynamic_shapes_kernel_specialization_strategy = "lazy"

    def __init__(self, played: Played) -> None:
        self._played = played
        self.cache: Cache | None = None

    def create_runtime_cache(self) -> "Cache":
        return Cache(self._played)

    def set_runtime_cache(self, cache: "Cache") -> bool:
        self.cache = cache
        return True


class Cache:
    def __init__(self, played: Played) -> None:
        self._played = played

    def deserialize(self, data: bytes) -> bool:
        if self._played.accepts_cache:
            self._played.loaded_cache = data
        return self._played.accepts_cache

    def serialize(self) -> bytes:
        return json.dumps(sorted(self._played.compiled)).encode()


class Inspector:
    execution_context: Any = None

    def get_engine_information(self, form: str) -> str:
        assert (form, self.execution_context is not None) == ("json", True)
        return '{"Layers": ["product_gemm"]}'


class Context:
    nvtx_verbosity = "detailed"

    def __init__(self, engine: Engine) -> None:
        self._engine, self._played = engine, engine.played
        self._images = 0
        self._sized = False
        self._scratch = (0, 0)
        self._addresses: dict[str, int] = {}

    def __del__(self) -> None:
        self._played.ended()

    def set_input_shape(self, name: str, shape: tuple[int, ...]) -> bool:
        assert name == self._engine.runner.activation
        assert list(shape[1:]) == self._engine.inputs[name].shape[1:]
        self._images, self._sized = shape[0], False
        return 1 <= self._images <= LARGEST_BATCH

    def update_device_memory_size_for_shapes(self) -> int:
        self._sized = True
        return 0 if self._played.fails("size") else self._played.scratch(self._images)

    def set_device_memory(self, address: int, nbytes: int) -> None:
        assert self._sized, "its parts of the scratch are those of other shapes"
        assert nbytes >= self._played.scratch(self._images)
        if not self._played.fails("scratch"):
            self._scratch = (address, nbytes)

    def get_tensor_shape(self, name: str) -> Iterator[int]:
        return iter(size if isinstance(size, int) else self._images for size in self._engine.tensors[name].shape)

    def set_tensor_address(self, name: str, address: int) -> bool:
        assert address % 256 == 0
        self._addresses[name] = address
        return name in self._engine.tensors

    def execute_async_v3(self, stream: int) -> bool:
        assert self._addresses.keys() == self._engine.tensors.keys()
        assert self._sized
        if self._played.fails("run"):
            return False
        self._played.compiled.add((self._engine.runner.activation, self._images))
        work = self._work(dict(self._addresses), self._scratch)
        try:
            self._played.launch(stream, work, [*self._ranges(), (*self._scratch, True)])
        except RuntimeError as error:  # a card that is lost; TensorRT raises nothing
            self._played.said(str(error))
            return False
        return True

    def _ranges(self) -> Iterator[tuple[int, int, bool]]:
        """``(address, bytes, written)`` of every tensor."""
        for name, address in self._addresses.items():
            values = math.prod(self.get_tensor_shape(name))
            yield address, values * BYTES.get(self._engine.tensors[name].type, 1), name not in self._engine.inputs

    def _work(self, addresses: dict[str, int], scratch: tuple[int, int]) -> Callable[[], None]:
        shapes = {name: tuple(self.get_tensor_shape(name)) for name in addresses}
        values = {
            name: DeviceTensor(address, shapes[name], ELEMENTS.get(self._engine.tensors[name].type, 17))
            for name, address in addresses.items()
        }

        def work() -> None:
            ctypes.memset(scratch[0], 0xDD, scratch[1])
            for name in set(shapes) - set(self._engine.inputs):  # before the input is read: they may not overlap
                ctypes.memset(addresses[name], 0xCC, 4 * math.prod(shapes[name]))
            inputs = {name: value for name, value in values.items() if name in self._engine.inputs}
            self._engine.runner.compute(inputs, {name: values[name] for name in values.keys() - inputs.keys()})

        return work


def failing(what: str, message: str, *, at: int = 0, times: int = 1) -> Fail:
    """The ``at``-th time of ``what``, and so many after it, fail."""
    count = itertools.count()
    return lambda step: message if step == what and at <= next(count) < at + times else ""
