"""Every way to keep a matrix: what is stored, and the exported product in onnxruntime against float64."""

import importlib.util
import logging
import math
from collections.abc import Callable
from functools import cache
from io import StringIO
from itertools import groupby
from typing import Any

import numpy as np
import onnxruntime
import pytest
import torch
from numpy.typing import NDArray

from i2l.engines.cpu.sums import WEIGHT_LEVELS
from i2l.engines.directory.dtypes import ELEMENT_TYPES
from i2l.export.checkpoints.torch_dtypes import TORCH_DTYPES
from i2l.export.graphs.graphs import export_graph, export_graphs
from i2l.export.precisions import base as precision_module
from i2l.export.precisions.balanced_int8 import BalancedInt8, CudaBalancedInt8, GpuBalancedInt8
from i2l.export.precisions.base import Precision, Rows, Weights
from i2l.export.precisions.dequantised import DequantisedBalancedInt8
from i2l.export.precisions.float8 import Float8
from i2l.export.precisions.floats import Float
from i2l.export.precisions.rotated_int8 import RotatedInt8
from i2l.export.precisions.storing import Stored
from i2l.export.precisions.torch_rotation import balanced_rotation, rotate, rotation
from i2l.specs import PRESETS, EncoderSpec

Array = NDArray[Any]

FORMS: dict[str, Precision] = {
    "fp32": Float("F32"),
    "bf16": Float("BF16"),
    "fp8": Float8(),
    "int8": RotatedInt8(),
    "int8-adapter": BalancedInt8(),
}
ADAPTERS: dict[str, Precision] = {
    "cpu": FORMS["int8-adapter"],
    "plugin": DequantisedBalancedInt8(),
    "plugin-in-pieces": DequantisedBalancedInt8(largest_bytes=1 << 20),
    "tensorrt": GpuBalancedInt8(compute=torch.float32),
    "cuda": CudaBalancedInt8(compute=torch.float32),
}
"""The adapter's int8 as every backend multiplies it."""
SIZES = [(64, 96), (384, 512), (192, 1536)]
"""``(out_features, in_features)``"""
PRODUCTS = {"biased": True, "plain": False}
"""``matrix -> it has a bias``"""
TOLERANCES = {
    # Two float32 programs differ by the order of up to 1536 additions: a few times 6e-8; 4e-7 observed.
    "fp32": (1e-6, 1e-6),
    # Each weight is rounded to 8 bits: at most 2^-9 of itself; 0.17 % observed, and 0.26 % where a row's sum cancels.
    "bf16": (2.0**-9, 2.0**-8),
    # e4m3 rounds to 4 bits: at most 2^-4 of each weight, 2.6 % in the mean square; 3 and 4.1 % observed.
    "fp8": (0.035, 2.0**-4),
    # Activations in steps of largest / 108, weights of largest pair / 151: 0.7 to 1 % each, 1.3 % together. Where one
    # channel is 100 times the others, the rest of its row has fewer levels: 1.84 % observed, 1.9 % in the worst row.
    "int8": (0.02, 0.027),
    # The same weights, activations 100 times finer; 0.9 and 1.2 % observed.
    "int8-adapter": (0.012, 0.018),
}
"""``(overall, worst row)``, relative to the exact product."""
SMALL_PIECES = 20_000
"""Values in a piece here, so that these matrices come in several, the last one shorter."""


def matrix(out_features: int, in_features: int) -> Array:
    """A Gaussian matrix whose rows are of very different sizes: every output channel needs its own scale."""
    generator = np.random.default_rng(out_features)
    sizes = np.geomspace(0.01, 1, out_features)[:, None]
    return (generator.standard_normal((out_features, in_features)) * sizes).astype(np.float32)


def bias(out_features: int) -> Array:
    return np.random.default_rng(1).standard_normal(out_features).astype(np.float32)


def rows_of(values: Array) -> Rows:
    return lambda start, count: torch.from_numpy(values[start : start + count].copy())


