"""What a pack will be, from the spec and the precision alone: no checkpoint, no torch."""

from collections.abc import Sequence
from dataclasses import dataclass

from ...engines.directory.manifest import Chunk, Model
from ...engines.directory.manifest import Step as StepFacts
from ...engines.directory.tensorfile import PAD_PREFIX, TENSOR_ALIGN, Layout, plan_layout
from ...specs import Spec
from ..checkpoints.weights import Step, graph_weights, plan_steps
from ..precisions.storing import Storing, stored_tensors, storing_for


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


def plan_pack(spec: Spec, precision: Storing, blocks_per_chunk: int) -> PackPlan:
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
    plan = plan_pack(spec, storing_for(precision, spec), 1)
    return Model(spec, "", plan.chunks, plan.layout.tensors, {})


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
