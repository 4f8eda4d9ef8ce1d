"""A graph on onnxruntime whose inputs are raw pointers: weights in slots of a device, never copied by onnxruntime.

One class for the CUDA provider and for the CPU's, which reads host pointers in the same way and so tests the logic.
Everything lies where the plan says: the activation and the outputs among the workspace's values, what is computed in
between in its scratch (arena.py).

All sessions compute on the one stream that the slots' events are recorded in, and ``run`` does not wait for it. The
stream is ours. A session that is told functions for its memory takes no stream, so the arena is not told to sessions:
it is onnxruntime's shared allocator of the card while they open (:func:`registered`), and they keep what they find.
"""

import math
import re
import threading
import traceback
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import onnxruntime as ort
from onnxruntime.capi.onnxruntime_pybind11_state import Fail, RuntimeException

from ..device.device import Workspace, aligned
from ..device.tensor import DeviceTensor
from ..directory.dtypes import FLOAT32
from ..errors import DeviceFailed, OutOfDeviceMemory, ShapeMismatch
from .arena import Arena
from .errors import ProviderMissing
from .libraries import missing_libraries

WARNINGS, ERRORS, FATAL = 2, 3, 4
"""What onnxruntime writes to standard error: that and worse."""
NO_MEMORY = re.compile(
    r"out of memory|failed to allocate memory|available memory of \d+ is smaller|(CUBLAS|CUDNN)_STATUS_ALLOC_FAILED",
    re.IGNORECASE,
)
"""How the CUDA provider, its arena and cuBLAS say that memory ran out; they have no error class for it."""
CAUSE = re.compile(r"\b(?:CUDA|CUBLAS\w*|CUDNN\w*) (?:failure|error)\b[^;\n]*")
"""The part of onnxruntime's text that says what happened, among C++ templates, paths and the machine's name."""
REGISTERING = threading.Lock()
"""Onnxruntime has one shared allocator of each card for the whole process."""


@dataclass(frozen=True)
class CpuTarget:
    """The CPU provider over host pointers."""

    threads: int = 1
    kind: str = "cpu"
    index: int = 0
    provider: str = "CPUExecutionProvider"

    @property
    def options(self) -> dict[str, str]:
        return {}

    @contextmanager
    def opening(self, _: ort.SessionOptions) -> Iterator[None]:
        yield

    def refusal(self) -> None:
        return None


@dataclass(frozen=True)
class CudaTarget:
    """The CUDA provider in an arena."""

    arena: Arena
    stream: int
    """The compute lane's."""
    index: int = 0
    kind: str = "cuda"
    threads: int = 1
    provider: str = "CUDAExecutionProvider"

    @property
    def options(self) -> dict[str, str]:
        return {
            "device_id": str(self.index),
            "user_compute_stream": str(self.stream),
            "do_copy_in_default_stream": "1",  # that stream: copies of a graph's own then need no further event
            "cudnn_conv_use_max_workspace": "0",
            "use_tf32": "0",  # the parts in float32 are there because 16 bits were too few
        }

    @contextmanager
    def opening(self, options: ort.SessionOptions) -> Iterator[None]:
        """A session that opens meanwhile computes in the arena; what it asks for now it keeps.

        For each, onnxruntime looks for a plugin of that name first, and warns that there is none: process-wide, so only
        for as long. Nobody can ask what the level was; this is onnxruntime's own.
        """
        options.add_session_config_entry("session.use_env_allocators", "1")
        with registered(self.arena.options, self.index):
            self.arena.opening = True
            ort.set_default_logger_severity(ERRORS)
            try:
                yield
            finally:
                ort.set_default_logger_severity(WARNINGS)
                self.arena.opening = False

    def refusal(self) -> DeviceFailed | OutOfDeviceMemory | None:
        """Why the arena gave nothing, if it did not since it was last asked."""
        refusal, self.arena.refusal = self.arena.refusal, None
        return refusal


@contextmanager
def registered(functions: Mapping[str, str], index: int) -> Iterator[None]:
    """Let sessions that open meanwhile, and ask for shared allocators, take their memory from these functions for good.

    Registering replaces what was registered. Behind it stands an allocator of onnxruntime's own, which allocates
    nothing before it is asked: a session of somebody else must not find functions that are gone.
    """
    place = ort.OrtMemoryInfo("Cuda", ort.OrtAllocatorType.ORT_DEVICE_ALLOCATOR, index, ort.OrtMemType.DEFAULT)
    defaults = ort.OrtArenaCfg(0, -1, -1, -1)
    with REGISTERING:
        ort.create_and_register_allocator_v2("CUDAExecutionProvider", place, dict(functions), defaults)
        try:
            yield
        finally:
            ort.create_and_register_allocator_v2("CUDAExecutionProvider", place, {}, defaults)


