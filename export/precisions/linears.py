"""What the products on a card have in common, whatever the precision.

**TensorRT.**
The linears of the graphs that TensorRT gets. The packs are those of the CPU; only the arithmetic differs.

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

**onnxruntime's CUDA.**
The linears of the graphs that onnxruntime's CUDA provider gets, over the CPU's packs. None has run on a GPU yet.

Each form uses only operators that the provider has, by onnxruntime's list of kernels (docs/OperatorKernels.md there):
a node that it lacks would run on the CPU, its inputs copied to and fro. What the list rules out: DynamicQuantizeMatMul;
MatMulInteger with unsigned weights; QuantizeLinear and DequantizeLinear in bfloat16. What it has: Cast from FP8 and
from bytes to bfloat16, which is exact (int8 has 7 bits and a sign, e4m3 4, bfloat16 8), Gemm, MatMul and Attention in
bfloat16. So weights are cast, multiplied in bfloat16 and scaled in float32. One matrix at a time exists in 16 bits.

float16 would need no cast of the scale, but DINOv3's activations do not fit it. ``compute`` float32 is the form that
the tests run on the CPU provider.
"""

from typing import TypeAlias

import torch
from torch import Tensor

from .base import SMALLEST, Linear, Weights

ROW_NORM = 4.0
"""Of every row that is multiplied in float16."""
ATTENDED = frozenset({"attention.qkv", "attention.q", "attention.kv"})
"""The linears whose output the attention multiplies."""
Compute: TypeAlias = torch.dtype


def dequantised(quantised: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    """An eight-bit tensor times its scale, as the operator that TensorRT looks for."""
    return torch.onnx.ops.symbolic("DequantizeLinear", [quantised, scale], dtype=dtype, shape=quantised.shape)


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


def gemm(x: Tensor, matrix: Tensor) -> Tensor:
    """``x @ matrix.T`` as one Gemm with transB: a Transpose of its own would copy the matrix."""
    return torch.onnx.ops.symbolic(
        "Gemm", [x, matrix], {"transB": 1}, dtype=x.dtype, shape=(x.shape[0], matrix.shape[0])
    )


def panels_by_rows(panels: Tensor, rows: Tensor) -> Tensor:
    """``[P, out, R]`` of panels ``[P, in, out]`` that share the rows ``[R, in]``: one product in a strided batch.

    With the rows on the left, ``[1, R, in] @ [P, in, out]``, onnxruntime knows no stride for what all panels share. It
    makes arrays of pointers on the host instead and copies three to the card for each product, which no CUDA graph can
    repeat.
    """
    shape = (panels.shape[0], panels.shape[2], rows.shape[0])
    y: Tensor = torch.onnx.ops.symbolic(
        "com.microsoft::FusedMatMul",
        [panels, rows],
        {"transA": 1, "transB": 1},
        dtype=panels.dtype,
        shape=shape,
        version=1,
    )
    return y


class CudaLinear(GpuLinear):
    """``x W^T`` with W cast from what the pack holds.

    Of two operands onnxruntime computes first the one whose node comes later in the graph. The matrix must not: all
    matrices of a block would be cast before its first product, and lie there in 16 bits at once.
    """

    def product(self, x: Tensor, weights: Weights) -> Tensor:
        matrix = self.matrix(weights)
        return gemm(x.to(self.compute), matrix).to(torch.float32)


class CudaScaledLinear(CudaLinear):
    """The same times the scales of the output channels."""

    def product(self, x: Tensor, weights: Weights) -> Tensor:
        return super().product(x, weights) * self.scale(weights)
