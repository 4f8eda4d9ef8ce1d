"""int8 sums are exact on this CPU, whatever it is: int64 sums in numpy are the oracle, and no pack exceeds the limits.

Only the worst cases show whether a kernel saturates, so they are made: all activations at one end, all pairs of weights
at the limit. `make test-cpus` runs these on CPUs that this one is not.
"""

from typing import Any

import numpy as np
import onnxruntime as ort
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as stn
from numpy.typing import NDArray
from onnx import TensorProto, helper
from test_precision import exported, prepared

from conftest import MakeEngines
from i2l.engines.cpu.converted import cpu_engines
from i2l.engines.cpu.sums import ACTIVATION_LEVELS, LEVELS_OF_EACH, PAIR_LEVELS, WEIGHT_LEVELS
from i2l.engines.directory.manifest import read_manifest
from i2l.export.precisions.base import row_scales_for_exact_sums
from i2l.export.precisions.rotated_int8 import RotatedInt8
from i2l.export.precisions.torch_rotation import rotate, rotation

Array = NDArray[Any]
INT16_LARGEST = 2**15 - 1


def levels_product(activations: Array, weights: Array) -> Array:
    """``[R, in] uint8 x [P, in, p] int8`` by the operator of the encoders' graphs, all scales one."""
    panels, _, channels = weights.shape
    graph = helper.make_graph(
        [helper.make_node("MatMulIntegerToFloat", ["x", "w", "one", "s", "z"], ["y"], domain="com.microsoft")],
        "levels",
        [
            helper.make_tensor_value_info("x", TensorProto.UINT8, activations.shape),
            helper.make_tensor_value_info("w", TensorProto.INT8, weights.shape),
            helper.make_tensor_value_info("s", TensorProto.FLOAT, [panels, 1, channels]),
        ],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, [panels, len(activations), channels])],
        [
            helper.make_tensor("one", TensorProto.FLOAT, [], [1.0]),
            helper.make_tensor("z", TensorProto.UINT8, [], [ACTIVATION_LEVELS]),
        ],
    )
    opsets = [helper.make_opsetid("", 21), helper.make_opsetid("com.microsoft", 1)]
    options = ort.SessionOptions()
    options.intra_op_num_threads = 1
    model = helper.make_model(graph, opset_imports=opsets, ir_version=10).SerializeToString()
    session = ort.InferenceSession(model, options, providers=["CPUExecutionProvider"])
    feed = {"x": activations, "w": weights, "s": np.ones((panels, 1, channels), np.float32)}
    return np.asarray(session.run(["y"], feed)[0])


def test_the_limits_fit_what_old_kernels_add() -> None:
    assert 2 * ACTIVATION_LEVELS * PAIR_LEVELS <= INT16_LARGEST < 2 * (ACTIVATION_LEVELS + 1) * (PAIR_LEVELS + 1)
    assert 2 * LEVELS_OF_EACH * 2 * WEIGHT_LEVELS <= INT16_LARGEST < 2 * (LEVELS_OF_EACH + 1) * 2 * WEIGHT_LEVELS