class OrtDeviceEngine:
    """A session over pointers.

    Args:
        graph: its name, for errors.
        model: the ONNX file.
        target: where to run.
        workspace: where activation and outputs lie.

    Raises:
        ProviderMissing: this onnxruntime lacks the provider, or did not load it.
        OutOfDeviceMemory, DeviceFailed: it does not open, for lack of memory or otherwise.
    """

    def __init__(self, graph: str, model: bytes, target: CpuTarget | CudaTarget, workspace: Workspace) -> None:
        options = ort.SessionOptions()
        options.intra_op_num_threads = target.threads
        options.log_severity_level = FATAL  # an error is raised, and said once
        # A pattern is one piece per run in place of fifty; but the first run of each size has none, and needs its own.
        options.enable_mem_pattern = False
        if target.provider not in ort.get_available_providers():
            raise ProviderMissing(target.provider, ort.get_available_providers())
        if target.kind == "cuda":
            missing_libraries()  # loads those that are there, so that the provider finds them
        providers = [(target.provider, target.options)]
        self._graph, self._target, self._workspace = graph, target, workspace
        with (
            self._our_errors(),
            target.opening(options),
        ):  # without fallback: it would go on with the CPU, and write to stdout
            self._session = ort.InferenceSession(model, options, providers=providers, enable_fallback=0)
        if target.provider not in self._session.get_providers():
            raise ProviderMissing(target.provider, self._session.get_providers())
        first = self._session.get_inputs()[0]
        self.activation: str = first.name
        self._shape = list(first.shape[1:])
        self._outputs = {output.name: list(output.shape[1:]) for output in self._session.get_outputs()}
        self._run_options = ort.RunOptions()
        # The streamer's events order the work; waiting here would stop the next copy from being asked for.
        self._run_options.add_run_config_entry("disable_synchronize_execution_providers", "1")

    def value_bytes(self, images: int) -> int:
        """The activation and the outputs of so many images, each where a tensor may begin."""
        shapes = [self._shape, *self._outputs.values()]
        return sum(aligned(4 * images * math.prod(shape)) for shape in shapes)

    def activation_at(self, address: int, images: int) -> DeviceTensor:
        """The activation of so many images, whatever the bytes there are."""
        return DeviceTensor(address, (images, *self._shape), FLOAT32)

    def run(self, activation: Any, weights: Mapping[str, DeviceTensor]) -> dict[str, DeviceTensor]:
        shape = activation.shape()
        if list(shape[1:]) != self._shape:
            raise ShapeMismatch(self._graph, self.activation, str(list(shape)), str(["batch", *self._shape]))
        shapes = {name: (shape[0], *rest) for name, rest in self._outputs.items()}
        sizes = {name: 4 * math.prod(whole) for name, whole in shapes.items()}
        addresses = self._workspace.place(activation.data_ptr(), 4 * math.prod(shape), sizes)
        outputs = {name: DeviceTensor(addresses[name], whole, FLOAT32) for name, whole in shapes.items()}
        self.compute({self.activation: activation, **weights}, outputs)
        return outputs

    def compute(self, inputs: Mapping[str, DeviceTensor], outputs: Mapping[str, DeviceTensor]) -> None:
        """Run the graph from memory to memory."""
        binding = self._session.io_binding()
        kind, index = self._target.kind, self._target.index
        for name, tensor in inputs.items():
            binding.bind_input(name, kind, index, tensor.element_type(), tensor.shape(), tensor.data_ptr())
        for name, tensor in outputs.items():
            binding.bind_output(name, kind, index, tensor.element_type(), tensor.shape(), tensor.data_ptr())
        try:
            with self._our_errors():
                self._session.run_with_iobinding(binding, self._run_options)
        finally:
            del binding  # which keeps the session

    def close(self) -> None:
        """Let the session go; the engine runs no more."""
        del self._session

    @contextmanager
    def _our_errors(self) -> Iterator[None]:
        """Onnxruntime's errors as ours: those of memory call for a smaller plan."""
        try:
            yield
        except (Fail, RuntimeException, RuntimeError) as error:  # run_with_iobinding raises a plain RuntimeError
            traceback.clear_frames(error.__traceback__)  # onnxruntime's own know the session
            raise self._as_ours(error) from error

    def _as_ours(self, error: Exception) -> DeviceFailed | OutOfDeviceMemory:
        """The error to raise; made here, as a frame that holds what it raises keeps the session alive."""
        where = f"{self._target.provider} ({self._graph})"
        if refusal := self._target.refusal():
            return refusal
        if NO_MEMORY.search(str(error)):
            return OutOfDeviceMemory(where, 0, None)
        cause = CAUSE.search(str(error))
        return DeviceFailed(where, (cause[0] if cause else str(error).splitlines()[0]).strip())
