"""How much memory a graph's intermediate tensors take where the provider keeps buffers for reuse.

onnxruntime's WebGPU provider, told to keep every buffer (``storageBufferCacheMode`` simple), gives one back out for the
same size only, and only once the work that used it was handed to the card, after 16 kernels. So the graph is played
through: a buffer is taken for each node's output and put back behind its last reader. What was ever taken is what the
provider holds from then on.
"""

import math
from collections import Counter
from collections.abc import Mapping

import onnx

from ...engines.directory.manifest import INTERMEDIATES

PENDING_KERNELS = 16
"""``maxNumPendingDispatches`` of the provider, its default."""
VIEWS = frozenset({"Reshape", "Squeeze", "Unsqueeze", "Identity"})
"""Operators whose output is their input's memory."""
MEASURED_AT = (1, 4)
"""Pictures; memory is taken to grow evenly between and beyond."""
Shape = tuple[int, ...]


def note_memory(model: onnx.ModelProto) -> None:
    """Write what :func:`kept_bytes` gives to the graph's metadata."""
    few, many = MEASURED_AT
    first, last = (kept_bytes(model, intermediate_shapes(model, batch)) for batch in MEASURED_AT)
    each = -(-(last - first) // (many - few))
    model.metadata_props.add(key=INTERMEDIATES, value=f"{max(0, first - few * each)},{each}")


def intermediate_shapes(model: onnx.ModelProto, batch: int) -> dict[str, Shape]:
    """``name -> shape`` of everything that a graph computes for so many pictures.

    onnx has no rule for onnxruntime's MultiHeadAttention, whose output is like its first input; it is replaced for the
    occasion.
    """
    copy = onnx.ModelProto()
    copy.CopyFrom(model)
    del copy.graph.value_info[:]
    for value in (copy.graph.input[0], *copy.graph.output):
        value.type.tensor_type.shape.dim[0].dim_value = batch
    for node in copy.graph.node:
        if node.op_type == "MultiHeadAttention":
            node.CopyFrom(onnx.helper.make_node("Identity", node.input[:1], node.output))
    inferred = onnx.shape_inference.infer_shapes(copy, data_prop=True).graph
    shapes = {
        value.name: tuple(dim.dim_value for dim in value.type.tensor_type.shape.dim)
        for value in (*inferred.value_info, *inferred.output)
    }
    return {name: shapes[name] for node in model.graph.node for name in node.output if name}


def kept_bytes(model: onnx.ModelProto, shapes: Mapping[str, Shape]) -> int:
    """Bytes of all buffers that a run takes, float32 each."""
    owner: dict[str, str] = {}
    for node in model.graph.node:
        for name in filter(None, node.output):
            view = node.op_type in VIEWS and node.input[0] in owner
            owner[name] = owner[node.input[0]] if view else name
    last = {owner[name]: index for index, node in enumerate(model.graph.node) for name in node.input if name in owner}
    last |= {owner[value.name]: len(model.graph.node) for value in model.graph.output}
    free: Counter[int] = Counter()
    pending: Counter[int] = Counter()
    taken = 0

    def take(nbytes: int) -> None:
        nonlocal taken
        if free[nbytes]:
            free[nbytes] -= 1
        else:
            taken += nbytes

    for index, node in enumerate(model.graph.node):
        inside = scores_bytes(node, shapes)
        if inside:
            take(inside)
            pending[inside] += 1
        for name in filter(None, node.output):
            if owner[name] == name:
                take(4 * math.prod(shapes[name]))
        for name in {owner[name] for name in node.input if name in owner}:
            if last[name] == index:
                pending[4 * math.prod(shapes[name])] += 1
        if index % PENDING_KERNELS == PENDING_KERNELS - 1:
            free.update(pending)
            pending.clear()
    return taken


def scores_bytes(node: onnx.NodeProto, shapes: Mapping[str, Shape]) -> int:
    """What MultiHeadAttention takes beside its output: the scores, before and after the softmax."""
    if node.op_type != "MultiHeadAttention":
        return 0
    (heads,) = (attribute.i for attribute in node.attribute if attribute.name == "num_heads")
    (batch, rows, _), (_, columns, _) = shapes[node.input[0]], shapes[node.input[1]]
    return int(2 * 4 * batch * heads * rows * columns)
