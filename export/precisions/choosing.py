"""Which precision a name stands for, in the graphs of each backend."""

import torch

from ...engines.directory.pieces import LARGEST_BYTES
from ...specs import Spec
from .balanced_int8 import BalancedInt8, CudaBalancedInt8, GpuBalancedInt8
from .base import Precision
from .dequantised import DequantisedBalancedInt8, DequantisedRotatedInt8, PiecedFloat
from .float8 import CudaFloat8, Float8, GpuFloat8
from .floats import CudaFloat, Float, GpuFloat
from .linears import Compute
from .rotated_int8 import CudaRotatedInt8, GpuRotatedInt8, RotatedInt8

PRECISIONS = ("fp8", "int8", "bf16", "fp32")


def precision_for(name: str, spec: Spec) -> Precision:
    """The precision ``name`` of :data:`PRECISIONS` for a model: int8 differs for products of few rows."""
    if name == "int8":
        return BalancedInt8() if spec.family == "adapter" else RotatedInt8()
    kept: dict[str, Precision] = {"fp8": Float8(), "bf16": Float("BF16"), "fp32": Float("F32")}
    return kept[name]


def gpu_precision(name: str, spec: Spec, compute: Compute = torch.bfloat16) -> Precision:
    """The precision ``name`` with the same packs as :func:`precision_for`, for a GPU's graphs."""
    if name == "int8":
        return GpuBalancedInt8(compute=compute) if spec.family == "adapter" else GpuRotatedInt8(compute=compute)
    if name == "fp8":
        return GpuFloat8(compute=compute, levels=2 if spec.family == "adapter" else 1)
    return GpuFloat("BF16" if name == "bf16" else "F32", compute=compute)


def cuda_precision(name: str, spec: Spec, compute: Compute = torch.bfloat16) -> Precision:
    """The precision ``name`` with the same packs as :func:`precision_for`."""
    if name == "int8":
        return CudaBalancedInt8(compute=compute) if spec.family == "adapter" else CudaRotatedInt8(compute=compute)
    if name == "fp8":
        return CudaFloat8(compute=compute)
    return CudaFloat("BF16" if name == "bf16" else "F32", compute=compute)


def plugin_precision(name: str, spec: Spec, largest_bytes: int = LARGEST_BYTES) -> Precision | None:
    """The precision ``name`` in float32 arithmetic of standard operators; None for packs that it has no graphs for."""
    if name == "int8":
        balanced, rotated = (
            DequantisedBalancedInt8(largest_bytes=largest_bytes),
            DequantisedRotatedInt8(largest_bytes=largest_bytes),
        )
        return balanced if spec.family == "adapter" else rotated
    return PiecedFloat(largest_bytes=largest_bytes) if name == "fp32" else None
