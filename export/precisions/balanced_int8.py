"""int8 of the balanced matrix, the adapter's form, for the CPU, TensorRT and CUDA."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ...engines.cpu.sums import LEVELS_OF_EACH, WEIGHT_LEVELS
from .base import SMALLEST, Kept, Linear, Linears, Rows, Weights, row_scales, row_starts
from .linears import Compute, GpuLinear, dequantised
from .parallel import in_threads
from .rotated_int8 import quantised
from .storing import StoredBalancedInt8
from .torch_rotation import balanced_rotation, rotate


@dataclass(frozen=True)
class BalancedInt8(StoredBalancedInt8, Kept):
    """int8 in panels of input channels ``[in / p, 1, p', out]``, one scale per panel and output channel: for few rows.

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
        (_, _, weight_shape), (_, _, scale_shape) = self.stored(out_features, in_features)
        weight, scale = torch.empty(weight_shape, dtype=torch.int8), torch.empty(scale_shape)

        def convert(start: int) -> None:
            piece = slice(start, min(start + starts.step, out_features))
            rotated = rotate(rows(start, piece.stop - start), matrix)
            panels, blocks = rotated.view(-1, weight_shape[2]), rotated.view(-1, matrix.shape[1])
            steps = row_scales(panels, WEIGHT_LEVELS)
            panels.div_(steps[:, None]).round_()
            blocks[:, len(matrix) + 1] = -blocks.sum(dim=1)
            weight[:, 0, :, piece] = panels.to(torch.int8).view(-1, *weight_shape[::2]).permute(1, 2, 0)
            scale[:, 0, 0, piece] = steps.view(-1, len(scale)).t()

        starts = row_starts(out_features, in_features)
        for _ in in_threads(convert, starts):
            pass
        yield "weight", weight
        yield "scale", scale

    def linear(self, name: str, in_features: int) -> Linear:
        return BalancedInt8Linear(name, in_features)

    def linears(self, names: Sequence[str], in_features: int) -> Linears:
        return BalancedInt8Linears(names, in_features)


class BalancedLinear(Linear):
    """What all forms share. B rows, P panels of p' channels."""

    rotation: Tensor

    def __init__(self, name: str, in_features: int) -> None:
        super().__init__(name)
        self.register_buffer("rotation", balanced_rotation(in_features))

    def joined(self, y: Tensor, weights: Weights) -> Tensor:
        """``[B, out]`` of the panels' products ``[P, B, 1, out]``, their scales still to come."""
        y = y * self.scale(weights)
        y = y.view(-1, y.shape[3]) if y.shape[0] == 1 else y.sum(dim=0).squeeze(1)
        bias = self.bias(weights)
        return y if bias is None else y + bias


class BalancedInt8Linear(BalancedLinear):
    """Integer weights times integer activations, one panel and row at a time: the form that packs no weights."""

    def forward(self, x: Tensor, weights: Weights) -> Tensor:
        panels, _, width, _ = self.weight(weights).shape
        return self.multiply(*panel_levels(x, self.rotation, panels, width), weights)

    def multiply(self, levels: Tensor, steps: Tensor, weights: Weights) -> Tensor:
        """``[B, out]`` of what :func:`panel_levels` gave for ``[B, in]``."""
        matrix = self.weight(weights)
        shape = (*levels.shape[:3], matrix.shape[3])
        sums = torch.onnx.ops.symbolic("MatMulInteger", [levels, matrix], dtype=torch.int32, shape=shape)
        return self.joined(steps @ sums.to(torch.float32).view(shape[0], -1, 2, shape[3]), weights)


class BalancedInt8Linears(Linears):
    """The inputs quantised together: a block has up to eight, and each node costs as much as a small product."""

    rotation: Tensor

    def __init__(self, names: Sequence[str], in_features: int) -> None:
        super().__init__([BalancedInt8Linear(name, in_features) for name in names])
        self.register_buffer("rotation", balanced_rotation(in_features))

    def forward(self, x: Tensor, weights: Weights) -> list[Tensor]:
        panels, _, width, _ = weights[f"{self.linears[0].name}.weight"].shape
        together = panel_levels(x.flatten(1), self.rotation, len(self.linears) * panels, width)
        parts = zip(self.linears, *(torch.split(part, panels) for part in together), strict=True)
        return [linear.multiply(*part, weights) for linear, *part in parts]


def panel_levels(x: Tensor, rotation: Tensor, panels: int, width: int) -> tuple[Tensor, Tensor]:
    """``x [B, in]`` as two rows of uint8 for each panel of an image ``[P, 2 B, 1, p']``, and their steps ``[P, B, 1, 2]``.

    Of the second row's levels, half a step of the first is 64: so no value needs more of them than there are.
    """
    rotated = rotate(x, rotation).view(-1, panels, 1, width).transpose(0, 1)
    steps = rotated.abs().amax(dim=3, keepdim=True).clamp_min(SMALLEST) / LEVELS_OF_EACH
    exact = rotated / steps
    coarse = exact.round()
    fine = (exact - coarse) * (2 * LEVELS_OF_EACH)
    zero_point = torch.tensor(LEVELS_OF_EACH, dtype=torch.uint8)
    levels = quantised(torch.cat([coarse, fine], dim=2), torch.ones(()), zero_point, {})
    return levels.view(panels, -1, 1, width), steps * torch.tensor([1, 1 / (2 * LEVELS_OF_EACH)])


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
        panels, _, width, out_features = self.weight(weights).shape
        rotated = rotate(x.to(self.compute), self.rotation.to(self.compute))
        matrix = self.matrix(weights)
        if panels == 1:
            return (rotated @ matrix.view(width, out_features)).to(torch.float32) * self.scale(weights).view(1, -1)
        parts = rotated.view(-1, panels, width).transpose(0, 1)
        y = (parts @ matrix.view(panels, width, out_features)).to(torch.float32) * self.scale(weights).squeeze(1)
        return y.sum(dim=0)

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
    """The weights cast instead of dequantised."""

    def matrix(self, weights: Weights) -> Tensor:
        return self.weight(weights).to(self.compute)