def prepared(form: Precision, values: Array, taken_by: Precision | None = None) -> dict[str, torch.Tensor]:
    """The stored tensors of a matrix, put together from their pieces; ``taken_by`` another form, as it takes them."""
    pieces: dict[str, list[torch.Tensor]] = {}
    for suffix, piece in form.prepare(rows_of(values), *values.shape):
        pieces.setdefault(suffix, []).append(piece)
    left = {suffix: torch.cat([part.reshape(-1) for part in parts]) for suffix, parts in pieces.items()}
    tensors = {}
    for suffix, _, shape in (taken_by or form).stored(*values.shape):  # "weight", or "weight.0", "weight.1", ...
        whole, count = suffix.partition(".")[0], math.prod(shape)
        tensors[suffix], left[whole] = left[whole][:count].reshape(shape), left[whole][count:]
    return tensors


class Products(torch.nn.Module):
    """All of :data:`PRODUCTS` side by side: exporting takes a second, whatever is in the graph."""

    def __init__(self, form: Precision, in_features: int) -> None:
        super().__init__()
        self.in_features = in_features
        self.linears = torch.nn.ModuleList(form.linear(name, in_features) for name in PRODUCTS)

    def forward(self, hidden_in: torch.Tensor, weights: Weights) -> torch.Tensor:
        x = hidden_in.view(-1, self.in_features)
        return torch.cat([linear(x, weights) for linear in self.linears], dim=1)


@cache
def exported(form_name: str, out_features: int, in_features: int) -> Callable[[Array], dict[str, Array]]:
    """``x -> name of product -> y`` by onnxruntime; the weights go in as inputs."""
    form = (FORMS | ADAPTERS)[form_name]
    stored: list[Stored] = []
    for name, biased in PRODUCTS.items():
        parts = form.stored(out_features, in_features)
        stored += [(f"{name}.{suffix}", dtype, shape) for suffix, dtype, shape in parts]
        if biased:
            stored.append((f"{name}.bias", "F32", (out_features,)))
    # One patch, so that a row of the input is an image of the batch: the dimension that is dynamic.
    spec = EncoderSpec("siglip2", in_features, depth=1, heads=1, intermediate=in_features, image_size=16)
    graph = export_graph("products.head", Products(form, in_features), spec, stored)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1  # small products; waiting threads spin
    session = onnxruntime.InferenceSession(graph.SerializeToString(), options, providers=["CPUExecutionProvider"])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(precision_module, "PIECE_VALUES", SMALL_PIECES)
        packed = FORMS.get(form_name, BalancedInt8())
        tensors = prepared(packed, matrix(out_features, in_features), taken_by=form)
    feed = {}
    for name, dtype, shape in stored:
        kind, element_type = ELEMENT_TYPES[dtype]
        tensor = torch.from_numpy(bias(out_features)) if name.endswith(".bias") else tensors[name.partition(".")[2]]
        array = tensor.view(torch.uint8).numpy().view(kind).reshape(shape)
        feed[name] = onnxruntime.OrtValue.ortvalue_from_numpy_with_onnx_type(array, element_type)

    def run(x: Array) -> dict[str, Array]:
        activation = onnxruntime.OrtValue.ortvalue_from_numpy(x[:, None].astype(np.float32))
        (y,) = session.run_with_ort_values(["embedding"], {"hidden_in": activation, **feed})
        return dict(zip(PRODUCTS, np.split(y.numpy(), len(PRODUCTS), axis=1), strict=True))

    return run


def rms(values: Array, axis: int | None = None) -> Array:
    return np.asarray(np.sqrt(np.square(values).mean(axis=axis)))


