"""int8 of the balanced matrix, the adapter's form, for the CPU, TensorRT and CUDA."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ...engines.cpu.sums import LEVELS_OF_EACH, WEIGHT_LEVELS
from .base import SMALLEST, Kept, Linear, Linears, Rows, Weights, row_scales, row_starts
from .linears import Compute, GpuLinear, dequantised, panels_by_rows
from .parallel import in_threads
from .rotated_int8 import quantised
from .storing import StoredBalancedInt8
from .torch_rotation import balanced_rotation, rotate


@dataclass(frozen=True)
class BalancedInt8(StoredBalancedInt8, Kept):
    """int8 in panels of both kinds of channels ``[in / p, out / q, 1, p', q]``, one scale for each ``q``: for few rows.

    Such a product only waits for the weights. onnxruntime reads them as they lie, without packing them first, where one
    row of unsigned bytes without a zero point is multiplied by signed bytes. So each column of a panel adds up to zero,
    and the zero point of the activations drops out of the sum: ``p`` channels are brought to ``p'``, a little more
    (engines/cpu/rotation.py), whose last of each block makes the rounded weights balance. Activations are two rows of
    levels, the second of what the first one leaves: only for the first do the weights come from memory.
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
        matrix = balanced_rotation(in_features)
        (_, _, (count, _, _, width, row)), _ = self.stored(out_features, in_features)
        weight, scale = torch.empty((count, width, out_features), dtype=torch.int8), torch.empty((count, out_features))

        def convert(start: int) -> None:
            piece = slice(start, min(start + starts.step, out_features))
            rotated = rotate(rows(start, piece.stop - start), matrix)
            panels, blocks = rotated.view(-1, width), rotated.view(-1, matrix.shape[1])
            steps = row_scales(panels, WEIGHT_LEVELS)
            panels.div_(steps[:, None]).round_()
            blocks[:, len(matrix) + 1] = -blocks.sum(dim=1)
            weight[:, :, piece] = panels.to(torch.int8).view(-1, count, width).permute(1, 2, 0)
            scale[:, piece] = steps.view(-1, count).t()

        starts = row_starts(out_features, in_features)
        for _ in in_threads(convert, starts):
            pass
        yield "weight", weight.view(count, width, -1, row).transpose(1, 2).contiguous()
        yield "scale", scale

    def linear(self, name: str, in_features: int) -> Linear:
        return BalancedInt8Linear(name, in_features)

    def linears(self, names: Sequence[str], in_features: int) -> Linears:
        return BalancedInt8Linears(names, in_features)


class BalancedLinear(Linear):
    """What all forms share. B rows, P panels of p' input channels, Q of q output channels."""

    rotation: Tensor

    def __init__(self, name: str, in_features: int) -> None:
        super().__init__(name)
        self.register_buffer("rotation", balanced_rotation(in_features))

    def joined(self, y: Tensor, weights: Weights) -> Tensor:
        """``[B, out]`` of the panels' products ``[P, Q, B, 1, q]``, scales and bias still to come."""
        y, bias = scaled_sum(y, self.scale(weights)), self.bias(weights)
        return y if bias is None else y + bias


def scaled_sum(y: Tensor, scale: Tensor) -> Tensor:
    """``[B, Q q]`` of the panels' products ``[P, Q, B, 1, q]``, their scales ``[P, Q, 1, 1, q]`` still to come."""
    y = y * scale
    panels, parts, _, _, row = y.shape
    y = y.view(parts, -1, row) if panels == 1 else y.sum(dim=0).squeeze(2)
    return y.view(-1, row) if parts == 1 else y.transpose(0, 1).reshape(-1, parts * row)


class BalancedInt8Linear(BalancedLinear):
    """Integer weights times integer activations, one panel and row at a time: the form that packs no weights."""

    def forward(self, x: Tensor, weights: Weights) -> Tensor:
        panels, _, _, width, _ = self.weight(weights).shape
        return self.multiply(*panel_levels(x, self.rotation, panels, width), weights)

    def multiply(self, levels: Tensor, steps: Tensor, weights: Weights) -> Tensor:
        """``[B, out]`` of what :func:`panel_levels` gave for ``[B, in]``."""
        return self.joined(self.sums(levels, steps, weights), weights)

    def shaped(self, levels: Tensor, steps: Tensor, weights: Weights, shape: tuple[int, ...]) -> Tensor:
        """``[B, *shape]`` of one panel and without a bias: what changes the shape last copies what it gives."""
        y = self.sums(levels, steps, weights)
        y = y.view(y.shape[1], -1, y.shape[4]).transpose(0, 1).reshape(-1, *shape)
        return y * self.scale(weights).view(shape)

    def sums(self, levels: Tensor, steps: Tensor, weights: Weights) -> Tensor:
        """The panels' products ``[P, Q, B, 1, q]``, without the weights' scales."""
        matrix = self.weight(weights)
        shape = (*matrix.shape[:2], levels.shape[2], 1, matrix.shape[4])
        sums = torch.onnx.ops.symbolic("MatMulInteger", [levels, matrix], dtype=torch.int32, shape=shape)
        return steps @ sums.to(torch.float32).view(*shape[:2], -1, 2, shape[4])


class BalancedInt8Linears(Linears):
    """The inputs quantised together: a block has up to eight, and each node costs as much as a small product."""

    rotation: Tensor

    def __init__(self, names: Sequence[str], in_features: int) -> None:
        super().__init__([BalancedInt8Linear(name, in_features) for name in names])
        self.register_buffer("rotation", balanced_rotation(in_features))

    def forward(self, x: Tensor, weights: Weights, shapes: Sequence[tuple[int, ...]]) -> list[Tensor]:
        panels, _, _, width, _ = weights[f"{self.linears[0].name}.weight"].shape
        together = panel_levels(x.flatten(1), self.rotation, len(self.linears) * panels, width)
        parts = zip(self.linears, *(torch.split(part, panels) for part in together), shapes, strict=True)
        if panels == 1:
            return [linear.shaped(*part, weights, shape) for linear, *part, shape in parts]
        return [linear.multiply(*part, weights).view(-1, *shape) for linear, *part, shape in parts]


def panel_levels(x: Tensor, rotation: Tensor, panels: int, width: int) -> tuple[Tensor, Tensor]:
    """``x [B, in]`` as two rows of uint8 for each panel ``[P, 1, 2 B, 1, p']``, and their steps ``[P, 1, B, 1, 2]``.

    Of the second row's levels, half a step of the first is 64: so no value needs more of them than there are.
    """
    rotated = rotate(x, rotation).view(-1, panels, 1, width).transpose(0, 1)
    steps = rotated.abs().amax(dim=3, keepdim=True).clamp_min(SMALLEST) / LEVELS_OF_EACH
    exact = rotated / steps
    coarse = exact.round()
    fine = (exact - coarse) * (2 * LEVELS_OF_EACH)
    zero_point = torch.tensor(LEVELS_OF_EACH, dtype=torch.uint8)
    levels = quantised(torch.cat([coarse, fine], dim=2), torch.ones(()), zero_point, {})
    steps = steps * torch.tensor([1, 1 / (2 * LEVELS_OF_EACH)])
    return levels.view(panels, 1, -1, 1, width), steps.unsqueeze(1)


@dataclass(frozen=True)
class GpuBalancedInt8(BalancedInt8):
    """The same weights, 16-bit activations rotated like them."""

    compute: Compute = torch.bfloat16

    def linear(self, name: str, in_features: int) -> Linear:
        return GpuBalancedInt8Linear(name, self.compute, in_features)

    def linears(self, names: Sequence[str], in_features: int) -> Linears:
        return Linears([self.linear(name, in_features) for name in names])


class GpuBalancedInt8Linear(GpuLinear):
    """A product for each panel, its scales in float32; the panels' sum in float32 too."""

    rotation: Tensor

    def __init__(self, name: str, compute: Compute, in_features: int) -> None:
        super().__init__(name, compute)
        self.register_buffer("rotation", balanced_rotation(in_features))

    def product(self, x: Tensor, weights: Weights) -> Tensor:
        panels, _, _, width, row = self.weight(weights).shape
        parts = rotate(x.to(self.compute), self.rotation.to(self.compute)).view(-1, panels, width)
        parts = parts.transpose(0, 1).unsqueeze(1) if panels > 1 else parts.view(-1, width)
        y = (parts @ self.matrix(weights).view(panels, -1, width, row)).to(torch.float32)
        return scaled_sum(y.unsqueeze(3), self.scale(weights))

    def matrix(self, weights: Weights) -> Tensor:
        return dequantised(self.weight(weights), torch.ones((), dtype=self.compute), self.compute)


@dataclass(frozen=True)
class CudaBalancedInt8(BalancedInt8):
    """The same weights, activations rotated like them."""

    compute: Compute = torch.bfloat16

    def linear(self, name: str, in_features: int) -> Linear:
        return CudaBalancedInt8Linear(name, self.compute, in_features)

    def linears(self, names: Sequence[str], in_features: int) -> Linears:
        return Linears([self.linear(name, in_features) for name in names])


class CudaBalancedInt8Linear(GpuBalancedInt8Linear):
    """The weights cast instead of dequantised; panels that share their input are multiplied from the left."""

    def product(self, x: Tensor, weights: Weights) -> Tensor:
        panels, parts, _, width, row = self.weight(weights).shape
        if panels > 1:
            return super().product(x, weights)
        matrix = self.matrix(weights).view(parts, width, row)
        y = panels_by_rows(matrix, rotate(x.to(self.compute), self.rotation.to(self.compute))).to(torch.float32)
        return (y * self.scale(weights).view(parts, row, 1)).reshape(parts * row, -1).t()

    def matrix(self, weights: Weights) -> Tensor:
        return self.weight(weights).to(self.compute)
