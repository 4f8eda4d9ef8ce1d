"""A TensorRT plan made runnable.

Everything lies where the caller says: weights in slots of the device, the activation, the outputs and TensorRT's own
scratch in the :class:`Workspace`, so nothing is allocated while it runs and the budget knows every byte. What TensorRT
takes by itself is a context's code and constants.

All contexts compute on the one stream that the slots' events are recorded in, one after another. So they share the
scratch, and the host does not wait for them.

TensorRT and TensorRT-RTX differ in one thing here, :func:`context_config`: RTX compiles on the card.
"""

import math
import re
from collections.abc import Mapping
from typing import Any, Protocol

from ...machine.errors import I2LError
from ..device.device import Device, Workspace, aligned
from ..device.tensor import DeviceTensor
from ..directory.dtypes import FLOAT32
from ..errors import DeviceFailed, OutOfDeviceMemory, ShapeMismatch
from .library import Flavour, tensorrt_log, tensorrt_module
from .runtime_cache import RuntimeCache

NO_MEMORY = re.compile(r"out ?of ?memory|could not be allocated", re.IGNORECASE)
"""How TensorRT's allocator and CUDA behind it say that memory ran out."""
BYTES = re.compile(r"(\d+) bytes")


class Card(Device, Protocol):
    """A device that plans run on."""

    sm: int
    """The compute capability, 89 for 8.9."""

    @property
    def compute_stream(self) -> int:
        """The compute lane as a CUDA stream."""
        ...


class PlanRuntime:
    """Opens plans on a card.

    Args:
        flavour: the TensorRT that made them.
        card: where they run.
        workspace: where they compute.
        images: the most that an engine will get at once, within the plans' profile.
        cache: of compiled kernels.
    """

    def __init__(self, flavour: Flavour, card: Card, workspace: Workspace, images: int, cache: RuntimeCache) -> None:
        self.trt = tensorrt_module(flavour.name)
        self.flavour, self.card, self.workspace, self.images, self.cache = flavour, card, workspace, images, cache
        self.words = tensorrt_log(self.trt)
        self._runtime = self.trt.Runtime(self.words)
        self.where = f"{card.name} (sm{card.sm}, {flavour})"
        """For messages."""

    def open(self, graph: str, plan: bytes) -> "TensorRTEngine":
        """A plan as an engine; compiles, if TensorRT-RTX has not compiled it here before.

        Raises:
            OutOfDeviceMemory: it has no room.
            DeviceFailed: TensorRT refuses it; with its own words.
        """
        self.words.take()  # what was said before is not about this graph
        engine = self._runtime.deserialize_cuda_engine(plan)
        if engine is None:
            raise self.failure(graph, "its plan cannot be loaded")
        config = context_config(self, engine)
        context = engine.create_execution_context(config)
        if context is None:
            raise self.failure(graph, "no context can be made")
        self.cache.changed = True
        return TensorRTEngine(self, graph, engine, context, config)

    def failure(self, graph: str, what: str, wanted_bytes: int = 0) -> I2LError:
        """What went wrong, as an error of ours, in TensorRT's words."""
        words = "; ".join(word.strip() for word in self.words.take()) or "TensorRT gives no reason"
        if NO_MEMORY.search(words):
            wanted = max([wanted_bytes, *(int(number) for number in BYTES.findall(words))])
            return OutOfDeviceMemory(f"{self.where}, {graph} ({words}),", wanted, self.card.free_bytes())
        return DeviceFailed(self.where, f"{graph}: {what} ({words})")


def context_config(runtime: PlanRuntime, engine: Any) -> Any:
    """What a context is made with: no scratch of its own.

    TensorRT-RTX compiles kernels for each number of images. It is told to wait for them: by default it answers with
    others until they are ready, so two runs of one picture could differ.
    """
    trt = runtime.trt
    config = engine.create_runtime_config()
    config.set_execution_context_allocation_strategy(trt.ExecutionContextAllocationStrategy.USER_MANAGED)
    if runtime.flavour.name == "tensorrt_rtx":
        config.dynamic_shapes_kernel_specialization_strategy = trt.DynamicShapesKernelSpecializationStrategy.EAGER
        runtime.cache.enter(config)
    return config