def activations(rows: int, width: int, *, massive: bool, outlier: bool) -> Array:
    """Gaussian rows; one channel may be 100 times the others, and so may one row."""
    x = np.random.default_rng(rows).standard_normal((rows, width))
    if outlier:
        x[:, width // 3] = 100 * np.sign(x[:, width // 3])
    if massive:
        x[rows // 2] *= 100
    return x.astype(np.float32)


@pytest.mark.parametrize("outlier", [False, True], ids=["even", "outlier"])
@pytest.mark.parametrize("massive", [False, True], ids=["alike", "massive-row"])
@pytest.mark.parametrize("rows", [1, 33])
@pytest.mark.parametrize("product", PRODUCTS)
@pytest.mark.parametrize(("out_features", "in_features"), SIZES)
@pytest.mark.parametrize("form", FORMS)
def test_a_product_is_near_the_exact_one(
    form: str, out_features: int, in_features: int, product: str, rows: int, massive: bool, outlier: bool
) -> None:
    x = activations(rows, in_features, massive=massive, outlier=outlier)
    x, w = x.astype(np.float64), matrix(out_features, in_features).astype(np.float64)
    exact = x @ w.T
    wanted = exact + bias(out_features) if PRODUCTS[product] else exact
    error = exported(form, out_features, in_features)(x)[product] - wanted
    typical = rms(x, axis=1)[:, None] * np.linalg.norm(w, axis=1)  # size of a product of Gaussians
    overall, worst_row = TOLERANCES[form]
    assert rms(error) < overall * rms(exact)
    assert (rms(error, axis=1) < worst_row * rms(exact, axis=1)).all()
    # Every output channel on its own scale; of one row that is a single number, which may be 4 deviations off.
    assert (rms(error / typical, axis=0) < 4 * overall).all()


@pytest.mark.parametrize(
    ("backend", "in_features"), [*((name, 64) for name in ADAPTERS), ("cpu", 192), ("plugin", 192)]
)
def test_the_adapters_wide_outputs_come_in_order(backend: str, in_features: int) -> None:
    """Two panels of outputs, of one panel of inputs and of three; weights alone are rounded, or nearly so."""
    x = np.random.default_rng(0).standard_normal((3, in_features))
    exact = x @ matrix(6144, in_features).astype(np.float64).T
    found = exported(backend, 6144, in_features)(x)
    assert rms(found["plain"] - exact) < TOLERANCES["int8-adapter"][0] * rms(exact)
    np.testing.assert_allclose(found["biased"] - bias(6144), found["plain"], atol=1e-5)


@pytest.mark.parametrize("zeros", [slice(2, 3), slice(None)], ids=["one", "all"])
@pytest.mark.parametrize("product", PRODUCTS)
@pytest.mark.parametrize("form", FORMS)
def test_rows_of_zeros_give_the_bias(form: str, product: str, zeros: slice) -> None:
    x = activations(5, 96, massive=False, outlier=False)
    x[zeros] = 0
    found = exported(form, 64, 96)(x)[product][zeros]
    wanted = np.broadcast_to(bias(64) if PRODUCTS[product] else np.zeros(64), found.shape)
    assert (np.abs(found - wanted) <= np.finfo(np.float32).eps * np.abs(wanted)).all()  # nan fails; one rounding


# --- what is stored ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("out_features", "in_features"), SIZES)
@pytest.mark.parametrize("form", FORMS)
def test_the_pieces_are_what_was_planned(
    form: str, out_features: int, in_features: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(precision_module, "PIECE_VALUES", SMALL_PIECES)
    values = matrix(out_features, in_features)
    pieces = list(FORMS[form].prepare(rows_of(values), out_features, in_features))
    stored = FORMS[form].stored(out_features, in_features)
    for suffix, dtype, shape in stored:
        found = [piece for name, piece in pieces if name == suffix]
        assert {piece.dtype for piece in found} == {TORCH_DTYPES[dtype]}
        assert sum(piece.numel() for piece in found) == math.prod(shape)
    names = [name for name, _ in pieces]
    assert [name for name, _ in groupby(names)] == [suffix for suffix, _, _ in stored]  # in file order


@pytest.mark.parametrize("form", [form for form in FORMS if form != "int8"])  # its pieces are its panels
def test_the_bytes_do_not_depend_on_the_pieces(form: str, monkeypatch: pytest.MonkeyPatch) -> None:
    values = matrix(384, 512)
    whole = prepared(FORMS[form], values)
    monkeypatch.setattr(precision_module, "PIECE_VALUES", SMALL_PIECES)
    for suffix, tensor in prepared(FORMS[form], values).items():
        assert torch.equal(tensor.view(torch.uint8), whole[suffix].view(torch.uint8))


@pytest.mark.parametrize("form", FORMS)
def test_a_row_of_zeros_is_stored_as_finite_numbers(form: str) -> None:
    values = matrix(64, 96)
    values[7] = 0
    for suffix, tensor in prepared(FORMS[form], values).items():
        assert tensor.float().isfinite().all(), suffix


def steps_and_scales(form: str, values: Array) -> tuple[torch.Tensor, torch.Tensor]:
    """Stored weights ``[out, in]`` and their scales ``[out]``."""
    tensors = prepared(FORMS[form], values)
    weight, scale = tensors["weight"].float(), tensors["scale"].reshape(-1)
    if form == "int8":  # panels [out / p, in, p]
        weight = weight.transpose(1, 2).reshape(values.shape)
    return weight, scale


@pytest.mark.parametrize(("out_features", "in_features"), SIZES)
def test_a_scale_brings_the_largest_value_of_a_row_to_the_end_of_the_range(out_features: int, in_features: int) -> None:
    weight, _ = steps_and_scales("fp8", matrix(out_features, in_features))
    assert weight.abs().amax(dim=1).tolist() == [448] * out_features


@pytest.mark.parametrize(("out_features", "in_features"), SIZES)
def test_a_weight_is_stored_as_the_nearest_step(out_features: int, in_features: int) -> None:
    values = torch.from_numpy(matrix(out_features, in_features))
    wanted = rotate(values, rotation(in_features))
    weight, scale = steps_and_scales("int8", values.numpy())
    assert ((weight - wanted / scale[:, None]).abs() <= 0.5 + 1e-4).all()  # float32 blurs the middle between two steps


@pytest.mark.parametrize(("out_features", "in_features"), [*SIZES, (5, 54), (3, 9)])
def test_the_adapters_weights_are_the_nearest_steps_and_each_block_adds_up_to_zero(
    out_features: int, in_features: int
) -> None:
    values = torch.from_numpy(matrix(out_features, in_features))
    tensors = prepared(BalancedInt8(), values.numpy())
    turn = balanced_rotation(in_features)
    panels, _, _, width, _ = tensors["weight"].shape
    steps = tensors["weight"].float().permute(1, 4, 0, 2, 3).reshape(out_features, panels, -1, turn.shape[1])
    scale = tensors["scale"].permute(1, 4, 0, 2, 3).reshape(out_features, panels, 1)
    wanted = rotate(values, turn).view(out_features, panels, width) / scale
    assert (steps.sum(dim=3) == 0).all()
    off = (steps - wanted.view(steps.shape)).abs()
    assert (off[..., : len(turn) + 1] <= 0.5 + 1e-4).all()
    assert (off[..., len(turn) + 1] <= (len(turn) + 1) / 2).all()  # what balances
    assert steps.abs().max() == WEIGHT_LEVELS


def test_an_export_without_torchvision_says_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """torch has four lines for each graph where it is not installed, as after `make demo`; pytest hides its handler."""
    real, said = importlib.util.find_spec, StringIO()
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *_: None if name == "torchvision" else real(name))
    handler = logging.StreamHandler(said)
    logging.getLogger("torch.onnx").addHandler(handler)
    (spec,) = [spec for spec in PRESETS["tiny"] if spec.family == "dinov3"]
    next(export_graphs(spec, FORMS["fp32"]))
    logging.getLogger("torch.onnx").removeHandler(handler)
    assert said.getvalue() == ""
