"""What MatMulNBits with accuracy_level 4 (int8 activations by DP4A) would need of webgpu: for docs/adr/0009.

Prints where onnxruntime puts the operators that would turn an int8 pack into its layout; the error of a product with
rotated int8 weights at level 4 and 0, on the CPU provider at the width of DINOv3 and on the device at a small one; and
its milliseconds beside DequantizeLinear and MatMul, which is what the graphs have.

Usage: tests/webgpu/with_device .venv/bin/python benchmarks/nbits.py [--provider cpu|webgpu] [--rows N]
"""

import argparse
import statistics
import time

import numpy as np
import onnx
import onnxruntime as ort
from numpy.typing import NDArray
from onnx import TensorProto, helper

from i2l.engines.base import Array
from i2l.engines.cpu.rotation import rotate, rotation
from i2l.engines.plugin.presence import seat_for
from i2l.engines.plugin.providers import WEBGPU

BLOCK, CALLS = 32, 3
WIDTHS = {"cpu": 4096, "webgpu": 512}
BYTES = {"int8": TensorProto.INT8, "uint8": TensorProto.UINT8}


def main() -> None:
    """Print one line for each thing measured."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--provider", choices=sorted(WIDTHS), default="webgpu")
    parser.add_argument("--rows", type=int, default=201, help="of activations: DINOv3's tokens; the adapter has 1 to 4")
    arguments = parser.parse_args()
    provider, rows = arguments.provider, arguments.rows
    if provider == "webgpu":
        for kind in BYTES:
            print(f"Transpose of {kind}: {placed('Transpose', kind)}; BitwiseXor: {placed('BitwiseXor', kind)}")
    width = WIDTHS[provider]
    x, levels, scale = operands(width, rows)
    wanted = x.astype(np.float64) @ (levels * scale[:, None]).astype(np.float64).T
    for level in (4, 0):
        y, ms = ran(
            provider, nbits(width, level, rows), {"x": x, "w": levels_as_blocks(levels), "s": blocked(scale, width)}
        )
        print(f"MatMulNBits, level {level}, {rows} x {width} x {width}: {error(y, wanted):.2e}, {ms:.0f} ms")
    y, ms = ran(provider, dequantised(width, rows), {"x": x, "w": np.ascontiguousarray(levels.T), "s": scale[None]})
    print(f"DequantizeLinear and MatMul: {error(y, wanted):.2e}, {ms:.0f} ms")


def operands(width: int, rows: int) -> tuple[Array, NDArray[np.int8], Array]:
    """Rotated activations with massive channels, rotated int8 rows ``[out, in]``, a scale for each row."""
    random = np.random.default_rng(0)
    x = random.standard_normal((rows, width), np.float32)
    x[:4, random.integers(0, width, 3)] = 50
    matrix = rotation(width)
    weights = rotate(random.standard_normal((width, width), np.float32), matrix)
    scale = np.abs(weights).max(axis=1) / np.float32(127)
    return rotate(x, matrix), np.rint(weights / scale[:, None]).astype(np.int8), scale


def levels_as_blocks(levels: NDArray[np.int8]) -> NDArray[np.uint8]:
    """uint8 around 128 ``[out, in / block, block]``."""
    return (levels.astype(np.int16) + 128).astype(np.uint8).reshape(len(levels), -1, BLOCK)


def blocked(scale: Array, width: int) -> Array:
    """A row's scale for each of its blocks."""
    return np.repeat(scale[:, None], width // BLOCK, axis=1)


def error(found: Array, wanted: NDArray[np.float64]) -> float:
    """Of the worst row."""
    return float((np.linalg.norm(found - wanted, axis=1) / np.linalg.norm(wanted, axis=1)).max())


def nbits(width: int, level: int, rows: int) -> bytes:
    """A product by MatMulNBits."""
    node = helper.make_node(
        "MatMulNBits", ["x", "w", "s"], ["y"], domain="com.microsoft",
        K=width, N=width, bits=8, block_size=BLOCK, accuracy_level=level,
    )  # fmt: skip
    blocks = width // BLOCK
    inputs = [("x", 1, [rows, width]), ("w", TensorProto.UINT8, [width, blocks, BLOCK]), ("s", 1, [width, blocks])]
    return model([node], inputs, [rows, width])


def dequantised(width: int, rows: int) -> bytes:
    """A product as the plugin graphs have it."""
    nodes = [
        helper.make_node("DequantizeLinear", ["w", "s"], ["m"], axis=0, block_size=width),
        helper.make_node("MatMul", ["x", "m"], ["y"]),
    ]
    inputs = [("x", 1, [rows, width]), ("w", TensorProto.INT8, [width, width]), ("s", 1, [1, width])]
    return model(nodes, inputs, [rows, width])


def model(
    nodes: list[onnx.NodeProto], inputs: list[tuple[str, int, list[int]]], shape: list[int], kind: int = 1
) -> bytes:
    """A model with one output."""
    value = helper.make_tensor_value_info
    graph = helper.make_graph(nodes, "measured", [value(*row) for row in inputs], [value("y", kind, shape)])
    opsets = [helper.make_opsetid("", 21), helper.make_opsetid("com.microsoft", 1)]
    return bytes(helper.make_model(graph, opset_imports=opsets, ir_version=10).SerializeToString())


def session_on(provider: str, data: bytes) -> ort.InferenceSession:
    """A session that may fall back to the CPU, node by node."""
    options = ort.SessionOptions()
    options.log_severity_level = 3
    options.add_session_config_entry("session.record_ep_graph_assignment_info", "1")
    if provider == "webgpu":
        DEVICE.add_provider(options)
    return ort.InferenceSession(data, options)


def placed(operator: str, kind: str) -> str:
    """Which provider runs an operator on bytes."""
    names = ["x", "x"] if operator == "BitwiseXor" else ["x"]
    data = model([helper.make_node(operator, names, ["y"])], [("x", BYTES[kind], [64, 64])], [64, 64], BYTES[kind])
    parts = session_on("webgpu", data).get_provider_graph_assignment_info()
    return ", ".join(sorted({part.ep_name for part in parts}))


def ran(provider: str, data: bytes, feed: dict[str, NDArray[np.generic]]) -> tuple[Array, float]:
    """What a graph gives, and the median of its milliseconds."""
    session = session_on(provider, data)
    milliseconds = []
    for _ in range(CALLS + 1):
        start = time.perf_counter()
        (y,) = session.run(None, feed)
        milliseconds.append(1e3 * (time.perf_counter() - start))
    return np.asarray(y, np.float32), statistics.median(milliseconds[1:])


if __name__ == "__main__":
    DEVICE = seat_for(WEBGPU, None).open()
    main()
