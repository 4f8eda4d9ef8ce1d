"""fp32 and bf16: the checkpoint's values, for the CPU, TensorRT and CUDA."""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from ..checkpoints.torch_dtypes import TORCH_DTYPES
from .base import FloatLinear, Kept, Linear, Rows, row_starts
from .linears import Compute, CudaLinear, GpuLinear
from .storing import StoredFloat


@dataclass(frozen=True)
class Float(StoredFloat, Kept):
    """float32 or bfloat16 as it came, ``[out, in]``. onnxruntime's CPU has no bfloat16 product: the graph casts."""

    equalised: bool = False
    images_meet: bool = True

    def prepare(
        self,
        rows: Rows,
        out_features: int,
        in_features: int,
        group: int | None = None,  # noqa: ARG002
    ) -> Iterator[tuple[str, Tensor]]:
        for start in (starts := row_starts(out_features, in_features)):
            yield "weight", rows(start, min(starts.step, out_features - start)).to(TORCH_DTYPES[self.dtype])

    def linear(self, name: str, in_features: int) -> Linear:  # noqa: ARG002
        return FloatLinear(name)


@dataclass(frozen=True)
class GpuFloat(Float):
    """The checkpoint's values."""

    compute: Compute = torch.bfloat16

    def linear(self, name: str, in_features: int) -> Linear:  # noqa: ARG002
        return GpuLinear(name, self.compute)


@dataclass(frozen=True)
class CudaFloat(Float):
    """The checkpoint's values."""

    compute: Compute = torch.bfloat16

    def linear(self, name: str, in_features: int) -> Linear:  # noqa: ARG002
        return CudaLinear(name, self.compute)
