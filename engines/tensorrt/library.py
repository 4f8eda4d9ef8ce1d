"""TensorRT and TensorRT-RTX: which of them is here, and a graph made into a plan.

The two have the same Python API. TensorRT-RTX compiles ahead of time for any generation without a GPU, and once more on
the device when a plan is opened; TensorRT builds on and for the GPU at hand. Neither is imported before it is needed.
"""

import ctypes
import importlib
import importlib.util
import logging
import re
from collections.abc import Container, Sequence
from dataclasses import dataclass, field
from functools import cache
from typing import Any

from ...machine.errors import PackageMissing
from ..errors import BackendUnavailable
from .errors import PlanBuildFailed
from .plans import BATCHES

log = logging.getLogger(__name__)
RTX, PROPER = "tensorrt_rtx", "tensorrt"
ACTIVATION = re.compile(r"Total Activation Memory: (\d+) bytes")
CUDA_MAJOR, CUDA_MINOR = 75, 76
"""The driver's numbers of the attributes that make up the compute capability."""


@dataclass(frozen=True)
class Flavour:
    """An installed TensorRT."""

    name: str
    version: str
    reason: str = field(default="", compare=False)
    """Why this one, where the other is installed too."""

    def __str__(self) -> str:
        return f"{self.name} {self.version}"


@dataclass(frozen=True)
class BuiltPlan:
    """What TensorRT made of a graph."""

    data: bytes
    activation_bytes: int


def installed_flavours() -> tuple[str, ...]:
    """The packages that are installed; none is loaded.

    Raises:
        PackageMissing: neither is.
    """
    found = tuple(name for name in (RTX, PROPER) if importlib.util.find_spec(name) is not None)
    if not found:
        raise PackageMissing("tensorrt_rtx or tensorrt", "the tensorrt backend", "tensorrt")
    return found


def find_flavour(sm: int) -> Flavour:
    """The TensorRT that makes and runs the plans of a generation here.

    Raises:
        PackageMissing: none is installed.
    """
    installed = installed_flavours()
    name, reason = choose_flavour(installed, sm, rtx_generations() if RTX in installed else ())
    return Flavour(name, str(tensorrt_module(name).__version__), reason)


def choose_flavour(installed: Sequence[str], sm: int, rtx_knows: Container[int]) -> tuple[str, str]:
    """``(package, reason)``: which TensorRT a generation gets, and why where there are two.

    The plans that are there do not count: a card's proof names the library before any engines directory is looked at.
    Plans of the other one are refused, with the command that makes them again.

    Args:
        installed: one package, or both.
        sm: compute capability, 89 for 8.9.
        rtx_knows: the generations that TensorRT-RTX makes plans for.
    """
    if len(installed) == 1:
        return installed[0], ""
    if sm in rtx_knows:
        return RTX, f"it knows sm{sm}, so it goes before {PROPER}"
    return PROPER, f"{RTX} does not know sm{sm}"


def current_sm(index: int = 0) -> int:
    """The compute capability of a GPU, 89 for 8.9, asked of the driver itself.

    Raises:
        BackendUnavailable: there is no driver or no GPU.
    """
    remedy = "name the generation instead, such as --sm 89"
    for library in ("libcuda.so.1", "nvcuda.dll"):
        try:
            cuda = ctypes.CDLL(library)
            break
        except OSError:
            continue
    else:
        raise BackendUnavailable("tensorrt", "no NVIDIA driver on this machine", remedy)
    device, major, minor = ctypes.c_int(), ctypes.c_int(), ctypes.c_int()
    if cuda.cuInit(0) or cuda.cuDeviceGet(ctypes.byref(device), index):
        raise BackendUnavailable("tensorrt", "the NVIDIA driver finds no GPU", remedy)
    cuda.cuDeviceGetAttribute(ctypes.byref(major), CUDA_MAJOR, device)
    cuda.cuDeviceGetAttribute(ctypes.byref(minor), CUDA_MINOR, device)
    return 10 * major.value + minor.value


