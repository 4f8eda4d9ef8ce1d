"""A weight as it lies in the checkpoint: the rows of one or more tensors below each other, read when asked for."""

from dataclasses import dataclass

import torch
from torch import Tensor

from .checkpoints import CheckpointReader
from .parallel import in_threads
from .precision import TORCH_DTYPES
from .weights import Matrix, Source, Step, Weight

SLICE_ROWS = 1024
"""Rows that one thread samples: whoever touches a mapped page first waits for it."""
RUN = 32
"""Values side by side: one cache line of bfloat16."""


@dataclass(frozen=True)
class Stack:
    """The parts of a weight, each ``[rows, columns]`` in the checkpoint's dtype, over mapped memory."""

    parts: tuple[Tensor, ...]

    @classmethod
    def read(cls, reader: CheckpointReader, step: Step, weight: Weight) -> "Stack":
        """The values of ``weight`` in ``step``; nothing is copied."""
        columns = weight.in_features if isinstance(weight, Matrix) else weight.shape[1] if len(weight.shape) > 1 else 1
        return cls(tuple(_part(reader, source.at(step.block)).view(-1, columns) for source in weight.sources))

    def rows(self, start: int, count: int) -> Tensor:
        """Rows ``[start, start + count)`` as float32."""
        pieces = []
        for part in self.parts:
            first, last = max(start, 0), min(start + count, len(part))
            if first < last:
                pieces.append(part[first:last].float())
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


def _part(reader: CheckpointReader, source: Source) -> Tensor:
    info = reader.checkpoint.tensors[source.key]
    rows = info.shape[0] - source.start if source.rows is None else source.rows
    width = info.nbytes // info.shape[0]
    data = reader.read(source.key, source.start * width, rows * width)
    return torch.frombuffer(data, dtype=TORCH_DTYPES[info.dtype])
