"""Precisions: how a matrix is stored in a pack, made from checkpoint rows, and multiplied in a graph.

The three belong together: what ``prepare`` does to the weights, ``linear`` must account for in the graph.

int8 needs no calibration (docs/adr/0001): per-output-channel weights, activations quantised as they come, channel sizes
evened out beforehand (export/packs/equalise.py), outlier channels spread by a rotation (rotation.py). Each row of
activations, a token, has a scale of its own: a massive token costs the others nothing, and what a picture gives does
not depend on the pictures beside it. Both operands have as many levels as every CPU adds exactly (engines/cpu/sums.py).

A product's output lies in panels, and what only looks at single values may stay there: so a :class:`Linear` can hand
out heads or parts of it as the precision has them, and take such a part back in, without the transposes between.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Protocol, TypeAlias

import torch
from torch import Tensor, nn

from ...engines.cpu.sums import LARGEST_PAIR, WEIGHT_LEVELS
from .parallel import in_threads
from .storing import Storing

Weights: TypeAlias = Mapping[str, Tensor]
Rows: TypeAlias = Callable[[int, int], Tensor]
"""``(first row, count) -> float32 [count, in_features]`` of the original matrix."""
PIECE_VALUES = 1 << 19
"""Values handled at a time: 2 MiB of float32 stay in the cache through the passes of a quantiser. Pieces eight times as
large were 3 times slower."""
SMALLEST = 1e-30
"""Keeps the scale of a row of zeros from being zero."""


class Precision(Storing, Protocol):
    """One way to keep matrices; how packs are laid out, says the protocol that it extends."""

    @property
    def equalised(self) -> bool:
        """Whether channel sizes are evened out first (see export/packs/equalise.py)."""
        ...

    @property
    def images_meet(self) -> bool:
        """Whether a picture's values may depend on the others of its batch, if only by the order of additions."""
        ...

    def prepare(
        self, rows: Rows, out_features: int, in_features: int, group: int | None = None
    ) -> Iterator[tuple[str, Tensor]]:
        """``(suffix, piece)``: the bytes of those tensors, front to back."""
        ...

    def linear(self, name: str, in_features: int) -> "Linear":
        """The product with that matrix as a module."""
        ...

    def linears(self, names: Sequence[str], in_features: int) -> "Linears":
        """Products with matrices of equal ``in_features`` as one module."""
        ...

    def patch(self) -> "Linear":
        """The product of the patches, whose matrix every pack keeps in float32."""
        ...


class Linear(nn.Module):
    """``(x [rows, in], weights) -> [rows, out]``: ``x @ matrix.T``, plus ``<name>.bias`` if there is one."""

    def __init__(self, name: str) -> None:
        super().__init__()
        self.name = name

    def weight(self, weights: Weights) -> Tensor:
        return weights[f"{self.name}.weight"]

    def scale(self, weights: Weights) -> Tensor:
        return weights[f"{self.name}.scale"]

    def bias(self, weights: Weights) -> Tensor | None:
        return weights.get(f"{self.name}.bias")

    def heads(self, x: Tensor, weights: Weights, parts: int, heads: int, tokens: int) -> tuple[Tensor, ...]:
        """The output cut into ``parts``, such as q, k and v, each ``[B, heads, tokens, D / heads]``."""
        y = self(x, weights)
        return y.view(-1, tokens, parts, heads, y.shape[1] // (parts * heads)).permute(2, 0, 3, 1, 4).unbind(0)

    def spread(self, x: Tensor, weights: Weights, parts: int) -> tuple[Tensor, ...]:
        """The output cut into ``parts``, laid out as :meth:`gathered` of the same precision takes it."""
        return self(x, weights).chunk(parts, dim=1)

    def gathered(self, x: Tensor, weights: Weights) -> Tensor:
        """The product with what :meth:`spread` gave, ``[rows, out]``."""
        return self(x, weights)

    def __call__(self, x: Tensor, weights: Weights) -> Tensor:
        return super().__call__(x, weights)  # type: ignore[no-any-return]  # torch leaves calls untyped


class Linears(nn.Module):
    """``(x [rows, linears, in], weights, shapes) -> [rows, *shapes[i]]`` of each: linear i sees ``x[:, i]``."""

    def __init__(self, linears: Sequence[Linear]) -> None:
        super().__init__()
        self.linears = nn.ModuleList(linears)

    def forward(self, x: Tensor, weights: Weights, shapes: Sequence[tuple[int, ...]]) -> list[Tensor]:
        each = zip(self.linears, x.unbind(1), shapes, strict=True)
        return [linear(part, weights).view(-1, *shape) for linear, part, shape in each]


class Kept:
    """What most precisions share: patches in float32, each product by itself."""

    def linear(self, name: str, in_features: int) -> Linear:
        raise NotImplementedError

    def linears(self, names: Sequence[str], in_features: int) -> Linears:
        return Linears([self.linear(name, in_features) for name in names])

    def patch(self) -> Linear:
        return FloatLinear("patch")


def row_starts(out_features: int, in_features: int) -> range:
    """The first row of every piece, and as the range's step the rows in a piece."""
    return range(0, out_features, max(1, PIECE_VALUES // in_features))


def pieces(
    rows: Rows, starts: range, convert: Callable[[Tensor], tuple[Tensor, Tensor]]
) -> Iterator[tuple[str, Tensor]]:
    """Every piece of a matrix through ``convert``, which gives ``(weights, scales)``; the scales follow the weights."""
    scales = []
    for weight, scale in in_threads(lambda start: convert(rows(start, min(starts.step, starts.stop - start))), starts):
        scales.append(scale)
        yield "weight", weight
    yield "scale", torch.cat(scales)


def row_scales(piece: Tensor, largest: float) -> Tensor:
    """The scale ``[rows]`` that brings each row's largest value to ``largest``."""
    peak = torch.maximum(piece.amax(dim=1), -piece.amin(dim=1))  # twice as fast as over abs()
    return (peak / largest).clamp_min(SMALLEST)


def product(x: Tensor, matrix: Tensor, bias: Tensor | None) -> Tensor:
    """``x @ matrix.T + bias`` with a float32 ``[out, in]`` matrix: one Gemm with transB."""
    return x @ matrix.t() if bias is None else torch.addmm(bias, x, matrix.t())


class FloatLinear(Linear):
    """A float32 product."""

    def forward(self, x: Tensor, weights: Weights) -> Tensor:
        return product(x, self.weight(weights).to(x.dtype), self.bias(weights))


def row_scales_for_exact_sums(piece: Tensor) -> Tensor:
    """The scale ``[rows]`` of an int8 matrix whose products every CPU adds exactly (engines/cpu/sums.py)."""
    scale = row_scales(piece, WEIGHT_LEVELS)
    pairs = piece[:, : piece.shape[1] // 2 * 2].view(len(piece), -1, 2).sum(dim=2)
    return torch.maximum(scale, row_scales(pairs, LARGEST_PAIR)) if pairs.numel() else scale
