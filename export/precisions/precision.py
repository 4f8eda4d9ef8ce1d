"""Precisions: how a matrix is stored in a pack, made from checkpoint rows, and multiplied in a graph.

The three belong together: what ``prepare`` does to the weights, ``linear`` must account for in the graph.

int8 needs no calibration (docs/adr/0001): per-output-channel weights, activations quantised as they come, channel sizes
evened out beforehand (equalise.py). One scale serves all tokens of a product, because that is the fast kernel; so each
row is first made alike. Behind a norm all rows have the same size, and rotating them (see rotation.py) removes channel
outliers. The inputs of the output projections are not normalised: there each row is also divided by its own maximum and
multiplied back, else the error of one massive token swallows the small ones (90 to 102 % error of the worst token
measured, against 1.5 %).
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Protocol, TypeAlias

import torch
from torch import Tensor, nn

from ...specs import Spec
from ..checkpoints.torch_dtypes import TORCH_DTYPES
from .parallel import in_threads
from .torch_rotation import rotate, rotation

Stored: TypeAlias = tuple[str, str, tuple[int, ...]]
"""``(suffix, safetensors dtype, shape)``."""
Weights: TypeAlias = Mapping[str, Tensor]
Rows: TypeAlias = Callable[[int, int], Tensor]
"""``(first row, count) -> float32 [count, in_features]`` of the original matrix."""
PRECISIONS = ("fp8", "int8", "bf16", "fp32")
PIECE_VALUES = 1 << 19
"""Values handled at a time: 2 MiB of float32 stay in the cache through the passes of a quantiser. Pieces eight times as
large were 3 times slower."""
SMALLEST = 1e-30
"""Keeps the scale of a row of zeros from being zero."""


class Precision(Protocol):
    """One way to keep matrices."""

    @property
    def equalised(self) -> bool:
        """Whether channel sizes are evened out first (see equalise.py)."""
        ...

    def stored(self, out_features: int, in_features: int) -> list[Stored]:
        """The pack's tensors for a matrix, in file order."""
        ...

    def prepare(self, rows: Rows, out_features: int, in_features: int) -> Iterator[tuple[str, Tensor]]:
        """``(suffix, piece)``: the bytes of those tensors, front to back."""
        ...

    def linear(self, name: str, in_features: int, *, normed: bool) -> "Linear":
        """The product with that matrix as a module; ``normed``: its input comes from a norm."""
        ...

    def patch(self) -> "Linear":
        """The product of the patches, whose matrix every pack keeps in float32."""
        ...


class Linear(nn.Module):
    """``(x [rows, in], weights) -> [rows, out]``: ``x @ matrix.T``, plus ``<name>.bias`` if there is one."""

    def __init__(self, name: str) -> None:
        super().__init__()
        self.name = name

    def weight(self, weights: Weights) -> Tensor:
        return weights[f"{self.name}.weight"]

    def scale(self, weights: Weights) -> Tensor:
        return weights[f"{self.name}.scale"]

    def bias(self, weights: Weights) -> Tensor | None:
        return weights.get(f"{self.name}.bias")

    def __call__(self, x: Tensor, weights: Weights) -> Tensor:
        return super().__call__(x, weights)  # type: ignore[no-any-return]  # torch leaves calls untyped


def precision_for(name: str, spec: Spec) -> Precision:
    """The precision ``name`` of :data:`PRECISIONS` for a model: int8 differs for products of few rows."""
    if name == "int8":
        return LeftInt8() if spec.family == "adapter" else RotatedInt8()
    kept: dict[str, Precision] = {"fp8": Float8(), "bf16": Float("BF16"), "fp32": Float("F32")}
    return kept[name]


