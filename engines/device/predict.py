"""What a pass will cost on a card that is not here: pure arithmetic over the manifest and a residency plan.

The model is small and says all it assumes. A chunk's copy takes its bytes over the link. Its computing takes the
longer of its operations over the card's rate and its bytes over the card's own memory. Copies follow each other,
computations follow each other, a computation waits for its copy, and a copy waits until its slot was used. A model
begins when the one before has ended. Not in it: launches, the images, the file, copies that slow the kernels down.
"""

import math
from collections import deque
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace

from ...specs import EncoderSpec, Family
from ..directory.manifest import Model, inputs_of
from ..directory.tensorfile import TensorInfo
from .residency import GraphMemory, Residency, estimated_memory

VRAM_GBPS = 300.0
"""Assumed bandwidth of the card's own memory, 10^9 bytes per second: the slower cards of a generation."""
LARGEST_BATCH = 8
"""Images that share a pass: the largest batch of the plans."""


@dataclass(frozen=True)
class Card:
    """What the prediction needs to know of a machine."""

    pcie_gbps: float
    """Measured bandwidth from pinned memory, 10^9 bytes per second: about 12, 25 and 50 for PCIe 3, 4 and 5 x16."""
    tflops: float
    """Rate that the products reach, 10^12 operations per second."""
    vram_gbps: float = VRAM_GBPS


@dataclass(frozen=True)
class Prediction:
    """The cost of some images in one call, resident chunks loaded."""

    images: int
    passes: int
    seconds: float
    copy_seconds: float
    """Sum over all copies, whether hidden or not."""
    compute_seconds: float
    load_seconds: float
    """Once, before: copying the resident chunks."""
    streamed_bytes: int
    """Per pass."""
    peak_bytes: int

    @property
    def seconds_per_image(self) -> float:
        return self.seconds / self.images


def predict(models: Mapping[Family, Model], residency: Residency, card: Card, images: int) -> Prediction:
    """Predict the time of ``images`` in one call; ``residency`` must be planned for ``min(images, 8)`` of them."""
    passes = math.ceil(images / LARGEST_BATCH)
    seconds = copies = computes = 0.0
    for batch in (min(LARGEST_BATCH, images - start) for start in range(0, images, LARGEST_BATCH)):
        for family, model in models.items():
            work = list(model_work(model, residency.resident[family], card, batch))
            seconds += overlapped(work, residency.slots)
            copies += sum(copy for copy, _ in work)
            computes += sum(compute for _, compute in work)
    return Prediction(
        images=images,
        passes=passes,
        seconds=seconds,
        copy_seconds=copies,
        compute_seconds=computes,
        load_seconds=residency.resident_bytes / (card.pcie_gbps * 1e9),
        streamed_bytes=residency.streamed_bytes,
        peak_bytes=residency.peak_bytes,
    )


def graph_memory(models: Mapping[Family, Model], images: int) -> dict[str, GraphMemory]:
    """The estimated memory of every graph, with the 16-bit copies that TensorRT makes of int8 matrices."""
    memories: dict[str, GraphMemory] = {}
    for model in models.values():
        memories |= estimated_memory(model.spec, images)
        for step in {step.graph: step for chunk in model.chunks for step in chunk.steps}.values():
            integers = (
                math.prod(info.shape)
                for name, info in inputs_of(step, model).items()
                if is_matrix(name, info) and info.dtype == "I8"
            )
            memory = memories[step.graph]
            memories[step.graph] = replace(memory, activation_bytes=memory.activation_bytes + 2 * sum(integers))
    return memories


def model_work(model: Model, resident: Iterable[int], card: Card, images: int) -> Iterable[tuple[float, float]]:
    """``(seconds of copying, seconds of computing)`` of every chunk; a resident chunk copies nothing."""
    stays = set(resident)
    values = matrix_values(model)
    for index, chunk in enumerate(model.chunks):
        copy = 0.0 if index in stays else chunk.nbytes / (card.pcie_gbps * 1e9)
        operations = sum(step_operations(model, step.graph, values[step.name], images) for step in chunk.steps)
        yield copy, max(operations / (card.tflops * 1e12), chunk.nbytes / (card.vram_gbps * 1e9))


def overlapped(work: Iterable[tuple[float, float]], slots: int) -> float:
    """Seconds of a pass of ``(copy, compute)`` chunks through so many slots."""
    copied = computed = 0.0
    freed = deque([0.0] * slots)  # when each slot was used up, the longest free first
    for copy, compute in work:
        ready = 0.0
        if copy:
            copied = ready = max(copied, freed.popleft()) + copy
        computed = max(computed, ready) + compute
        if copy:
            freed.append(computed)
    return computed


def step_operations(model: Model, graph: str, values: int, images: int) -> float:
    """Multiplications and additions of a step: two per matrix value and row, and those of the attention."""
    if not isinstance(model.spec, EncoderSpec):
        return 2.0 * values * images
    tokens = model.spec.tokens * images
    attention = 4.0 * tokens * model.spec.tokens * model.spec.hidden if graph.endswith(".block") else 0.0
    return 2.0 * values * tokens + attention


def matrix_values(model: Model) -> dict[str, int]:
    """``step -> values`` in its matrices."""
    return {
        step.name: sum(math.prod(info.shape) for name, info in inputs_of(step, model).items() if is_matrix(name, info))
        for chunk in model.chunks
        for step in chunk.steps
    }


def is_matrix(name: str, info: TensorInfo) -> bool:
    """Whether a weight is the matrix of a product: norms and biases are vectors, scales have another name."""
    return name.endswith(".weight") and len(info.shape) > 1
