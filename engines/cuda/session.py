"""A graph on onnxruntime whose inputs are raw pointers: weights in slots of a device, never copied by onnxruntime.

One class for the CUDA provider and for the CPU's, which reads host pointers in the same way and so tests the logic.
Outputs are allocated by the provider. Each session has an arena of its own, which grows by what is asked for and no
further than ``limit_bytes``; it stays as long as the session, so the residency plan counts it as the graph's context.

All sessions compute on the one stream that the slots' events are recorded in, and ``run`` does not wait for it. So the
memory of an output that is given back early is written again only behind the kernels that read it.
"""

import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import onnxruntime as ort
from onnxruntime.capi.onnxruntime_pybind11_state import Fail, RuntimeException

from ..device.tensor import DeviceTensor
from ..errors import DeviceFailed, OutOfDeviceMemory, ShapeMismatch
from .errors import ProviderMissing

NO_MEMORY = re.compile(r"out of memory|failed to allocate memory|available memory of \d+ is smaller", re.IGNORECASE)
"""How the CUDA provider and its arena say that memory ran out; they have no error class for it."""


@dataclass(frozen=True)
class CpuTarget:
    """The CPU provider over host pointers."""

    threads: int = 1
    kind: str = "cpu"
    index: int = 0
    provider: str = "CPUExecutionProvider"

    def options(self, limit_bytes: int) -> dict[str, str]:  # noqa: ARG002
        return {}


@dataclass(frozen=True)
class CudaTarget:
    """The CUDA provider on one stream."""

    stream: int
    index: int = 0
    kind: str = "cuda"
    threads: int = 1
    provider: str = "CUDAExecutionProvider"

    def options(self, limit_bytes: int) -> dict[str, str]:
        return {
            "device_id": str(self.index),
            "user_compute_stream": str(self.stream),
            "do_copy_in_default_stream": "1",  # that stream: copies of a graph's own then need no further event
            "gpu_mem_limit": str(limit_bytes),
            "arena_extend_strategy": "kSameAsRequested",  # the default doubles, past what the plan counts
            "cudnn_conv_use_max_workspace": "0",
            "use_tf32": "0",  # the parts in float32 are there because 16 bits were too few
        }


class OrtDeviceEngine:
    """A session over pointers.

    Args:
        graph: its name, for errors.
        model: the ONNX file.
        target: where to run.
        limit_bytes: of the session's arena.

    Raises:
        ProviderMissing: this onnxruntime lacks the provider, or did not load it.
    """

    def __init__(self, graph: str, model: bytes, target: CpuTarget | CudaTarget, limit_bytes: int) -> None:
        options = ort.SessionOptions()
        options.intra_op_num_threads = target.threads
        options.log_severity_level = 3
        if target.provider not in ort.get_available_providers():
            raise ProviderMissing(target.provider, ort.get_available_providers())
        if target.kind == "cuda":
            ort.preload_dlls()  # CUDA's libraries from pip's packages, where the system has none
        providers = [(target.provider, target.options(limit_bytes))]
        self._graph, self._target, self._limit_bytes = graph, target, limit_bytes
        with self._our_errors():  # without fallback: it would go on with the CPU, and write to standard output
            self._session = ort.InferenceSession(model, options, providers=providers, enable_fallback=0)
        if target.provider not in self._session.get_providers():
            raise ProviderMissing(target.provider, self._session.get_providers())
        first = self._session.get_inputs()[0]
        self.activation: str = first.name
        self._shape = list(first.shape[1:])
        self._outputs = [output.name for output in self._session.get_outputs()]
        self._run_options = ort.RunOptions()
        # The streamer's events order the work; waiting here would stop the next copy from being asked for.
        self._run_options.add_run_config_entry("disable_synchronize_execution_providers", "1")

    def run(self, activation: Any, weights: Mapping[str, DeviceTensor]) -> dict[str, Any]:
        shape = activation.shape()
        if list(shape[1:]) != self._shape:
            raise ShapeMismatch(self._graph, self.activation, str(list(shape)), str(["batch", *self._shape]))
        binding = self._session.io_binding()
        for name, tensor in {self.activation: activation, **weights}.items():
            where = (self._target.kind, self._target.index, tensor.element_type(), tensor.shape(), tensor.data_ptr())
            binding.bind_input(name, *where)
        for name in self._outputs:
            binding.bind_output(name, self._target.kind, self._target.index)
        with self._our_errors():
            self._session.run_with_iobinding(binding, self._run_options)
        return dict(zip(self._outputs, binding.get_outputs(), strict=True))

    @contextmanager
    def _our_errors(self) -> Iterator[None]:
        """Onnxruntime's errors as ours: those of memory call for a smaller plan."""
        try:
            yield
        except (Fail, RuntimeException, RuntimeError) as error:  # run_with_iobinding raises a plain RuntimeError
            where = f"{self._target.provider} ({self._graph})"
            if NO_MEMORY.search(str(error)):
                raise OutOfDeviceMemory(where, self._limit_bytes, 0) from error
            raise DeviceFailed(where, str(error).splitlines()[0]) from error
