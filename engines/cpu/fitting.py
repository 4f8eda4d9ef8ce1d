"""Does a graph take what the manifest would feed it? Asked of onnxruntime before anything is computed.

onnxruntime's own answers are exceptions of no common class, in words for who wrote the graph: they end here.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import onnxruntime as ort
from onnxruntime.capi import onnxruntime_pybind11_state as ort_state

from ...specs import FAMILIES
from ..directory.manifest import Manifest, inputs_of
from ..errors import EngineFailed

NAMES = ("EPFail", "EngineError", "Fail", "InvalidArgument", "InvalidGraph", "InvalidProtobuf", "NoModel", "NotFound")
ORT_ERRORS: tuple[type[Exception], ...] = tuple(
    getattr(ort_state, name) for name in (*NAMES, "NotImplemented", "RuntimeException") if hasattr(ort_state, name)
)
"""What onnxruntime raises; older ones have fewer of them."""
ORT_TYPES = {
    "tensor(float)": "F32",
    "tensor(int8)": "I8",
    "tensor(bfloat16)": "BF16",
    "tensor(float8e4m3fn)": "F8_E4M3",
}


@contextmanager
def explained(graph: str) -> Iterator[None]:
    """Turn onnxruntime's exceptions into :class:`EngineFailed`."""
    try:
        yield
    except ORT_ERRORS as error:
        raise EngineFailed(graph, str(error)) from error


def require_fitting(graph: str, inputs: Sequence[Any], outputs: Sequence[str], manifest: Manifest) -> None:
    """Compare a session's inputs with the tensors of every step that runs its graph.

    Args:
        graph: its name.
        inputs: the session's, the activation first.
        outputs: names of the session's outputs.
        manifest: of the packs that feed it.

    Raises:
        EngineFailed: a step has other tensors, or of other shapes or dtypes, or the outputs are not one embedding or
            pairs of factors.
    """
    wanted = {value.name: (ORT_TYPES.get(value.type), tuple(value.shape)) for value in inputs[1:]}
    for family in FAMILIES:
        model = manifest.models[family]
        steps = [step for chunk in model.chunks for step in chunk.steps if step.graph == graph]
        for step in steps:
            found = {name: (info.dtype, info.shape) for name, info in inputs_of(step, model).items()}
            if found != wanted:
                odd = min(name for name in found.keys() | wanted.keys() if found.get(name) != wanted.get(name))
                raise EngineFailed(graph, f"{odd} of {step.name} is {found.get(odd)}, not {wanted.get(odd)}")
        pairs = {name.removesuffix(".A") for name in outputs if name.endswith(".A")}
        factors = {f"{name}.{side}" for name in pairs for side in "AB"}
        if steps and (set(outputs) != factors if family == "adapter" else len(outputs) != 1):
            raise EngineFailed(graph, f"its outputs are {', '.join(outputs)}")


def require_runnable(graphs: Sequence[tuple[str, bytes]], manifest: Manifest) -> None:
    """Open each graph and compare it with the manifest; raises like :func:`require_fitting`."""
    for graph, model in graphs:
        with explained(graph):
            session = ort.InferenceSession(model, providers=["CPUExecutionProvider"])
        require_fitting(graph, session.get_inputs(), [output.name for output in session.get_outputs()], manifest)
