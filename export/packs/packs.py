"""Packs: a checkpoint's tensors prepared for the graphs and written as a stream, never whole in memory.

The layout is planned from the spec alone. Then each weight is read in pieces of whole rows, converted and appended. A
thread of its own hashes and writes, so that the disk and the quantiser work at the same time.
"""

from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from ...engines.directory.hashing import FileFacts
from ...engines.directory.manifest import Chunk, Model
from ...engines.directory.manifest import Step as StepFacts
from ...engines.directory.tensorfile import PAD_PREFIX, TENSOR_ALIGN, Layout, LayoutWriter, plan_layout
from ...machine.files import explained_os_errors
from ...specs import Spec
from ..checkpoints.errors import CheckpointNotFinite
from ..checkpoints.reader import stream_tensors
from ..checkpoints.recognise import Checkpoint
from ..checkpoints.weights import Matrix, Plain, Step, Weight, graph_weights, plan_steps
from ..graphs.graphs import stored_tensors
from ..precisions.base import Precision, Rows
from ..precisions.choosing import precision_for
from .equalise import Gains, plan_gains
from .stack import Stack

QUEUE_PIECES = 64
"""Prepared pieces, of half a MiB to 2 MiB each, that may wait for the disk."""


@dataclass(frozen=True)
class PackPlan:
    """A pack before it is written."""

    layout: Layout
    chunks: tuple[Chunk, ...]
    steps: tuple[Step, ...]

    @property
    def weight_bytes(self) -> int:
        """Bytes that :func:`write_pack` tells of: without the header and the fillers."""
        return sum(info.nbytes for name, info in self.layout.tensors.items() if not name.startswith(PAD_PREFIX))


def plan_pack(spec: Spec, precision: Precision, blocks_per_chunk: int) -> PackPlan:
    """Lay out a model's pack: steps in order of running, blocks grouped in chunks, each chunk on a page of its own."""
    weights = graph_weights(spec)
    groups = plan_steps(spec)
    chunked = _grouped(groups, blocks_per_chunk)
    entries = []
    page_starts = set()
    for chunk in chunked:
        for step in chunk:
            stored = stored_tensors(weights[step.graph], precision)
            if step is chunk[0]:
                page_starts.add(f"{step.name}.{stored[0][0]}")
            entries += [(f"{step.name}.{name}", dtype, shape) for name, dtype, shape in stored]
    layout = plan_layout(entries, {"format": "pt"}, align=TENSOR_ALIGN, page_starts=frozenset(page_starts))
    chunks = []
    for chunk in chunked:
        infos = [info for step in chunk for name, info in layout.tensors.items() if name.startswith(f"{step.name}.")]
        end = max(info.offset + info.nbytes for info in infos)
        start = min(info.offset for info in infos)
        chunks.append(Chunk(start, end - start, tuple(StepFacts(step.name, step.graph) for step in chunk)))
    return PackPlan(layout, tuple(chunks), tuple(step for group in groups for step in group))


def planned_model(spec: Spec, precision: str) -> Model:
    """The model as a build's manifest would have it, without checkpoint or pack."""
    plan = plan_pack(spec, precision_for(precision, spec), 1)
    return Model(spec, "", plan.chunks, plan.layout.tensors, {})


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
        plan: from :func:`plan_pack` with the same precision.
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

    def __enter__(self) -> "BackgroundWriter":
        return self

    def __exit__(self, kind: object, error: object, trace: object) -> None:
        try:
            while kind is None and self._pending:
                self._pending.popleft().result()
        finally:
            self._pool.shutdown(cancel_futures=True)


def _grouped(groups: Sequence[Sequence[Step]], blocks_per_chunk: int) -> list[list[Step]]:
    """Join neighbouring groups of blocks; embed and head stay chunks of their own."""
    chunks: list[list[Step]] = []
    size = 0
    for group in groups:
        alone = group[0].graph.endswith((".embed", ".head"))
        if alone or size in {0, blocks_per_chunk}:
            chunks.append(list(group))
            size = 0 if alone else 1
        else:
            chunks[-1] += group
            size += 1
    return chunks
