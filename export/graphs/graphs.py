"""Graphs: a torch module exported once, its weights as graph inputs.

The tensors handed to ``torch.export`` are fake (shape and dtype, no memory), so exporting the block of a 7B model takes
no more than the tiny one. Names are API: activations ``pixel_values``, ``hidden_in``, ``hidden_out``, ``embedding``,
``<target>.A`` and ``<target>.B``; weights as in the pack, without the step's prefix. The batch is the one dynamic
dimension.
"""

import logging
import warnings
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager

import onnx
import onnx_ir as ir
import torch
from onnx_ir.passes.common import ClearMetadataAndDocStringPass
from torch._subclasses.fake_tensor import FakeTensorMode

from ...engines.directory.manifest import IMAGES_MEET
from ...engines.directory.tensorfile import TensorInfo
from ...specs import AdapterSpec, EncoderSpec, Spec
from ..checkpoints.torch_dtypes import TORCH_DTYPES
from ..checkpoints.weights import Step, graph_weights
from ..precisions.base import Precision
from ..precisions.storing import stored_tensors
from .modules import graph_modules

OPSET = 23
"""The first with the Attention operator."""
EXAMPLE_BATCH = 2
"""torch.export treats sizes 0 and 1 as constants."""
ONNX_TYPES = {
    "F32": onnx.TensorProto.FLOAT,
    "BF16": onnx.TensorProto.BFLOAT16,
    "F8_E4M3": onnx.TensorProto.FLOAT8E4M3FN,
    "I8": onnx.TensorProto.INT8,
}


def export_graphs(
    spec: Spec, precision: Precision, *, but: Collection[str] = ()
) -> Iterator[tuple[str, onnx.ModelProto]]:
    """Every graph of a model: ``(name, model)``; ``but``: those that nobody wants."""
    weights = graph_weights(spec)
    for name, module in graph_modules(spec, precision).items():
        if name in but:
            continue
        graph = export_graph(name, module, spec, stored_tensors(weights[name], precision))
        # How a product of floats is cut into threads and blocks depends on its rows, and so does the order of its sums.
        if not precision.images_meet and not name.endswith(".embed"):
            graph.metadata_props.add(key=IMAGES_MEET, value="no")
        yield name, graph


def export_graph(
    name: str, module: torch.nn.Module, spec: Spec, stored: Sequence[tuple[str, str, tuple[int, ...]]]
) -> onnx.ModelProto:
    """One module as an ONNX model without weights."""
    activation, shape = _activation(name, spec)
    batch = torch.export.Dim("batch", min=1, max=1024)
    with FakeTensorMode(allow_non_fake_inputs=True), quiet_torch():
        weights = {key: torch.empty(size, dtype=TORCH_DTYPES[dtype]) for key, dtype, size in stored}
        program = torch.export.export(
            module.eval(),
            (torch.empty(EXAMPLE_BATCH, *shape), weights),
            dynamic_shapes=({0: batch}, dict.fromkeys(weights)),
            strict=False,
        )
    with quiet_torch():
        exported = torch.onnx.export(program, dynamo=True, opset_version=OPSET, verbose=False)
    assert exported is not None  # dynamo=True returns a program
    model = exported.model
    _name_interface(model.graph, name, [activation, *weights], _outputs(name, spec))
    ClearMetadataAndDocStringPass()(model)  # traces of this machine's paths
    return ir.to_proto(model)


@contextmanager
def quiet_torch() -> Iterator[None]:
    """Nothing of deprecations inside torch, and no four lines for each graph where torchvision is not installed."""
    log = logging.getLogger("torch.onnx")
    level = log.level
    log.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        log.setLevel(level)


def standalone_model(
    step: Step, graph: onnx.ModelProto, tensors: Mapping[str, TensorInfo], pack: str
) -> onnx.ModelProto:
    """One step that any ONNX tool can open and run: the graph, its weights as external data inside the pack.

    Args:
        step: which block's weights to take.
        graph: the step's graph, weights as inputs.
        tensors: the pack's tensors.
        pack: the pack's file name; the model must be saved beside it, as ONNX forbids paths that climb.
    """
    model = onnx.ModelProto()
    model.CopyFrom(graph)
    activations = []
    for value in model.graph.input:
        info = tensors.get(f"{step.name}.{value.name}")
        if info is None:
            activations.append(value)
            continue
        tensor = model.graph.initializer.add(name=value.name, data_type=ONNX_TYPES[info.dtype], dims=info.shape)
        tensor.data_location = onnx.TensorProto.EXTERNAL
        for key, text in (("location", pack), ("offset", str(info.offset)), ("length", str(info.nbytes))):
            tensor.external_data.add(key=key, value=text)
    del model.graph.input[:]
    model.graph.input.extend(activations)
    return model


def _activation(name: str, spec: Spec) -> tuple[str, tuple[int, ...]]:
    """The name and the shape (without batch) of a graph's activation input."""
    if isinstance(spec, AdapterSpec):
        return "embedding", (spec.embedding,)
    if name.endswith(".embed"):
        return "pixel_values", (3, spec.image_size, spec.image_size)
    return "hidden_in", (spec.tokens, spec.hidden)


def _outputs(name: str, spec: Spec) -> list[str]:
    if isinstance(spec, EncoderSpec):
        return ["embedding" if name.endswith(".head") else "hidden_out"]
    targets = dict(spec.kinds)[name.removeprefix("adapter.")]
    return [f"{target}.{factor}" for target, _, _ in targets for factor in "AB"]


def _name_interface(graph: ir.Graph, name: str, inputs: Sequence[str], outputs: Sequence[str]) -> None:
    """Give the exporter's inputs and outputs, which come in the order of ``forward``, their public names."""
    graph.name = name
    for values, names in ((graph.inputs, inputs), (graph.outputs, outputs)):
        for value, public in zip(values, names, strict=True):
            value.name = public
    for value in (graph.inputs[0], *graph.outputs):
        if value.shape is not None:
            value.shape = ir.Shape(["batch", *value.shape[1:]])
