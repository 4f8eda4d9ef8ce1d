"""The linears of the graphs that TensorRT gets. The packs are those of the CPU; only the arithmetic differs.

Weights are graph inputs, so nothing can be folded while a plan is built, and what decides is which form the planner
turns into a product of eight-bit operands without a hidden 16-bit copy of the matrix (docs/adr/0005):

- fp8: both operands pass through quantise and dequantise with the scale one, and the true scales, one per token and one
  per output channel, are multiplied to the product. With the true scales in the dequantise node the planner kept
  copies. One token's scale follows its own largest value, so no calibration is needed.
- int8: activations stay in 16 bits; the weights are dequantised in front of the product.

``compute`` is bfloat16, float16 (sm75 has no bfloat16), or float32 for onnxruntime's CPU in the tests. Norms, residual
stream, scales and biases are float32: with unit scales a product reaches 448 * 448 * channels, too large for float16.
"""

from dataclasses import dataclass
from typing import TypeAlias

import torch
from torch import Tensor

from ..specs import Spec
from .precision import (
    SMALLEST,
    Float,
    Float8,
    LeftInt8,
    Linear,
    Precision,
    RotatedInt8,
    Weights,
)
from .rotation import rotate, rotation

FLOAT8_LARGEST = 448.0
FLOAT8_E4M3 = 17
"""Its number in ``onnx.TensorProto``."""
LOW_LEVEL = 16.0
"""The second level of an activation counts steps this much finer: e4m3 keeps 4 significant bits."""
Compute: TypeAlias = torch.dtype


def gpu_precision(name: str, spec: Spec, compute: Compute = torch.bfloat16) -> Precision:
    """The precision ``name`` with the same packs as :func:`precision_for`, for a GPU's graphs."""
    if name == "int8":
        return GpuLeftInt8(compute=compute) if spec.family == "adapter" else GpuRotatedInt8(compute=compute)
    if name == "fp8":
        return GpuFloat8(compute=compute, levels=2 if spec.family == "adapter" else 1)
    return GpuFloat("BF16" if name == "bf16" else "F32", compute=compute)


def dequantised(quantised: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    """An eight-bit tensor times its scale, as the operator that TensorRT looks for."""
    return torch.onnx.ops.symbolic("DequantizeLinear", [quantised, scale], dtype=dtype, shape=quantised.shape)


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


class GpuLinear(Linear):
    """A linear that multiplies in ``compute``; float32 or ``compute`` in, ``compute`` out."""

    def __init__(self, name: str, compute: Compute) -> None:
        super().__init__(name)
        self.compute = compute

    def finished(self, y: Tensor, weights: Weights) -> Tensor:
        """Add the bias in float32, leave in ``compute``."""
        bias = self.bias(weights)
        return (y if bias is None else y + bias).to(self.compute)


@dataclass(frozen=True)
class GpuFloat8(Float8):
    """FP8 times FP8. ``levels`` 2: the activations get twice the bits, for a few rows that only wait for weights."""

    compute: Compute = torch.bfloat16
    levels: int = 1

    def linear(self, name: str, in_features: int, *, normed: bool) -> Linear:  # noqa: ARG002
        return GpuFloat8Linear(name, self.compute, self.levels)


class GpuFloat8Linear(GpuLinear):
    """``(x / s) W^T * s * scale`` with one s per row."""

    def __init__(self, name: str, compute: Compute, levels: int) -> None:
        super().__init__(name, compute)
        self.levels = levels

    def forward(self, x: Tensor, weights: Weights) -> Tensor:
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
        return self.finished(y * size * self.scale(weights), weights)


@dataclass(frozen=True)
class GpuRotatedInt8(RotatedInt8):
    """int8 weights in panels, 16-bit activations rotated like the weights."""

    compute: Compute = torch.bfloat16

    def linear(self, name: str, in_features: int, *, normed: bool) -> Linear:  # noqa: ARG002
        return GpuRotatedInt8Linear(name, self.compute, in_features)


class GpuRotatedInt8Linear(GpuLinear):
    """A batched product over the panels ``[out / p, in, p]``."""

    rotation: Tensor

    def __init__(self, name: str, compute: Compute, in_features: int) -> None:
        super().__init__(name, compute)
        self.register_buffer("rotation", rotation(in_features))

    def forward(self, x: Tensor, weights: Weights) -> Tensor:
        one = torch.ones((), dtype=self.compute)
        rotated = rotate(x.to(self.compute), self.rotation.to(self.compute))
        panels, _, width = self.weight(weights).shape
        matrix = dequantised(self.weight(weights), one, self.compute)
        y = (rotated.unsqueeze(0) @ matrix).to(torch.float32) * self.scale(weights)
        return self.finished(y.transpose(0, 1).reshape(-1, panels * width), weights)


@dataclass(frozen=True)
class GpuLeftInt8(LeftInt8):
    """uint8 weights around 128, for one to eight rows."""

    compute: Compute = torch.bfloat16

    def linear(self, name: str, in_features: int, *, normed: bool) -> Linear:  # noqa: ARG002
        return GpuLeftInt8Linear(name, self.compute)


class GpuLeftInt8Linear(GpuLinear):
    """TensorRT only casts unsigned bytes, so the matrix becomes 16 bits: at most 29 MB at full size."""

    def forward(self, x: Tensor, weights: Weights) -> Tensor:
        matrix = self.weight(weights).to(self.compute) - 128  # at most 8 bits: exact in bfloat16
        y = (x.to(self.compute) @ matrix.t()).to(torch.float32) * self.scale(weights)
        return self.finished(y, weights)


@dataclass(frozen=True)
class GpuFloat(Float):
    """The checkpoint's values."""

    compute: Compute = torch.bfloat16

    def linear(self, name: str, in_features: int, *, normed: bool) -> Linear:  # noqa: ARG002
        return GpuFloatLinear(name, self.compute)


class GpuFloatLinear(GpuLinear):
    """A product in ``compute``."""

    def forward(self, x: Tensor, weights: Weights) -> Tensor:
        matrix = self.weight(weights).to(self.compute)
        return self.finished((x.to(self.compute) @ matrix.t()).to(torch.float32), weights)
