"""fp8: e4m3 with one scale per output channel, for the CPU, TensorRT and CUDA."""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from .base import SMALLEST, Kept, Linear, Rows, Weights, pieces, product, row_scales, row_starts
from .linears import Compute, CudaScaledLinear, GpuLinear, dequantised
from .storing import StoredFloat8


@dataclass(frozen=True)
class Float8(StoredFloat8, Kept):
    """FP8 e4m3 ``[out, in]``, one float32 scale per output channel: ``w = q * scale``, ``scale = max|row| / 448``.

    Equalised for the sake of FP8 activations, and as the CPU runs it as int8 (engines/cpu/transcode.py).
    """

    equalised: bool = True
    images_meet: bool = True

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


FLOAT8_LARGEST = 448.0
FLOAT8_E4M3 = 17
"""Its number in ``onnx.TensorProto``."""
LOW_LEVEL = 16.0
"""The second level of an activation counts steps this much finer: e4m3 keeps 4 significant bits."""


def quantised_float8(x: Tensor) -> Tensor:
    """Rounded to e4m3, larger values to the largest."""
    one = torch.ones((), dtype=x.dtype)
    return torch.onnx.ops.symbolic(
        "QuantizeLinear",
        [x, one],
        {"output_dtype": FLOAT8_E4M3, "saturate": 1},
        dtype=torch.float8_e4m3fn,
        shape=x.shape,
    )


@dataclass(frozen=True)
class GpuFloat8(Float8):
    """FP8 times FP8. ``levels`` 2: the activations get twice the bits, for a few rows that only wait for weights."""

    compute: Compute = torch.bfloat16
    levels: int = 1

    def linear(self, name: str, in_features: int) -> Linear:  # noqa: ARG002
        return GpuFloat8Linear(name, self.compute, self.levels)


class GpuFloat8Linear(GpuLinear):
    """``(x / s) W^T * s * scale`` with one s per row."""

    def __init__(self, name: str, compute: Compute, levels: int) -> None:
        super().__init__(name, compute)
        self.levels = levels

    def product(self, x: Tensor, weights: Weights) -> Tensor:
        one = torch.ones((), dtype=self.compute)
        x = x.to(torch.float32)
        size = x.abs().amax(dim=1, keepdim=True).clamp_min(SMALLEST) / FLOAT8_LARGEST
        matrix = dequantised(self.weight(weights), one, self.compute).t()
        scaled = (x / size).to(self.compute)
        y = torch.zeros((), dtype=torch.float32)
        for level in range(self.levels):
            rounded = dequantised(quantised_float8(scaled), one, self.compute)
            y = y + (rounded @ matrix).to(torch.float32) / LOW_LEVEL**level
            scaled = (scaled - rounded) * LOW_LEVEL
        return y * size * self.scale(weights)


@dataclass(frozen=True)
class CudaFloat8(Float8):
    """FP8 weights, 16-bit activations: no FP8 product, half the bytes over the link."""

    compute: Compute = torch.bfloat16

    def linear(self, name: str, in_features: int) -> Linear:  # noqa: ARG002
        return CudaScaledLinear(name, self.compute)
