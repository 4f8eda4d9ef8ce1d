"""A weight as it lies in the checkpoint: the rows of one or more tensors below each other, read when asked for."""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from ..checkpoints.weights import Matrix, Source, Step, Weight
from ..precisions.parallel import in_threads

SLICE_ROWS = 1024
"""Rows that one thread samples: whoever touches a mapped page first waits for it."""
RUN = 32
"""Values side by side: one cache line of bfloat16."""


@dataclass(frozen=True)
class Stack:
    """The parts of a weight, each ``[rows, columns]`` in the checkpoint's dtype and where it was read."""

    parts: tuple[Tensor, ...]

    @classmethod
    def of(cls, tensors: Mapping[str, Tensor], step: Step, weight: Weight) -> "Stack":
        """The values of ``weight`` in ``step``; nothing is copied."""
        columns = weight.in_features if isinstance(weight, Matrix) else weight.shape[1] if len(weight.shape) > 1 else 1
        return cls(tuple(_part(tensors, source.at(step.block)).view(-1, columns) for source in weight.sources))

    def rows(self, start: int, count: int) -> Tensor:
        """Rows ``[start, start + count)`` as float32: a copy, as what was read will be overwritten."""
        pieces = []
        for part in self.parts:
            first, last = max(start, 0), min(start + count, len(part))
            if first < last:
                pieces.append(part[first:last].to(torch.float32, copy=True))
            start -= len(part)
        return pieces[0] if len(pieces) == 1 else torch.cat(pieces)

    def sampled_rows(self, step: int) -> Tensor:
        """Every ``step``-th row, counted from the first, as float32."""
        starts = [0]
        for part in self.parts:
            starts.append(starts[-1] + len(part))
        return torch.cat([part[-start % step :: step].float() for start, part in zip(starts, self.parts, strict=False)])

    def sampled_columns(self, step: int) -> Tensor:
        """The columns that :func:`every` takes, of all rows, as float32."""
        slices = [piece for part in self.parts for piece in torch.split(part, SLICE_ROWS)]
        return torch.cat(list(in_threads(lambda piece: every(piece, step).float(), slices)))

    @property
    def shape(self) -> tuple[int, int]:
        """``(rows, columns)``."""
        return sum(len(part) for part in self.parts), self.parts[0].shape[1]


def every(values: Tensor, step: int) -> Tensor:
    """One of ``step`` values of the last dimension, in runs: single values would cost a cache line each."""
    if values.shape[-1] % RUN:
        return values[..., ::step]
    runs = values.view(*values.shape[:-1], -1, RUN)[..., ::step, :]
    return runs.reshape(*values.shape[:-1], -1)


def _part(tensors: Mapping[str, Tensor], source: Source) -> Tensor:
    tensor = tensors[source.key]
    rows = len(tensor) - source.start if source.rows is None else source.rows
    return tensor[source.start : source.start + rows]
