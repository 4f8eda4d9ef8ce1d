"""int8 of the rotated matrix in panels, the encoders' form, for the CPU, TensorRT and CUDA."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from ...engines.cpu.sums import ACTIVATION_LEVELS
from .base import SMALLEST, Kept, Linear, Rows, Weights, pieces, row_scales_for_exact_sums
from .linears import Compute, GpuLinear, dequantised, panels_by_rows
from .storing import StoredRotatedInt8, panel_width
from .torch_rotation import rotate, rotation


@dataclass(frozen=True)
class RotatedInt8(StoredRotatedInt8, Kept):
    """int8 of the rotated matrix in panels ``[out / p, in, p]``, one scale per output channel: the encoders' form.

    The kernel wants ``[in, p]`` and signed weights (unsigned ones ran at half the speed). A panel crosses no head.
    """

    equalised: bool = True
    images_meet: bool = False

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
        return self.joined(self.panels(x, weights), weights)

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
        return self.joined(self.multiply(levels, weights) * scale, weights)

    def panels(self, x: Tensor, weights: Weights) -> Tensor:
        """``[P, R, p]`` of ``x [R, in]``, without the bias."""
        rotated = rotate(x, self.rotation)
        scale = row_steps(rotated.amax(dim=1, keepdim=True), rotated.amin(dim=1, keepdim=True))
        zero_points = torch.full((x.shape[0],), ACTIVATION_LEVELS, dtype=torch.uint8)
        return self.multiply(quantised(rotated, scale.squeeze(1), zero_points, {"axis": 0}), weights) * scale

    def joined(self, y: Tensor, weights: Weights) -> Tensor:
        """``[R, out]`` of panels, with the bias."""
        bias = self.bias(weights)
        y = y.transpose(0, 1).reshape(-1, y.shape[0] * y.shape[2])
        return y if bias is None else y + bias

    def biased(self, y: Tensor, weights: Weights) -> Tensor:
        """The panels, with the bias."""
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
class GpuRotatedInt8(RotatedInt8):
    """int8 weights in panels, 16-bit activations rotated like the weights."""

    compute: Compute = torch.bfloat16

    def linear(self, name: str, in_features: int) -> Linear:
        return GpuRotatedInt8Linear(name, self.compute, in_features)

    def patch(self) -> Linear:
        return GpuLinear("patch", self.compute) if self.compute is torch.float16 else super().patch()


class GpuRotatedInt8Linear(GpuLinear):
    """A batched product over the panels ``[out / p, in, p]``; in float16 one over the panels side by side."""

    rotation: Tensor

    def __init__(self, name: str, compute: Compute, in_features: int) -> None:
        super().__init__(name, compute)
        self.register_buffer("rotation", rotation(in_features))

    def product(self, x: Tensor, weights: Weights) -> Tensor:
        rotated = rotate(x.to(self.compute), self.rotation.to(self.compute))
        panels, channels, width = self.weight(weights).shape
        matrix = self.matrix(weights)
        if self.compute is torch.float16:  # for sm75 the planner would copy the activations once per panel, 1.7 GB
            y = rotated @ matrix.permute(1, 0, 2).reshape(channels, panels * width)
            return y.to(torch.float32) * self.scale(weights).reshape(-1)
        y = (rotated.unsqueeze(0) @ matrix).to(torch.float32) * self.scale(weights)
        return y.transpose(0, 1).reshape(-1, panels * width)

    def matrix(self, weights: Weights) -> Tensor:
        return dequantised(self.weight(weights), torch.ones((), dtype=self.compute), self.compute)


@dataclass(frozen=True)
class CudaRotatedInt8(RotatedInt8):
    """int8 weights in panels, activations rotated like them."""

    compute: Compute = torch.bfloat16

    def linear(self, name: str, in_features: int) -> Linear:
        return CudaRotatedInt8Linear(name, self.compute, in_features)


class CudaRotatedInt8Linear(GpuRotatedInt8Linear):
    """The weights cast instead of dequantised, and multiplied from the left."""

    def product(self, x: Tensor, weights: Weights) -> Tensor:
        matrix = self.matrix(weights)  # before x: see CudaLinear
        panels, _, width = matrix.shape
        y = panels_by_rows(matrix, rotate(x.to(self.compute), self.rotation.to(self.compute))).to(torch.float32)
        return (y * self.scale(weights).view(panels, width, 1)).reshape(panels * width, -1).t()

    def matrix(self, weights: Weights) -> Tensor:
        return self.weight(weights).to(self.compute)