class TensorRTEngine:
    """One graph; made by :meth:`PlanRuntime.open`."""

    def __init__(self, runtime: PlanRuntime, graph: str, engine: Any, context: Any, config: Any) -> None:
        trt = runtime.trt
        self._config = config  # nothing says that the context keeps it
        context.nvtx_verbosity = trt.ProfilingVerbosity.NONE  # detailed plans would name each kernel at each launch
        self._runtime, self._graph, self._engine, self._context = runtime, graph, engine, context
        names = [engine.get_tensor_name(index) for index in range(engine.num_io_tensors)]
        inputs = [name for name in names if engine.get_tensor_mode(name) == trt.TensorIOMode.INPUT]
        self.activation: str = next(name for name in inputs if -1 in tuple(engine.get_tensor_shape(name)))
        self._weights = [name for name in inputs if name != self.activation]
        self._outputs = [name for name in names if name not in inputs]
        assert all(engine.get_tensor_dtype(name) == trt.float32 for name in [self.activation, *self._outputs])
        self._shape = tuple(engine.get_tensor_shape(self.activation))[1:]
        self._prepared: tuple[int, int] = (0, 0)
        """Number of images and scratch that the context is set to."""
        self._seen: set[int] = set()

    @property
    def scratch_bytes(self) -> int:
        """Scratch for any number of images: not always the most images want most, as kernels differ."""
        return aligned(max(self._set_images(images) for images in range(1, self._runtime.images + 1)))

    @property
    def value_bytes(self) -> int:
        """The activation and the outputs of the most images, each where a tensor may begin."""
        self._set_images(self._runtime.images)
        shapes = [(self._runtime.images, *self._shape), *map(self._output_shape, self._outputs)]
        return sum(aligned(4 * math.prod(shape)) for shape in shapes)

    @property
    def layers(self) -> str:
        """What the inspector says of the layers and kernels, JSON."""
        inspector = self._engine.create_engine_inspector()
        inspector.execution_context = self._context
        return str(inspector.get_engine_information(self._runtime.trt.LayerInformationFormat.JSON))

    def run(self, activation: DeviceTensor, weights: Mapping[str, DeviceTensor]) -> dict[str, DeviceTensor]:
        self._runtime.words.take()
        self._prepare(tuple(activation.shape()))
        outputs = self._placed(activation)
        inputs = {self.activation: activation, **{name: weights[name] for name in self._weights}}
        for name, tensor in {**inputs, **outputs}.items():
            if not self._context.set_tensor_address(name, tensor.data_ptr()):
                raise self._runtime.failure(self._graph, f"it does not take {name}")
        if not self._context.execute_async_v3(self._runtime.card.compute_stream):
            raise self._runtime.failure(self._graph, "it does not run", self._runtime.workspace.scratch_bytes)
        return outputs

    def close(self) -> None:
        """Let TensorRT's objects go, the context first; the engine runs no more."""
        del self._context, self._config, self._engine

    def _prepare(self, shape: tuple[int, ...]) -> None:
        """Set the context to a number of images, and to the scratch, which moves when the plan shrinks."""
        most, workspace = self._runtime.images, self._runtime.workspace
        if shape[1:] != self._shape or not 0 < shape[0] <= most:
            wanted = f"{list(self._shape)} of 1 to {most} images"
            raise ShapeMismatch(self._graph, self.activation, str(list(shape)), wanted)
        if self._prepared == (shape[0], workspace.address):
            return
        self._prepared = (0, 0)
        needed = self._set_images(shape[0])
        if needed > workspace.scratch_bytes:
            what = f"it wants {needed} bytes of scratch, the plan counted {workspace.scratch_bytes}"
            raise self._runtime.failure(self._graph, what)
        self._context.set_device_memory(workspace.address, workspace.scratch_bytes)
        if self._runtime.words.errors:  # it returns nothing
            raise self._runtime.failure(self._graph, "it does not take its scratch")
        self._prepared = (shape[0], workspace.address)
        if shape[0] not in self._seen:
            self._seen.add(shape[0])
            self._runtime.cache.changed = True

    def _set_images(self, images: int) -> int:
        """Set the context to a number of images; the scratch that it wants for them."""
        self._prepared = (0, 0)
        if not self._context.set_input_shape(self.activation, (images, *self._shape)):
            raise self._runtime.failure(self._graph, f"it does not take {images} images")
        needed = int(self._context.update_device_memory_size_for_shapes())
        if not needed and self._runtime.words.errors:  # zero is also what it says when it cannot tell
            raise self._runtime.failure(self._graph, f"it does not say what {images} images need")
        return needed

    def _output_shape(self, name: str) -> tuple[int, ...]:
        return tuple(self._context.get_tensor_shape(name))

    def _placed(self, activation: DeviceTensor) -> dict[str, DeviceTensor]:
        shapes = {name: self._output_shape(name) for name in self._outputs}
        sizes = {name: 4 * math.prod(shape) for name, shape in shapes.items()}
        addresses = self._runtime.workspace.place(activation.data_ptr(), 4 * math.prod(activation.shape()), sizes)
        return {name: DeviceTensor(addresses[name], shape, FLOAT32) for name, shape in shapes.items()}
