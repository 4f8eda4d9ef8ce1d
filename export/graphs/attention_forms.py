"""ONNX's Attention in operators that plugin providers have.

onnxruntime's WebGPU provider has no kernel for Attention, so it would run on the CPU with its inputs copied to and fro.
Two forms take its place: ``plain`` (MatMul, Softmax, MatMul: right everywhere, but all scores are in memory) and
``mha`` (onnxruntime's MultiHeadAttention: it may be faster, and on some devices it is wrong).
"""

from collections.abc import Iterator

import numpy as np
import onnx
from onnx import helper, numpy_helper

from .footprint import intermediate_shapes, note_memory


def has_attention(model: onnx.ModelProto) -> bool:
    """Whether the forms of this graph differ."""
    return any(node.op_type == "Attention" for node in model.graph.node)


def with_attention(model: onnx.ModelProto, form: str) -> onnx.ModelProto:
    """A copy in which every Attention has the form ``plain`` or ``mha``, its memory in the metadata."""
    shapes = intermediate_shapes(model, 1)
    made = onnx.ModelProto()
    made.CopyFrom(model)
    del made.graph.node[:]
    for node in model.graph.node:
        if node.op_type != "Attention":
            made.graph.node.append(node)
            continue
        _, heads, _, width = shapes[node.input[0]]
        nodes = plain(made, node, width) if form == "plain" else multi_head(made, node, heads, width)
        made.graph.node.extend(nodes)
    if form == "mha" and has_attention(model):
        made.opset_import.append(helper.make_opsetid("com.microsoft", 1))
    del made.graph.value_info[:]
    note_memory(made)
    return made


def plain(model: onnx.ModelProto, node: onnx.NodeProto, width: int) -> Iterator[onnx.NodeProto]:
    """``softmax(q k^T / sqrt(width)) v`` of ``[B, H, T, width]`` each."""
    (q, k, v), (y,) = node.input, node.output
    scale = constant(model, f"{y}.scale", np.float32(width**-0.5))
    yield helper.make_node("Mul", [q, scale], [f"{y}.q"])
    yield helper.make_node("Transpose", [k], [f"{y}.k"], perm=[0, 1, 3, 2])
    yield helper.make_node("MatMul", [f"{y}.q", f"{y}.k"], [f"{y}.scores"])
    yield helper.make_node("Softmax", [f"{y}.scores"], [f"{y}.weights"], axis=-1)
    yield helper.make_node("MatMul", [f"{y}.weights", v], [y])


def multi_head(model: onnx.ModelProto, node: onnx.NodeProto, heads: int, width: int) -> Iterator[onnx.NodeProto]:
    """The same by onnxruntime's operator, which takes and gives ``[B, T, H * width]``."""
    (y,) = node.output
    joined = constant(model, f"{y}.joined", np.array([0, 0, heads * width], np.int64))
    parted = constant(model, f"{y}.parted", np.array([0, 0, heads, width], np.int64))
    rows = []
    for name, value in zip("qkv", node.input, strict=True):
        yield helper.make_node("Transpose", [value], [f"{y}.{name}4"], perm=[0, 2, 1, 3])
        yield helper.make_node("Reshape", [f"{y}.{name}4", joined], [f"{y}.{name}"])
        rows.append(f"{y}.{name}")
    attributes = {"domain": "com.microsoft", "num_heads": heads, "scale": width**-0.5}
    yield helper.make_node("MultiHeadAttention", rows, [f"{y}.rows"], **attributes)
    yield helper.make_node("Reshape", [f"{y}.rows", parted], [f"{y}.heads"])
    yield helper.make_node("Transpose", [f"{y}.heads"], [y], perm=[0, 2, 1, 3])


def constant(model: onnx.ModelProto, name: str, value: np.ndarray | np.generic) -> str:
    """Add a constant to a graph; its name."""
    model.graph.initializer.append(numpy_helper.from_array(np.asarray(value), name))
    return name