def row_starts(out_features: int, in_features: int) -> range:
    """The first row of every piece, and as the range's step the rows in a piece."""
    return range(0, out_features, max(1, PIECE_VALUES // in_features))


def pieces(
    rows: Rows, starts: range, convert: Callable[[Tensor], tuple[Tensor, Tensor]]
) -> Iterator[tuple[str, Tensor]]:
    """Every piece of a matrix through ``convert``, which gives ``(weights, scales)``; the scales follow the weights."""
    scales = []
    for weight, scale in in_threads(lambda start: convert(rows(start, min(starts.step, starts.stop - start))), starts):
        scales.append(scale)
        yield "weight", weight
    yield "scale", torch.cat(scales)


def row_scales(piece: Tensor, largest: float) -> Tensor:
    """The scale ``[rows]`` that brings each row's largest value to ``largest``."""
    peak = torch.maximum(piece.amax(dim=1), -piece.amin(dim=1))  # twice as fast as over abs()
    return (peak / largest).clamp_min(SMALLEST)


def product(x: Tensor, matrix: Tensor, bias: Tensor | None) -> Tensor:
    """``x @ matrix.T + bias`` with a float32 ``[out, in]`` matrix: one Gemm with transB."""
    return x @ matrix.t() if bias is None else torch.addmm(bias, x, matrix.t())


class Float32Patch:
    """Patches multiplied in float32."""

    def patch(self) -> Linear:
        return FloatLinear("patch")


@dataclass(frozen=True)
class Float(Float32Patch):
    """float32 or bfloat16 as it came, ``[out, in]``. onnxruntime's CPU has no bfloat16 product: the graph casts."""

    dtype: str
    equalised: bool = False

    def stored(self, out_features: int, in_features: int) -> list[Stored]:
        return [("weight", self.dtype, (out_features, in_features))]

    def prepare(self, rows: Rows, out_features: int, in_features: int) -> Iterator[tuple[str, Tensor]]:
        for start in (starts := row_starts(out_features, in_features)):
            yield "weight", rows(start, min(starts.step, out_features - start)).to(TORCH_DTYPES[self.dtype])

    def linear(self, name: str, in_features: int, *, normed: bool) -> Linear:  # noqa: ARG002
        return FloatLinear(name)


class FloatLinear(Linear):
    """A float32 product."""

    def forward(self, x: Tensor, weights: Weights) -> Tensor:
        return product(x, self.weight(weights).to(x.dtype), self.bias(weights))


@dataclass(frozen=True)
class Float8(Float32Patch):
    """FP8 e4m3 ``[out, in]``, one float32 scale per output channel: ``w = q * scale``, ``scale = max|row| / 448``.

    Equalised for the sake of FP8 activations, and as the CPU runs it as int8 (engines/cpu/transcode.py).
    """

    equalised: bool = True

    def stored(self, out_features: int, in_features: int) -> list[Stored]:
        return [("weight", "F8_E4M3", (out_features, in_features)), ("scale", "F32", (out_features,))]

    def prepare(self, rows: Rows, out_features: int, in_features: int) -> Iterator[tuple[str, Tensor]]:
        def convert(piece: Tensor) -> tuple[Tensor, Tensor]:
            scale = row_scales(piece, 448.0)
            return (piece / scale[:, None]).to(torch.float8_e4m3fn), scale

        yield from pieces(rows, row_starts(out_features, in_features), convert)

    def linear(self, name: str, in_features: int, *, normed: bool) -> Linear:  # noqa: ARG002
        return Float8Linear(name)


class Float8Linear(Linear):
    """Back to float32, then a float32 product."""

    def forward(self, x: Tensor, weights: Weights) -> Tensor:
        matrix = torch.onnx.ops.symbolic(
            "DequantizeLinear",
            [self.weight(weights), self.scale(weights)],
            {"axis": 0},
            dtype=torch.float32,
            shape=self.weight(weights).shape,
        )
        return product(x, matrix, self.bias(weights))


PANEL = 128
"""Output channels side by side in memory. onnxruntime packs the weights at every call, as they are inputs; narrow
panels take half the time of whole rows with AMX, four fifths without (docs/adr/0001)."""


def panel_width(out_features: int) -> int:
    """The largest divisor of ``out_features`` up to :data:`PANEL`."""
    return max(width for width in range(1, min(PANEL, out_features) + 1) if out_features % width == 0)


@dataclass(frozen=True)
class RotatedInt8(Float32Patch):
    """int8 of the rotated matrix in panels ``[out / p, in, p]``, one scale per output channel: the encoders' form.

    The kernel wants ``[in, p]`` and signed weights (unsigned ones ran at half the speed).
    """

    equalised: bool = True

    def stored(self, out_features: int, in_features: int) -> list[Stored]:
        width = panel_width(out_features)
        panels = out_features // width
        return [("weight", "I8", (panels, in_features, width)), ("scale", "F32", (panels, 1, width))]

    def prepare(self, rows: Rows, out_features: int, in_features: int) -> Iterator[tuple[str, Tensor]]:
        matrix = rotation(in_features)

        def convert(panel: Tensor) -> tuple[Tensor, Tensor]:
            rotated = rotate(panel, matrix)
            scale = row_scales(rotated, 127.0)
            return rotated.div_(scale[:, None]).round_().to(torch.int8).t().contiguous(), scale

        yield from pieces(rows, range(0, out_features, panel_width(out_features)), convert)

    def linear(self, name: str, in_features: int, *, normed: bool) -> Linear:
        return RotatedInt8Linear(name, in_features, normed=normed)


class RotatedInt8Linear(Linear):
    """Rotate, quantise with one scale for all rows, multiply in int8."""

    rotation: Tensor

    def __init__(self, name: str, in_features: int, *, normed: bool) -> None:
        super().__init__(name)
        self.normed = normed
        self.register_buffer("rotation", rotation(in_features))

    def forward(self, x: Tensor, weights: Weights) -> Tensor:
        rotated = rotate(x, self.rotation)
        if self.normed:
            y = self.multiply(rotated, weights)
        else:
            peak = rotated.abs().amax(dim=1, keepdim=True).clamp_min(SMALLEST)
            y = self.multiply(rotated / peak, weights) * peak
        bias = self.bias(weights)
        return y if bias is None else y + bias

    def multiply(self, x: Tensor, weights: Weights) -> Tensor:
        matrix = self.weight(weights)
        panels, _, width = matrix.shape
        y = torch.onnx.ops.symbolic(
            "com.microsoft::DynamicQuantizeMatMul",
            [x, matrix, self.scale(weights)],
            dtype=torch.float32,
            shape=(panels, x.shape[0], width),
            version=1,
        )
        return y.transpose(0, 1).reshape(-1, panels * width)


@dataclass(frozen=True)
class LeftInt8(Float32Patch):
    """uint8 ``[out, in]`` around 128, one scale per output channel: the adapter's form, for one to eight rows.

    Such a product only waits for the weights. With the weights on the left onnxruntime reads them as they lie, at the
    memory's bandwidth; on the right it would first pack them (2 to 4 times slower measured). The activations cost
    nothing, so they get two levels, ``x = s * (high + low / 126)``: about 13 bits, since SigLIP2's and DINOv3's parts
    of the embedding may differ in size. 63 levels each side keep the sum of two products within int16, which old AVX2
    kernels need.
    """

    equalised: bool = False

    def stored(self, out_features: int, in_features: int) -> list[Stored]:
        return [("weight", "U8", (out_features, in_features)), ("scale", "F32", (out_features,))]

    def prepare(self, rows: Rows, out_features: int, in_features: int) -> Iterator[tuple[str, Tensor]]:
        def convert(piece: Tensor) -> tuple[Tensor, Tensor]:
            scale = row_scales(piece, 127.0)
            return (piece / scale[:, None]).round_().add_(128).to(torch.uint8), scale

        yield from pieces(rows, row_starts(out_features, in_features), convert)

    def linear(self, name: str, in_features: int, *, normed: bool) -> Linear:  # noqa: ARG002
        return LeftInt8Linear(name)


class LeftInt8Linear(Linear):
    """Integer weights times two-level integer activations."""

    zero_point: Tensor

    def __init__(self, name: str) -> None:
        super().__init__(name)
        self.register_buffer("zero_point", torch.tensor(128, dtype=torch.uint8))

    def forward(self, x: Tensor, weights: Weights) -> Tensor:
        matrix = self.weight(weights)
        scale = x.abs().amax(dim=1, keepdim=True).clamp_min(SMALLEST) / 63
        scaled = x / scale
        high = scaled.round()
        low = ((scaled - high) * 126).round()
        levels = torch.cat([high, low]).to(torch.int8).t()  # [in, 2 * rows]
        sums = torch.onnx.ops.symbolic(
            "MatMulInteger",
            [matrix, levels, self.zero_point],
            dtype=torch.int32,
            shape=(matrix.shape[0], levels.shape[1]),
        )
        sums_high, sums_low = sums.to(torch.float32).t().view(2, x.shape[0], matrix.shape[0]).unbind(0)
        y = (sums_high + sums_low / 126) * scale * self.scale(weights)
        bias = self.bias(weights)
        return y if bias is None else y + bias
