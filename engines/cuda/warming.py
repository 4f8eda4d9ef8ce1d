"""What the cuda backend needs of a card beside its weights: every graph runs there before anything is planned.

onnxruntime does not tell beforehand what a graph computes in, and which kernels it takes depends on the card. So each
runs, with every number of images, on whatever bytes the memory holds: first in what an estimate says, so that nobody
else on the card is pushed out; in all that the budget leaves only where that is too little. CUDA loads the kernels'
code at that time, too. What was seen is what is planned (arena.py says why it stays so).
"""

import logging
import math
from collections.abc import Mapping
from dataclasses import replace

from ...specs import Family
from ..base import Value
from ..device.device import Device, aligned, finish_at_last
from ..device.predict import graph_memory, is_matrix
from ..device.residency import RESERVED_BYTES, GraphMemory, plan_residency
from ..directory.manifest import Model, Step, inputs_of
from ..directory.tensorfile import TENSOR_ALIGN
from ..errors import BudgetTooSmall, OutOfDeviceMemory
from .arena import Arena
from .session import OrtDeviceEngine

log = logging.getLogger(__name__)
CUBLAS_BYTES = 8320 << 10
"""Of a session before it is opened: cuBLAS' workspace, by its documentation."""
HOPPERS_CUBLAS_BYTES = 32 << 20
"""The same from sm90 on."""
HOPPER = 90
CODE_BYTES = 2 << 20
"""Assumed of a session's kernels."""
SESSIONS = "sessions"
"""Under this name stands what all graphs keep together."""


def measured_memory(
    device: Device,
    arena: Arena,
    engines: Mapping[str, OrtDeviceEngine],
    models: Mapping[Family, Model],
    images: int,
    budget_bytes: int,
    used_before_bytes: int,
) -> dict[str, GraphMemory]:
    """The memory of every graph, of 1 to ``images`` images; nothing of it is allocated any more.

    Args:
        device: the card.
        arena: of the engines, opened.
        engines: of every graph.
        models: of the manifest.
        images: the most that share a pass.
        budget_bytes: for everything.
        used_before_bytes: what was in use on the device before the sessions were opened.

    Raises:
        BudgetTooSmall: they do not run within it.
        OutOfDeviceMemory: the card has less free than the budget and they do not run in that.
    """
    steps = {step.graph: (step, m) for m in models.values() for chunk in m.chunks for step in chunk.steps}
    values = max(engine.value_bytes(images) for engine in engines.values())
    weights = max(step_bytes(step, model) for step, model in steps.values())
    estimate = max(memory.activation_bytes for memory in estimated_memory(models, images).values())
    kept, workspace = 0, arena.workspace

    def run_all(scratch_bytes: int) -> dict[str, GraphMemory]:
        address = device.allocate(scratch_bytes + values + weights)
        workspace.address, workspace.scratch_bytes, workspace.values_bytes = address, scratch_bytes, values
        try:
            return _seen(device, arena, engines, steps, images, address + scratch_bytes + values)
        finally:
            finish_at_last(device)
            device.free(address)
            workspace.address = workspace.scratch_bytes = workspace.values_bytes = 0

    for limit in (estimate, None):
        kept = max(device.used_bytes - used_before_bytes, kept)  # libraries keep what they took at the first run
        left, free = budget_bytes - RESERVED_BYTES - kept, device.free_bytes()
        most = min(left, free) // TENSOR_ALIGN * TENSOR_ALIGN - values - weights
        small = too_small(models, images, budget_bytes, kept)
        others = OutOfDeviceMemory(device.name, small.needed_bytes - RESERVED_BYTES, free)
        refusal = others if free < left else small
        if most < 0:
            raise refusal
        try:
            memory = run_all(most if limit is None else min(limit, most))
            break
        except OutOfDeviceMemory as error:
            if limit is None:
                raise refusal from error
            log.debug("%s: warming up in an estimated %d bytes of scratch was not enough", device.name, limit)
    kept = max(device.used_bytes - used_before_bytes, kept)
    return memory | {SESSIONS: GraphMemory(0, 0, kept)}


def _seen(
    device: Device,
    arena: Arena,
    engines: Mapping[str, OrtDeviceEngine],
    steps: Mapping[str, tuple[Step, Model]],
    images: int,
    weights_address: int,
) -> dict[str, GraphMemory]:
    """What every graph took of the scratch, with every number of images."""
    memory = {}
    for graph, engine in engines.items():
        placed = placed_weights(device, weights_address, *steps[graph])
        arena.most_bytes = 0
        for count in range(images, 0, -1):
            engine.run(engine.activation_at(arena.workspace.values_address, count), placed)
        memory[graph] = GraphMemory(arena.most_bytes, engine.value_bytes(images), 0)
    return memory


def session_bytes(sm: int) -> int:
    """What a session is assumed to keep on a card of this compute capability, before it is opened there."""
    return CODE_BYTES + (HOPPERS_CUBLAS_BYTES if sm >= HOPPER else CUBLAS_BYTES)


def too_small(models: Mapping[Family, Model], images: int, budget_bytes: int, kept_bytes: int) -> BudgetTooSmall:
    """The error, with what is estimated to be enough; ``kept_bytes``: what the sessions keep."""
    chunks = {family: model.chunks for family, model in models.items()}
    memory = estimated_memory(models, images)
    memory = {graph: replace(facts, context_bytes=0) for graph, facts in memory.items()}
    least = plan_residency(chunks, memory | {SESSIONS: GraphMemory(0, 0, kept_bytes)}, 1 << 62).least_bytes
    return BudgetTooSmall(budget_bytes, max(least, budget_bytes + 1))


def estimated_memory(models: Mapping[Family, Model], images: int) -> dict[str, GraphMemory]:
    """What every graph will need, where it cannot be seen: all matrices that are not in 16 bits have a copy that is."""
    memories = graph_memory(models, images)
    steps = {step.graph: (step, m) for m in models.values() for chunk in m.chunks for step in chunk.steps}
    for graph, (step, model) in steps.items():
        copied = (
            math.prod(info.shape)
            for name, info in inputs_of(step, model).items()
            if is_matrix(name, info) and info.dtype.startswith("F8")  # graph_memory counts those of integers
        )
        memories[graph] = replace(memories[graph], activation_bytes=memories[graph].activation_bytes + 2 * sum(copied))
    return memories


def step_bytes(step: Step, model: Model) -> int:
    """Bytes of a step's weights as they lie in the pack."""
    infos = inputs_of(step, model).values()
    return aligned(max(info.offset + info.nbytes for info in infos) - min(info.offset for info in infos))


def placed_weights(device: Device, address: int, step: Step, model: Model) -> dict[str, Value]:
    """A step's weights at an address."""
    infos = inputs_of(step, model)
    start = min(info.offset for info in infos.values())
    return {name: device.value(address + info.offset - start, info) for name, info in infos.items()}
