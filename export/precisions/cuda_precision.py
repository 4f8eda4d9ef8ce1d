"""The linears of the graphs that onnxruntime's CUDA provider gets, over the CPU's packs. None has run on a GPU yet.

Each form uses only operators that the provider has, by onnxruntime's list of kernels (docs/OperatorKernels.md there):
a node that it lacks would run on the CPU, its inputs copied to and fro. What the list rules out: DynamicQuantizeMatMul;
MatMulInteger with unsigned weights; QuantizeLinear and DequantizeLinear in bfloat16. What it has: Cast from FP8 and
from bytes to bfloat16, which is exact (int8 has 7 bits and a sign, e4m3 4, bfloat16 8), Gemm, MatMul and Attention in
bfloat16. So weights are cast, multiplied in bfloat16 and scaled in float32. One matrix at a time exists in 16 bits.

float16 would need no cast of the scale, but DINOv3's activations do not fit it. ``compute`` float32 is the form that
the tests run on the CPU provider.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeAlias

import torch
from torch import Tensor

from ...specs import Spec
from .gpu_precision import GpuLinear, GpuRotatedInt8Linear
from .precision import Float, Float8, LeftInt8, Linear, Linears, Precision, RotatedInt8, Weights

Compute: TypeAlias = torch.dtype


def cuda_precision(name: str, spec: Spec, compute: Compute = torch.bfloat16) -> Precision:
    """The precision ``name`` with the same packs as :func:`.precision.precision_for`."""
    if name == "int8":
        return CudaLeftInt8(compute=compute) if spec.family == "adapter" else CudaRotatedInt8(compute=compute)
    if name == "fp8":
        return CudaFloat8(compute=compute)
    return CudaFloat("BF16" if name == "bf16" else "F32", compute=compute)


def gemm(x: Tensor, matrix: Tensor) -> Tensor:
    """``x @ matrix.T`` as one Gemm with transB: a Transpose of its own would copy the matrix."""
    return torch.onnx.ops.symbolic(
        "Gemm", [x, matrix], {"transB": 1}, dtype=x.dtype, shape=(x.shape[0], matrix.shape[0])
    )


class CudaLinear(GpuLinear):
    """``x W^T`` with W cast from what the pack holds."""

    def product(self, x: Tensor, weights: Weights) -> Tensor:
        return gemm(x.to(self.compute), self.matrix(weights)).to(torch.float32)


class CudaScaledLinear(CudaLinear):
    """The same times the scales of the output channels."""

    def product(self, x: Tensor, weights: Weights) -> Tensor:
        return super().product(x, weights) * self.scale(weights)


@dataclass(frozen=True)
class CudaFloat8(Float8):
    """FP8 weights, 16-bit activations: no FP8 product, half the bytes over the link."""

    compute: Compute = torch.bfloat16

    def linear(self, name: str, in_features: int) -> Linear:  # noqa: ARG002
        return CudaScaledLinear(name, self.compute)


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


@dataclass(frozen=True)
class CudaRotatedInt8(RotatedInt8):
    """int8 weights in panels, activations rotated like them."""

    compute: Compute = torch.bfloat16

    def linear(self, name: str, in_features: int) -> Linear:
        return CudaRotatedInt8Linear(name, self.compute, in_features)


class CudaRotatedInt8Linear(GpuRotatedInt8Linear):
    """The weights cast instead of dequantised."""

    def matrix(self, weights: Weights) -> Tensor:
        return self.weight(weights).to(self.compute)


@dataclass(frozen=True)
class CudaFloat(Float):
    """The checkpoint's values."""

    compute: Compute = torch.bfloat16

    def linear(self, name: str, in_features: int) -> Linear:  # noqa: ARG002
        return CudaLinear(name, self.compute)
