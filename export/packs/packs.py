"""Packs: a checkpoint's tensors prepared for the graphs and written as a stream, never whole in memory.

The layout is planned (:mod:`.planning`). Then each weight is read in pieces of whole rows, converted and appended. A
thread of its own hashes and writes, so that the disk and the quantiser work at the same time.
"""

from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Self

import torch
from torch import Tensor

from ...engines.directory.hashing import FileFacts
from ...engines.directory.tensorfile import LayoutWriter
from ...machine.files import explained_os_errors
from ..checkpoints.errors import CheckpointNotFinite
from ..checkpoints.reader import stream_tensors
from ..checkpoints.recognise import Checkpoint
from ..checkpoints.weights import Matrix, Plain, Step, Weight, graph_weights
from ..precisions.base import Precision, Rows
from .equalise import Gains, plan_gains
from .planning import PackPlan
from .stack import Stack

QUEUE_PIECES = 64
"""Prepared pieces, of half a MiB to 2 MiB each, that may wait for the disk."""


def write_pack(
    path: Path,
    plan: PackPlan,
    checkpoint: Checkpoint,
    precision: Precision,
    advance: Callable[[int], None],
) -> FileFacts:
    """Write the pack and return the facts of the file.

    Args:
        path: the new file.
        plan: from :func:`.planning.plan_pack` with the same precision.
        checkpoint: what it is made from.
        precision: how matrices are stored.
        advance: told the bytes handed to the disk.

    Raises:
        CheckpointNotFinite: a weight is no number. It is seen in what is stored: one such weight makes the scale of its
            row none either, and scales are few.
    """
    weights = graph_weights(checkpoint.spec)
    with (
        explained_os_errors(path),
        LayoutWriter(path, plan.layout) as writer,
        BackgroundWriter(writer, advance) as out,
    ):
        groups = [source_keys(step, weights[step.graph]) for step in plan.steps]
        for step, tensors in zip(plan.steps, stream_tensors(checkpoint, groups), strict=True):
            for name, piece in prepared_weights(tensors, step, weights[step.graph], precision):
                if piece.is_floating_point() and not is_finite(piece):
                    wrong = {key: int((~values.float().isfinite()).sum()) for key, values in tensors.items()}
                    raise CheckpointNotFinite(
                        checkpoint.path, step.name, {key: count for key, count in wrong.items() if count}
                    )
                out.put(f"{step.name}.{name}", piece)
    return writer.facts


def prepared_weights(
    tensors: Mapping[str, Tensor], step: Step, weights: Sequence[Weight], precision: Precision
) -> Iterator[tuple[str, Tensor]]:
    """The bytes of a step's weights as the pack stores them, in file order: ``(graph input, piece)``.

    Args:
        tensors: the checkpoint's tensors of this step; they may change once the last piece is out.
        step: which block.
        weights: what its graph takes.
        precision: how matrices are stored.
    """
    values = {weight.name: Stack.of(tensors, step, weight) for weight in weights}
    plain = {w.name: values[w.name].rows(0, w.shape[0]).flatten() for w in weights if isinstance(w, Plain)}
    gains = plan_gains(step.graph, values, plain) if precision.equalised else Gains()
    for weight in weights:
        if isinstance(weight, Matrix):
            rows = scaled(values.pop(weight.name).rows, gains.rows.get(weight.name), gains.columns.get(weight.name))
            for suffix, piece in precision.prepare(rows, weight.out_features, weight.in_features, weight.group):
                yield f"{weight.name}.{suffix}", piece
        else:
            gain = gains.rows.get(weight.name.rsplit(".", 1)[0])  # of its norm, or of the matrix whose bias it is
            yield weight.name, plain[weight.name] if gain is None else plain[weight.name] * gain


def is_finite(piece: Tensor) -> bool:
    """Are all values numbers? FP8 values are, as their scales are."""
    return piece.dtype.itemsize == 1 or bool(piece.isfinite().all())


def source_keys(step: Step, weights: Sequence[Weight]) -> list[str]:
    """The checkpoint tensors of a step."""
    return [source.at(step.block).key for weight in weights for source in weight.sources]


def scaled(rows: Rows, row_gain: Tensor | None, column_gain: Tensor | None) -> Rows:
    """The rows of a matrix with gains applied."""

    def read(start: int, count: int) -> Tensor:
        piece = rows(start, count)
        if column_gain is not None:
            piece = piece * column_gain
        return piece if row_gain is None else piece * row_gain[start : start + count, None]

    return read


class BackgroundWriter:
    """Hands pieces to a :class:`LayoutWriter` in a thread of its own; an error there is raised at a later ``put``."""

    def __init__(self, writer: LayoutWriter, advance: Callable[[int], None]) -> None:
        self._writer = writer
        self._advance = advance
        self._pool = ThreadPoolExecutor(1, "i2l-pack-writer")
        self._pending: deque[Future[None]] = deque()

    def put(self, name: str, piece: Tensor) -> None:
        while len(self._pending) >= QUEUE_PIECES:
            self._pending.popleft().result()
        self._pending.append(self._pool.submit(self._write, name, piece))

    def _write(self, name: str, piece: Tensor) -> None:
        data = piece.contiguous().view(torch.uint8).numpy().reshape(-1)
        self._writer.write(name, data.data)
        self._advance(data.nbytes)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: object, error: object, trace: object) -> None:
        try:
            while kind is None and self._pending:
                self._pending.popleft().result()
        finally:
            self._pool.shutdown(cancel_futures=True)
