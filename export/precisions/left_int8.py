"""int8 with the matrix on the left, the adapter's form, for the CPU, TensorRT and CUDA."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ...engines.cpu.sums import WEIGHT_LEVELS
from .base import SMALLEST, Kept, Linear, Linears, Rows, Weights, pieces, row_scales, row_starts
from .linears import Compute, CudaScaledLinear, GpuLinear
from .storing import StoredLeftInt8, panel_width


@dataclass(frozen=True)
class LeftInt8(StoredLeftInt8, Kept):
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


@dataclass(frozen=True)
class GpuLeftInt8(LeftInt8):
    """uint8 weights around 128, for one to eight rows."""

    compute: Compute = torch.bfloat16

    def linear(self, name: str, in_features: int) -> Linear:  # noqa: ARG002
        return GpuLeftInt8Linear(name, self.compute)

    def linears(self, names: Sequence[str], in_features: int) -> Linears:
        return Linears([self.linear(name, in_features) for name in names])


class GpuLeftInt8Linear(GpuLinear):
    """TensorRT only casts unsigned bytes, so the matrix becomes 16 bits: at most 29 MB at full size."""

    def product(self, x: Tensor, weights: Weights) -> Tensor:
        return super().product(x, weights) * self.scale(weights)

    def matrix(self, weights: Weights) -> Tensor:
        panels = super().matrix(weights) - 128  # at most 8 bits: exact in bfloat16
        return panels.transpose(0, 1).reshape(panels.shape[1], -1)


@dataclass(frozen=True)
class CudaLeftInt8(LeftInt8):
    """uint8 weights around 128."""

    compute: Compute = torch.bfloat16

    def linear(self, name: str, in_features: int) -> Linear:  # noqa: ARG002
        return CudaLeftInt8Linear(name, self.compute)

    def linears(self, names: Sequence[str], in_features: int) -> Linears:
        return Linears([self.linear(name, in_features) for name in names])


class CudaLeftInt8Linear(CudaScaledLinear):
    """The matrix moved back around zero; both steps are exact in bfloat16."""

    def matrix(self, weights: Weights) -> Tensor:
        panels = super().matrix(weights) - 128
        return panels.transpose(0, 1).reshape(panels.shape[1], -1)
