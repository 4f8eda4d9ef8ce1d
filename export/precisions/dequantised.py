"""The CPU's packs in float32 arithmetic of standard operators: what plugin providers run, on any card.

int8 matrices are dequantised in front of a float32 product; activations stay float32. So there is one rounding less
than on the CPU, and every node has a kernel in onnxruntime's WebGPU provider: Cast from int8 has none there, but
DequantizeLinear has, also with a scale for each column of a panel (as one block along the input channels). The same
graphs run on onnxruntime's CPU, slowly. A matrix that is larger than a card's buffers comes in pieces
(engines/directory/pieces.py).
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import reduce

import torch
from torch import Tensor

from ...engines.directory.pieces import LARGEST_BYTES, cut_shapes, piece_names
from .balanced_int8 import BalancedInt8, BalancedLinear
from .base import FloatLinear, Linear, Linears, Weights, product
from .floats import Float
from .linears import dequantised
from .rotated_int8 import RotatedInt8, RotatedInt8Linear
from .storing import Stored
from .torch_rotation import rotate


def cut_stored(stored: Sequence[Stored], largest_bytes: int) -> list[Stored]:
    """What a pack stores of a matrix, the matrix in pieces whose float32 form is within ``largest_bytes``."""
    cut: list[Stored] = []
    for suffix, dtype, shape in stored:
        shapes = cut_shapes(shape, 4, largest_bytes) if suffix == "weight" else [shape]
        names = piece_names(suffix, len(shapes))
        cut += [(name, dtype, piece) for name, piece in zip(names, shapes, strict=True)]
    return cut


def pieces_of(name: str, weights: Weights) -> list[Tensor]:
    """The matrix ``name``: one tensor, or its pieces in order."""
    whole = f"{name}.weight"
    return [weights[whole]] if whole in weights else [weights[key] for key in weights if key.startswith(f"{whole}.")]


def parted(x: Tensor, pieces: Sequence[Tensor]) -> list[Tensor]:
    """``x`` cut along its first dimension as the pieces are; a Split into one would be a copy."""
    return [x] if len(pieces) == 1 else list(torch.split(x, [len(piece) for piece in pieces]))


@dataclass(frozen=True)
class PiecedFloat(Float):
    """float32 matrices, the large ones in pieces of their rows."""

    dtype: str = "F32"
    largest_bytes: int = LARGEST_BYTES

    def stored(self, out_features: int, in_features: int, group: int | None = None) -> list[Stored]:
        return cut_stored(super().stored(out_features, in_features, group), self.largest_bytes)

    def linear(self, name: str, in_features: int) -> Linear:  # noqa: ARG002
        return PiecedFloatLinear(name)


class PiecedFloatLinear(FloatLinear):
    """A product for each piece, side by side."""

    def forward(self, x: Tensor, weights: Weights) -> Tensor:
        pieces = pieces_of(self.name, weights)
        if len(pieces) == 1:
            return product(x, pieces[0], self.bias(weights))
        y = torch.cat([product(x, piece, None) for piece in pieces], dim=1)
        bias = self.bias(weights)
        return y if bias is None else y + bias


@dataclass(frozen=True)
class DequantisedRotatedInt8(RotatedInt8):
    """The encoders' int8 panels, large matrices in pieces of whole panels."""

    largest_bytes: int = LARGEST_BYTES

    def stored(self, out_features: int, in_features: int, group: int | None = None) -> list[Stored]:
        return cut_stored(super().stored(out_features, in_features, group), self.largest_bytes)

    def linear(self, name: str, in_features: int) -> Linear:
        return DequantisedPanels(name, in_features)


class DequantisedPanels(RotatedInt8Linear):
    """Rotate, then a float32 product with each dequantised panel ``[in, p]``. P panels, R rows."""

    def panels(self, x: Tensor, weights: Weights) -> Tensor:
        return self.multiply(rotate(x, self.rotation), weights)

    def gathered(self, x: Tensor, weights: Weights) -> Tensor:
        rotated = rotate(x, self.rotation).transpose(0, 1).reshape(-1, x.shape[0] * x.shape[2])
        return self.joined(self.multiply(rotated, weights), weights)

    def multiply(self, levels: Tensor, weights: Weights) -> Tensor:
        """``[P, R, p]`` of rotated float32 activations ``[R, in]``."""
        pieces = pieces_of(self.name, weights)
        scales = parted(self.scale(weights), pieces)
        products = [
            levels.unsqueeze(0) @ dequantised_columns(piece, scale) for piece, scale in zip(pieces, scales, strict=True)
        ]
        return products[0] if len(products) == 1 else torch.cat(products)


def dequantised_columns(panels: Tensor, scale: Tensor) -> Tensor:
    """int8 ``[P, in, p]`` times its scales ``[P, 1, p]``, float32: one block along the input channels."""
    y: Tensor = torch.onnx.ops.symbolic(
        "DequantizeLinear",
        [panels, scale],
        {"axis": 1, "block_size": panels.shape[1]},
        dtype=torch.float32,
        shape=panels.shape,
    )
    return y


@dataclass(frozen=True)
class DequantisedBalancedInt8(BalancedInt8):
    """The adapter's int8 panels, large matrices in pieces."""

    largest_bytes: int = LARGEST_BYTES

    def stored(self, out_features: int, in_features: int, group: int | None = None) -> list[Stored]:
        return cut_stored(super().stored(out_features, in_features, group), self.largest_bytes)

    def linear(self, name: str, in_features: int) -> Linear:
        return DequantisedBalanced(name, in_features)

    def linears(self, names: Sequence[str], in_features: int) -> Linears:
        return Linears([self.linear(name, in_features) for name in names])


class DequantisedBalanced(BalancedLinear):
    """A float32 product with each dequantised panel; a single one may come in pieces of its input channels."""

    def forward(self, x: Tensor, weights: Weights) -> Tensor:
        pieces = pieces_of(self.name, weights)
        panels = self.scale(weights).shape[0]
        rotated = rotate(x, self.rotation)
        if self.scale(weights).shape[:2] == (1, 1):
            widths = [piece.shape[3] for piece in pieces]
            parts = [rotated] if len(pieces) == 1 else list(torch.split(rotated, widths, dim=1))
            products = [part @ self.dequantised(piece)[0, 0, 0] for part, piece in zip(parts, pieces, strict=True)]
            return self.joined(reduce(torch.add, products)[None, None, :, None], weights)
        if panels == 1:
            products = [rotated @ self.dequantised(piece).squeeze(2) for piece in pieces]
        else:
            parts = parted(rotated.view(-1, panels, 1, rotated.shape[1] // panels).permute(1, 2, 0, 3), pieces)
            products = [part @ self.dequantised(piece).squeeze(2) for part, piece in zip(parts, pieces, strict=True)]
        y = products[0] if len(products) == 1 else torch.cat(products, dim=int(panels == 1))
        return self.joined(y.unsqueeze(3), weights)

    def dequantised(self, piece: Tensor) -> Tensor:
        """int8 as float32, without the scale."""
        return dequantised(piece, torch.ones(()), torch.float32)
