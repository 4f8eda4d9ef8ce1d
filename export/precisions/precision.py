"""Precisions: how a matrix is stored in a pack, made from checkpoint rows, and multiplied in a graph.

The three belong together: what ``prepare`` does to the weights, ``linear`` must account for in the graph.

int8 needs no calibration (docs/adr/0001): per-output-channel weights, activations quantised as they come, channel sizes
evened out beforehand (equalise.py), outlier channels spread by a rotation (rotation.py). Each row of activations, a
token, has a scale of its own: a massive token costs the others nothing, and what a picture gives does not depend on the
pictures beside it. Both operands have as many levels as every CPU adds exactly (engines/cpu/sums.py).

A product's output lies in panels, and what only looks at single values may stay there: so a :class:`Linear` can hand
out heads or parts of it as the precision has them, and take such a part back in, without the transposes between.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol, TypeAlias

import torch
from torch import Tensor, nn

from ...engines.cpu.sums import ACTIVATION_LEVELS, LARGEST_PAIR, WEIGHT_LEVELS
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

    @property
    def images_meet(self) -> bool:
        """Whether a picture's values may depend on the others of its batch, if only by the order of additions."""
        ...

    def stored(self, out_features: int, in_features: int, group: int | None = None) -> list[Stored]:
        """The pack's tensors for a matrix, in file order; ``group``: rows that stay together, all by default."""
        ...

    def prepare(
        self, rows: Rows, out_features: int, in_features: int, group: int | None = None
    ) -> Iterator[tuple[str, Tensor]]:
        """``(suffix, piece)``: the bytes of those tensors, front to back."""
        ...

    def linear(self, name: str, in_features: int) -> "Linear":
        """The product with that matrix as a module."""
        ...

    def linears(self, names: Sequence[str], in_features: int) -> "Linears":
        """Products with matrices of equal ``in_features`` as one module."""
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

    def heads(self, x: Tensor, weights: Weights, parts: int, heads: int, tokens: int) -> tuple[Tensor, ...]:
        """The output cut into ``parts``, such as q, k and v, each ``[B, heads, tokens, D / heads]``."""
        y = self(x, weights)
        return y.view(-1, tokens, parts, heads, y.shape[1] // (parts * heads)).permute(2, 0, 3, 1, 4).unbind(0)

    def spread(self, x: Tensor, weights: Weights, parts: int) -> tuple[Tensor, ...]:
        """The output cut into ``parts``, laid out as :meth:`gathered` of the same precision takes it."""
        return self(x, weights).chunk(parts, dim=1)

    def gathered(self, x: Tensor, weights: Weights) -> Tensor:
        """The product with what :meth:`spread` gave, ``[rows, out]``."""
        return self(x, weights)

    def __call__(self, x: Tensor, weights: Weights) -> Tensor:
        return super().__call__(x, weights)  # type: ignore[no-any-return]  # torch leaves calls untyped


class Linears(nn.Module):
    """``(x [rows, linears, in], weights) -> [rows, out]`` of each: linear i sees ``x[:, i]``."""

    def __init__(self, linears: Sequence[Linear]) -> None:
        super().__init__()
        self.linears = nn.ModuleList(linears)

    def forward(self, x: Tensor, weights: Weights) -> list[Tensor]:
        return [linear(part, weights) for linear, part in zip(self.linears, x.unbind(1), strict=True)]


class Kept:
    """What most precisions share: patches in float32, each product by itself."""

    def linear(self, name: str, in_features: int) -> Linear:
        raise NotImplementedError

    def linears(self, names: Sequence[str], in_features: int) -> Linears:
        return Linears([self.linear(name, in_features) for name in names])

    def patch(self) -> Linear:
        return FloatLinear("patch")


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


@dataclass(frozen=True)
class Float(Kept):
    """float32 or bfloat16 as it came, ``[out, in]``. onnxruntime's CPU has no bfloat16 product: the graph casts."""

    dtype: str
    equalised: bool = False
    images_meet: bool = True

    def stored(self, out_features: int, in_features: int, group: int | None = None) -> list[Stored]:  # noqa: ARG002
        return [("weight", self.dtype, (out_features, in_features))]

    def prepare(
        self,
        rows: Rows,
        out_features: int,
        in_features: int,
        group: int | None = None,  # noqa: ARG002
    ) -> Iterator[tuple[str, Tensor]]:
        for start in (starts := row_starts(out_features, in_features)):
            yield "weight", rows(start, min(starts.step, out_features - start)).to(TORCH_DTYPES[self.dtype])

    def linear(self, name: str, in_features: int) -> Linear:  # noqa: ARG002
        return FloatLinear(name)


class FloatLinear(Linear):
    """A float32 product."""

    def forward(self, x: Tensor, weights: Weights) -> Tensor:
        return product(x, self.weight(weights).to(x.dtype), self.bias(weights))


@dataclass(frozen=True)
class Float8(Kept):
    """FP8 e4m3 ``[out, in]``, one float32 scale per output channel: ``w = q * scale``, ``scale = max|row| / 448``.

    Equalised for the sake of FP8 activations, and as the CPU runs it as int8 (engines/cpu/transcode.py).
    """

    equalised: bool = True
    images_meet: bool = True

    def stored(self, out_features: int, in_features: int, group: int | None = None) -> list[Stored]:  # noqa: ARG002
        return [("weight", "F8_E4M3", (out_features, in_features)), ("scale", "F32", (out_features,))]

    def prepare(
        self,
        rows: Rows,
        out_features: int,
        in_features: int,
        group: int | None = None,  # noqa: ARG002
    ) -> Iterator[tuple[str, Tensor]]:
        def convert(piece: Tensor) -> tuple[Tensor, Tensor]:
            scale = row_scales(piece, 448.0)
            return (piece / scale[:, None]).to(torch.float8_e4m3fn), scale

        yield from pieces(rows, row_starts(out_features, in_features), convert)

    def linear(self, name: str, in_features: int) -> Linear:  # noqa: ARG002
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


def panel_width(group: int) -> int:
    """The largest divisor of ``group``, the rows that stay together, up to :data:`PANEL`."""
    return max(width for width in range(1, min(PANEL, group) + 1) if group % width == 0)


def row_scales_for_exact_sums(piece: Tensor) -> Tensor:
    """The scale ``[rows]`` of an int8 matrix whose products every CPU adds exactly (engines/cpu/sums.py)."""
    pairs = piece[:, : piece.shape[1] // 2 * 2].abs().view(len(piece), -1, 2).sum(dim=2)
    pair = pairs.amax(dim=1) if pairs.numel() else piece.new_zeros(len(piece))
    return torch.maximum(row_scales(piece, WEIGHT_LEVELS), pair / LARGEST_PAIR)


@dataclass(frozen=True)
class RotatedInt8(Kept):
    """int8 of the rotated matrix in panels ``[out / p, in, p]``, one scale per output channel: the encoders' form.

    The kernel wants ``[in, p]`` and signed weights (unsigned ones ran at half the speed). A panel crosses no head.
    """

    equalised: bool = True
    images_meet: bool = False

    def stored(self, out_features: int, in_features: int, group: int | None = None) -> list[Stored]:
        width = panel_width(group or out_features)
        panels = out_features // width
        return [("weight", "I8", (panels, in_features, width)), ("scale", "F32", (panels, 1, width))]

    def prepare(
        self, rows: Rows, out_features: int, in_features: int, group: int | None = None
    ) -> Iterator[tuple[str, Tensor]]:
        matrix = rotation(in_features)

        def convert(panel: Tensor) -> tuple[Tensor, Tensor]:
            rotated = rotate(panel, matrix)
            scale = row_scales_for_exact_sums(rotated)
            return rotated.div_(scale[:, None]).round_().to(torch.int8).t().contiguous(), scale

        yield from pieces(rows, range(0, out_features, panel_width(group or out_features)), convert)

    def linear(self, name: str, in_features: int) -> Linear:
        return RotatedInt8Linear(name, in_features)


class RotatedInt8Linear(Linear):
    """Rotate, quantise each row, multiply in int8. P panels of p channels, R rows."""

    rotation: Tensor

    def __init__(self, name: str, in_features: int) -> None:
        super().__init__(name)
        self.register_buffer("rotation", rotation(in_features))

    def forward(self, x: Tensor, weights: Weights) -> Tensor:
        y = self.panels(x, weights)
        bias = self.bias(weights)
        y = y.transpose(0, 1).reshape(-1, y.shape[0] * y.shape[2])
        return y if bias is None else y + bias

    def heads(self, x: Tensor, weights: Weights, parts: int, heads: int, tokens: int) -> tuple[Tensor, ...]:
        y = self.biased(self.panels(x, weights), weights)
        assert y.shape[0] == parts * heads  # a panel is a head
        y = y.view(parts, heads, -1, tokens, y.shape[2])
        return y.transpose(1, 2).unbind(0)

    def spread(self, x: Tensor, weights: Weights, parts: int) -> tuple[Tensor, ...]:
        """Each ``[P / parts, R, p]``."""
        y = self.biased(self.panels(x, weights), weights)
        return (y,) if parts == 1 else y.chunk(parts, dim=0)  # a Split into one is a copy

    def gathered(self, x: Tensor, weights: Weights) -> Tensor:
        """Of ``x [in / p, R, p]``, where panels hold whole blocks of the rotation: bytes are transposed, not floats."""
        assert x.shape[2] % len(self.rotation) == 0
        rotated = rotate(x, self.rotation)
        scale = row_steps(rotated.amax(dim=2).amax(dim=0), rotated.amin(dim=2).amin(dim=0)).unsqueeze(1)
        levels = quantised(rotated / scale, torch.ones(()), torch.tensor(ACTIVATION_LEVELS, dtype=torch.uint8), {})
        levels = levels.transpose(0, 1).reshape(-1, x.shape[0] * x.shape[2])
        y = (self.multiply(levels, weights) * scale).transpose(0, 1)
        y = y.reshape(-1, y.shape[1] * y.shape[2])
        bias = self.bias(weights)
        return y if bias is None else y + bias

    def panels(self, x: Tensor, weights: Weights) -> Tensor:
        """``[P, R, p]`` of ``x [R, in]``, without the bias."""
        rotated = rotate(x, self.rotation)
        scale = row_steps(rotated.amax(dim=1, keepdim=True), rotated.amin(dim=1, keepdim=True))
        zero_points = torch.full((x.shape[0],), ACTIVATION_LEVELS, dtype=torch.uint8)
        return self.multiply(quantised(rotated, scale.squeeze(1), zero_points, {"axis": 0}), weights) * scale

    def biased(self, y: Tensor, weights: Weights) -> Tensor:
        bias = self.bias(weights)
        return y if bias is None else y + bias.view(y.shape[0], 1, y.shape[2])

    def multiply(self, levels: Tensor, weights: Weights) -> Tensor:
        """``[P, R, p]`` of uint8 activations ``[R, in]``, in units of their rows' steps."""
        matrix = self.weight(weights)
        panels, _, width = matrix.shape
        zero_point = torch.tensor(ACTIVATION_LEVELS, dtype=torch.uint8)
        y: Tensor = torch.onnx.ops.symbolic(
            "com.microsoft::MatMulIntegerToFloat",
            [levels, matrix, torch.ones(()), self.scale(weights), zero_point],
            dtype=torch.float32,
            shape=(panels, levels.shape[0], width),
            version=1,
        )
        return y


def row_steps(largest: Tensor, smallest: Tensor) -> Tensor:
    """The step that gives the value furthest from zero :data:`ACTIVATION_LEVELS` levels.

    Two passes that only read are faster than one over absolute values, which are written first.
    """
    return torch.maximum(largest, -smallest).clamp_min(SMALLEST) / ACTIVATION_LEVELS


def quantised(x: Tensor, scale: Tensor, zero_point: Tensor, attributes: Mapping[str, int]) -> Tensor:
    """``x`` as uint8 levels: ``round(x / scale) + zero_point``."""
    y: Tensor = torch.onnx.ops.symbolic(
        "QuantizeLinear", [x, scale, zero_point], dict(attributes), dtype=torch.uint8, shape=x.shape
    )
    return y


@dataclass(frozen=True)
class LeftInt8(Kept):
    """uint8 around 128 in panels ``[in / p, out, p]``, one scale per output channel: the adapter's form, for few rows.

    Such a product only waits for the weights. With the weights on the left onnxruntime reads them as they lie, at the
    memory's bandwidth; on the right it would first pack them (2 to 4 times slower measured). Rows longer than a panel
    are read at half the speed, so they are cut: the sums of the panels are integers and add up exactly. The activations
    cost nothing, so they get two levels, ``x = s * (high + low / 126)``: about 13 bits, since SigLIP2's and DINOv3's
    parts of the embedding may differ in size. 63 levels on each side keep the sum of two products within int16
    (engines/cpu/sums.py): 2 * 255 * 63 = 32130.
    """

    equalised: bool = False
    images_meet: bool = False

    def stored(self, out_features: int, in_features: int, group: int | None = None) -> list[Stored]:  # noqa: ARG002
        width = panel_width(in_features)
        return [("weight", "U8", (in_features // width, out_features, width)), ("scale", "F32", (out_features,))]

    def prepare(
        self,
        rows: Rows,
        out_features: int,
        in_features: int,
        group: int | None = None,  # noqa: ARG002
    ) -> Iterator[tuple[str, Tensor]]:
        width = panel_width(in_features)

        def convert(piece: Tensor) -> tuple[Tensor, Tensor]:
            scale = row_scales(piece, WEIGHT_LEVELS)
            return (piece / scale[:, None]).round_().add_(128).to(torch.uint8), scale

        if width == in_features:
            yield from pieces(rows, row_starts(out_features, in_features), convert)
            return
        weight, scale = convert(rows(0, out_features))  # 23 MB at full size
        yield "weight", weight.view(out_features, -1, width).transpose(0, 1).contiguous()
        yield "scale", scale

    def linear(self, name: str, in_features: int) -> Linear:  # noqa: ARG002
        return LeftInt8Linear(name)

    def linears(self, names: Sequence[str], in_features: int) -> "Linears":  # noqa: ARG002
        return LeftInt8Linears([LeftInt8Linear(name) for name in names])


class LeftInt8Linear(Linear):
    """Integer weights times two-level integer activations. B rows, P panels of p input channels."""

    zero_point: Tensor

    def __init__(self, name: str) -> None:
        super().__init__(name)
        self.register_buffer("zero_point", torch.tensor(128, dtype=torch.uint8))

    def forward(self, x: Tensor, weights: Weights) -> Tensor:
        return self.multiply(*two_levels(x), weights)

    def multiply(self, levels: Tensor, scale: Tensor, weights: Weights) -> Tensor:
        """``[B, out]`` of what :func:`two_levels` gave for ``[B, in]``."""
        matrix = self.weight(weights)
        panels, out_features, width = matrix.shape
        if panels == 1:
            inputs = [matrix, levels, torch.ones(()), scale, self.zero_point]
            shape = (1, out_features, levels.shape[1])
            name = "com.microsoft::MatMulIntegerToFloat"
            y = torch.onnx.ops.symbolic(name, inputs, dtype=torch.float32, shape=shape, version=1).squeeze(0)
        else:
            inputs = [matrix, levels.reshape(panels, width, -1), self.zero_point]
            shape = (panels, out_features, levels.shape[1])
            sums = torch.onnx.ops.symbolic("MatMulInteger", inputs, dtype=torch.int32, shape=shape)
            y = sums.sum(dim=0, dtype=torch.int32).to(torch.float32) * scale
        high, low = y.t().reshape(2, -1, out_features).unbind(0)  # adding two columns of y takes ten times as long
        y = (high + low) * self.scale(weights)
        bias = self.bias(weights)
        return y if bias is None else y + bias


class LeftInt8Linears(Linears):
    """The inputs quantised together: a block has up to eight, and each node costs as much as a small product."""

    def forward(self, x: Tensor, weights: Weights) -> list[Tensor]:
        levels, scales = (part.unbind(0) for part in two_levels(x.transpose(0, 1)))
        each = zip(self.linears, levels, scales, strict=True)
        return [linear.multiply(level, scale, weights) for linear, level, scale in each]  # type: ignore[operator]


def two_levels(x: Tensor) -> tuple[Tensor, Tensor]:
    """``x [..., B, K]`` as int8 ``[..., K, 2 B]``, the fine levels behind the coarse ones, and their steps."""
    scale = x.abs().amax(dim=-1, keepdim=True).clamp_min(SMALLEST) / 63
    scaled = x / scale
    high = scaled.round()
    low = ((scaled - high) * 126).round()
    levels = torch.cat([high, low], dim=-2).to(torch.int8).transpose(-1, -2)
    return levels, torch.cat([scale, scale / 126], dim=-2).squeeze(-1)