def build_plan(flavour: Flavour, graph: str, model: bytes, sm: int) -> BuiltPlan:
    """Make a plan of a serialised ONNX model.

    Args:
        flavour: from :func:`find_flavour`.
        graph: its name, for errors.
        model: the ONNX file; the batch is its one dynamic dimension.
        sm: the generation to build for.

    Raises:
        PlanBuildFailed: TensorRT refuses; with its own words.
    """
    trt = tensorrt_module(flavour.name)
    words = tensorrt_log(trt)
    words.take()  # what was said before is not about this graph
    builder = trt.Builder(words)
    network = builder.create_network(_network_flags(trt))
    parser = trt.OnnxParser(network, words)
    if not parser.parse(model):
        errors = (parser.get_error(index) for index in range(parser.num_errors))
        reasons = [f"{error.node_operator()} {error.node_name()}: {error.desc()}" for error in errors]
        raise PlanBuildFailed(graph, str(flavour), sm, reasons)
    config = builder.create_builder_config()
    config.profiling_verbosity = trt.ProfilingVerbosity.DETAILED  # for the inspector; not a byte more
    config.max_aux_streams = 0  # the adapter's attention wants 69 MB of scratch on eight streams, 10 MB on one
    if flavour.name == RTX:
        _target(trt, flavour, config, graph, sm)
    elif sm != current_sm():
        raise PlanBuildFailed(graph, str(flavour), sm, ["it builds for the GPU at hand only: install tensorrt_rtx"])
    config.add_optimization_profile(_profile(builder, network))
    plan = builder.build_serialized_network(network, config)
    if plan is None:
        raise PlanBuildFailed(graph, str(flavour), sm, words.take())
    return BuiltPlan(bytes(plan), words.activation_bytes)


def tensorrt_module(name: str) -> Any:
    """The package of a flavour."""
    return importlib.import_module(name)


def rtx_generations() -> frozenset[int]:
    """The compute capabilities that the installed TensorRT-RTX makes plans for."""
    names = dir(tensorrt_module(RTX).ComputeCapability)
    return frozenset(int(name[2:]) for name in names if re.fullmatch(r"SM\d+", name))


def knows(flavour: Flavour, sm: int) -> bool:
    """Whether a flavour makes and runs plans for a generation; TensorRT proper does for whatever is at hand."""
    return flavour.name == PROPER or sm in rtx_generations()


@cache
def tensorrt_log(trt: Any) -> Any:
    """The logger of this process: errors are kept until somebody takes them, the rest goes to ``logging``.

    One for all, as TensorRT goes on with the logger of its first object and ignores the later ones.

    A line is written by Python, with its lock held. TensorRT's bindings give the lock up where TensorRT works for long
    (parsing, building, loading a plan, making a context, running), but not in ``set_input_shape`` and
    ``update_device_memory_size_for_shapes``: one of these would hang if it waited for another thread that logs. The
    library's own logger cannot: but it prints and keeps nothing, and what it says is how lack of memory is known.
    """

    class Log(trt.ILogger):  # type: ignore[misc]  # the module is known only here
        def __init__(self) -> None:
            super().__init__()
            self.errors: list[str] = []
            self.activation_bytes = 0

        def take(self) -> list[str]:
            """The errors since the last time."""
            errors, self.errors, self.activation_bytes = self.errors, [], 0
            return errors

        def log(self, severity: Any, message: str) -> None:
            # how much memory was missing is only a warning
            if severity in {trt.ILogger.ERROR, trt.ILogger.INTERNAL_ERROR} or "could not be allocated" in message:
                self.errors.append(message)
            log.debug("TensorRT: %s", message)
            if found := ACTIVATION.search(message):
                self.activation_bytes = max(self.activation_bytes, int(found[1]))

    return Log()


def _network_flags(trt: Any) -> int:
    """Strongly typed: the graph says every type. TensorRT 11 knows nothing else and has no flag for it."""
    flag = getattr(trt.NetworkDefinitionCreationFlag, "STRONGLY_TYPED", None)
    return 0 if flag is None else 1 << int(flag)


def _target(trt: Any, flavour: Flavour, config: Any, graph: str, sm: int) -> None:
    """Build for one generation, whatever is at hand."""
    if not knows(flavour, sm):
        raise PlanBuildFailed(graph, str(flavour), sm, [f"it does not know sm{sm}: use --backend cuda there"])
    config.num_compute_capabilities = 1
    config.set_compute_capability(getattr(trt.ComputeCapability, f"SM{sm}"), 0)


def _profile(builder: Any, network: Any) -> Any:
    profile = builder.create_optimization_profile()
    for index in range(network.num_inputs):
        tensor = network.get_input(index)
        shape = tuple(tensor.shape)
        if -1 in shape:
            profile.set_shape(tensor.name, *(tuple(n if size == -1 else size for size in shape) for n in BATCHES))
    return profile
