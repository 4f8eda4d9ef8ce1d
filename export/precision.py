"""Precisions: how a matrix is stored in a pack, made from checkpoint rows, and multiplied in a graph.

The three belong together: what ``prepare`` does to the weights, ``linear`` must undo or account for in the graph.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Protocol, TypeAlias

import torch
from torch import Tensor

Stored: TypeAlias = tuple[str, str, tuple[int, ...]]
"""``(suffix, safetensors dtype, shape)``."""
Rows: TypeAlias = Callable[[int, int], Tensor]
"""``(first row, count) -> float32 [count, in_features]`` of the original matrix."""
TORCH_DTYPES: Mapping[str, torch.dtype] = {
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "I8": torch.int8,
    "U8": torch.uint8,
}
PIECE_VALUES = 1 << 20
"""Values handled at a time: 4 MiB of float32, so that the passes of a quantiser stay in the cache."""


class Precision(Protocol):
    """One way to keep matrices."""

    name: str

    def stored(self, out_features: int, in_features: int) -> list[Stored]:
        """The pack's tensors for a matrix, in file order."""
        ...

    def prepare(self, rows: Rows, out_features: int, in_features: int) -> Iterator[tuple[str, Tensor]]:
        """``(suffix, piece)``: the bytes of those tensors, front to back."""
        ...

    def linear(self, x: Tensor, weights: Mapping[str, Tensor], name: str) -> Tensor:
        """``x [rows, in_features] @ matrix.T + bias`` as graph operators."""
        ...


def row_pieces(rows: Rows, out_features: int, in_features: int) -> Iterator[tuple[int, Tensor]]:
    """The matrix in pieces of whole rows: ``(first row, piece)``."""
    step = max(1, PIECE_VALUES // in_features)
    for start in range(0, out_features, step):
        yield start, rows(start, min(step, out_features - start))


def add_bias(y: Tensor, weights: Mapping[str, Tensor], name: str) -> Tensor:
    bias = weights.get(f"{name}.bias")
    return y if bias is None else y + bias


def product(x: Tensor, matrix: Tensor, weights: Mapping[str, Tensor], name: str) -> Tensor:
    """``x @ matrix.T + bias`` with a float32 ``[out, in]`` matrix: one Gemm with transB."""
    bias = weights.get(f"{name}.bias")
    return x @ matrix.t() if bias is None else torch.addmm(bias, x, matrix.t())


@dataclass(frozen=True)
class Float:
    """float32 or bfloat16 as it came, ``[out, in]``. onnxruntime's CPU has no bfloat16 product: the graph casts."""

    name: str
    dtype: str

    def stored(self, out_features: int, in_features: int) -> list[Stored]:
        return [("weight", self.dtype, (out_features, in_features))]

    def prepare(self, rows: Rows, out_features: int, in_features: int) -> Iterator[tuple[str, Tensor]]:
        for _, piece in row_pieces(rows, out_features, in_features):
            yield "weight", piece.to(TORCH_DTYPES[self.dtype])

    def linear(self, x: Tensor, weights: Mapping[str, Tensor], name: str) -> Tensor:
        return product(x, weights[f"{name}.weight"].to(torch.float32), weights, name)


@dataclass(frozen=True)
class Float8:
    """FP8 e4m3 ``[out, in]`` with one float32 scale per output channel: ``w = q * scale``, ``scale = max|row| / 448``."""

    name: str = "fp8"

    def stored(self, out_features: int, in_features: int) -> list[Stored]:
        return [("weight", "F8_E4M3", (out_features, in_features)), ("scale", "F32", (out_features,))]

    def prepare(self, rows: Rows, out_features: int, in_features: int) -> Iterator[tuple[str, Tensor]]:
        scales = torch.empty(out_features)
        for start, piece in row_pieces(rows, out_features, in_features):
            scale = row_scales(piece, 448.0)
            scales[start : start + len(piece)] = scale
            yield "weight", (piece / scale[:, None]).to(torch.float8_e4m3fn)
        yield "scale", scales

    def linear(self, x: Tensor, weights: Mapping[str, Tensor], name: str) -> Tensor:
        matrix = weights[f"{name}.weight"]
        inputs = [matrix, weights[f"{name}.scale"]]
        dequantised = torch.onnx.ops.symbolic(
            "DequantizeLinear", inputs, {"axis": 0}, dtype=torch.float32, shape=matrix.shape
        )
        return product(x, dequantised, weights, name)


def row_scales(piece: Tensor, largest: float) -> Tensor:
    """The scale that brings each row's largest value to ``largest``; 1 for a row of zeros."""
    peak = piece.abs().amax(dim=1)
    return torch.where(peak > 0, peak / largest, torch.ones_like(peak))


PRECISIONS: Mapping[str, Precision] = {
    precision.name: precision for precision in (Float("fp32", "F32"), Float("bf16", "BF16"), Float8())
}