@pytest.mark.parametrize("channels", [16, 96, 128])
@pytest.mark.parametrize("rows", [1, 5, 201])
@pytest.mark.parametrize("levels", [(-1, -1), (1, 1), (-1, 1), (1, -1)])
@pytest.mark.parametrize("pair", [(75, 76), (-76, -75), (127, 24), (-24, -127), (127, -127), (-127, 127)])
def test_the_worst_sums_are_exact(pair: tuple[int, int], levels: tuple[int, int], rows: int, channels: int) -> None:
    width = 256
    weights = np.broadcast_to(np.resize(np.array(pair, np.int8), width)[None, :, None], (2, width, channels)).copy()
    activation = np.array(levels) * ACTIVATION_LEVELS
    activations = np.broadcast_to(np.resize(activation + ACTIVATION_LEVELS, width), (rows, width)).astype(np.uint8)
    assert (levels_product(activations, weights) == width // 2 * np.dot(activation, pair)).all()


def test_a_kernel_that_saturates_would_be_seen() -> None:
    """What the limits are for: on a CPU without VNNI the old pairs are off, on others they are not."""
    weights = np.full((1, 256, 128), WEIGHT_LEVELS, np.int8)
    activations = np.full((5, 256), 255, np.uint8)
    found = levels_product(activations, weights)
    exact = (255 - ACTIVATION_LEVELS) * WEIGHT_LEVELS * 256
    saturated = (INT16_LARGEST - 2 * ACTIVATION_LEVELS * WEIGHT_LEVELS) * 128
    assert set(found.ravel().tolist()) in ({float(exact)}, {float(saturated)})


@settings(max_examples=40, deadline=None)
@given(
    stn.arrays(
        np.float32,
        stn.array_shapes(min_dims=2, max_dims=2, max_side=12),
        elements=st.floats(-(2.0**60), 2.0**60, width=32),
    )
)
def test_no_pair_exceeds_its_levels(values: Array) -> None:
    import torch

    rows = torch.from_numpy(values)
    levels = (rows / row_scales_for_exact_sums(rows)[:, None]).round()
    assert (levels.abs() <= WEIGHT_LEVELS).all()
    pairs = levels[:, : levels.shape[1] // 2 * 2].reshape(len(levels), -1, 2).sum(dim=2)
    assert (pairs.abs() <= PAIR_LEVELS).all()


@pytest.mark.parametrize("outliers", [False, True], ids=["plain", "outliers"])
@pytest.mark.parametrize("precision", ["int8", "fp8"])
def test_packs_keep_the_limits(engines: MakeEngines, precision: str, outliers: bool) -> None:
    directory = engines("tiny", precision, **({"outliers": True} if outliers else {}))
    directory, manifest = cpu_engines(directory, read_manifest(directory))
    matrices = 0
    for model in manifest.models.values():
        data = np.fromfile(directory / manifest.build / model.pack, np.int8)
        for info in model.tensors.values():
            if info.dtype == "I8":
                *_, width, channels = info.shape  # of both forms: input channels, then output channels
                levels = data[info.offset : info.offset + info.nbytes].reshape(-1, width, channels).astype(np.int32)
                assert np.abs(levels).max() <= WEIGHT_LEVELS
                if len(info.shape) == 3:  # the encoders'; the adapter's activations have fewer levels instead
                    assert np.abs(levels.reshape(-1, width // 2, 2, channels).sum(axis=2)).max() <= PAIR_LEVELS
                matrices += 1
    assert matrices > 10


@pytest.mark.parametrize("rows", [1, 33])
@pytest.mark.parametrize(("out_features", "in_features"), [(64, 96), (384, 512)])
def test_a_product_is_that_of_exact_integers(out_features: int, in_features: int, rows: int) -> None:
    """Quantised by numpy from the same packs, summed in int64: only float32's rounding is between the two."""
    from test_precision import matrix

    x = np.random.default_rng(rows).standard_normal((rows, in_features)).astype(np.float32)
    x[rows // 2] *= 100
    packed = prepared(RotatedInt8(), matrix(out_features, in_features))
    weights = packed["weight"].numpy().astype(np.int64).transpose(0, 2, 1).reshape(out_features, in_features)
    import torch

    rotated = rotate(torch.from_numpy(x), rotation(in_features)).numpy().astype(np.float64)
    step = np.abs(rotated).max(axis=1, keepdims=True) / ACTIVATION_LEVELS
    wanted = np.rint(rotated / step).astype(np.int64) @ weights.T * step * packed["scale"].numpy().reshape(-1)
    found = exported("int8", out_features, in_features)(x)["plain"]
    # A value between two levels may fall on either side in float32: one level of some thousand that are added.
    assert np.linalg.norm(found - wanted) < 2e-3 * np.linalg.norm(wanted)


def test_gaussian_rows_lose_what_the_docstring_says() -> None:
    """Of full width: 1.44 % here; 127 levels for both would be 1.23 %, one scale for all rows 1.43 %."""
    generator = np.random.default_rng(0)
    x, w = generator.standard_normal((256, 4096)), generator.standard_normal((256, 4096))
    pair = np.abs(w.reshape(len(w), -1, 2).sum(axis=2)).max(axis=1, keepdims=True)
    scale = np.maximum(np.abs(w).max(axis=1, keepdims=True) / WEIGHT_LEVELS, pair / (PAIR_LEVELS - 1))
    step = np.abs(x).max(axis=1, keepdims=True) / ACTIVATION_LEVELS
    error = (np.rint(x / step) * step) @ (np.rint(w / scale) * scale).T - x @ w.T
    assert np.linalg.norm(error) / np.linalg.norm(x @ w.T) == pytest.approx(0.0144, abs=0.0003)


@pytest.mark.parametrize("images", [1, 3])
@pytest.mark.parametrize("pair", [(127, 127), (-127, -127), (127, -127)])
def test_the_adapters_worst_sums_are_exact(pair: tuple[int, int], images: int) -> None:
    """One row without a zero point has a kernel of its own, which reads the weights as they lie."""
    shapes = {"x": (2, 1, 2 * images, 1, 132), "w": (2, 3, 1, 132, 260), "y": (2, 3, 2 * images, 1, 260)}
    kinds = {"x": TensorProto.UINT8, "w": TensorProto.INT8, "y": TensorProto.INT32}
    x, w, y = (helper.make_tensor_value_info(name, kinds[name], shape) for name, shape in shapes.items())
    graph = helper.make_graph([helper.make_node("MatMulInteger", ["x", "w"], ["y"])], "row", [x, w], [y])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10).SerializeToString()
    session = ort.InferenceSession(model, providers=["CPUExecutionProvider"])
    weights = np.broadcast_to(np.resize(np.array(pair, np.int8), 132)[:, None], shapes["w"]).copy()
    for levels in ((128, 128), (0, 128), (128, 0), (64, 128)):
        activations = np.broadcast_to(np.resize(np.array(levels, np.uint8), 132), shapes["x"]).copy()
        (found,) = session.run(["y"], {"x": activations, "w": weights})
        assert (found == 66 * np.dot(levels, pair)).all()
