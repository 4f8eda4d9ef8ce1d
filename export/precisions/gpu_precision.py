"""The linears of the graphs that TensorRT gets. The packs are those of the CPU; only the arithmetic differs.

Weights are graph inputs, so nothing can be folded while a plan is built, and what decides is which form the planner
turns into a product of eight-bit operands without a hidden 16-bit copy of the matrix (docs/adr/0005):

- fp8: both operands pass through quantise and dequantise with the scale one, and the true scales, one per token and one
  per output channel, are multiplied to the product. With the true scales in the dequantise node the planner kept
  copies. One token's scale follows its own largest value, so no calibration is needed.
- int8: activations stay in 16 bits; the weights are dequantised in front of the product.

``compute`` is bfloat16, float16 (sm75 has no bfloat16), or float32 for onnxruntime's CPU in the tests. Norms, residual
stream, scales and biases are float32.

float16 ends at 65504, and massive activations do not respect that: behind LayerScale DINOv3's residual stream reaches
thousands, before it and inside the gated MLP more. So in float16 only operands of products have 16 bits, and a product
cannot overflow: each row is brought to the norm 4 first, and as a row of int8 weights has at most the norm 127 *
sqrt(in), no sum exceeds 4 * 127 * sqrt(8192) = 45 979 (Cauchy and Schwarz; the rotation keeps norms). What leaves a
linear is float32, but for q, k and v: sm75 has no float32 product for the attention, and they come from normed rows.
The patches are multiplied in float16 there for the same reason.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeAlias

import torch
from torch import Tensor

from ...specs import Spec
from .precision import SMALLEST, Float, Float8, LeftInt8, Linear, Linears, Precision, RotatedInt8, Weights
from .torch_rotation import rotate, rotation

FLOAT8_LARGEST = 448.0
FLOAT8_E4M3 = 17
"""Its number in ``onnx.TensorProto``."""
LOW_LEVEL = 16.0
"""The second level of an activation counts steps this much finer: e4m3 keeps 4 significant bits."""
ROW_NORM = 4.0
"""Of every row that is multiplied in float16."""
ATTENDED = frozenset({"attention.qkv", "attention.q", "attention.kv"})
"""The linears whose output the attention multiplies."""
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
    """A linear that multiplies in ``compute``: its form is :meth:`product`."""

    def __init__(self, name: str, compute: Compute) -> None:
        super().__init__(name)
        self.compute = compute
        self.leaves = torch.float32 if compute is torch.float16 and name not in ATTENDED else compute

    def forward(self, x: Tensor, weights: Weights) -> Tensor:
        if self.compute is torch.float16:
            x = x.to(torch.float32)
            size: Tensor = torch.linalg.vector_norm(x, dim=1, keepdim=True).clamp_min(SMALLEST) / ROW_NORM
            y = self.product(x / size, weights) * size
        else:
            y = self.product(x, weights)
        if (bias := self.bias(weights)) is not None:
            y = y + bias
        return y.to(self.leaves)

    def product(self, x: Tensor, weights: Weights) -> Tensor:
        """``x W^T`` in float32, of ``x`` in float32 or ``compute``."""
        return torch.matmul(x.to(self.compute), self.matrix(weights).t()).to(torch.float32)

    def matrix(self, weights: Weights) -> Tensor:
        """What the pack holds, in ``compute``."""
        return self.weight(weights).to(self.compute)


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
class GpuFloat(Float):
    """The checkpoint's values."""

    compute: Compute = torch.bfloat16

    def linear(self, name: str, in_features: int) -> Linear:  # noqa: ARG002
        return GpuLinear(name, self.compute)
