"""The cuda backend: weights stream to a CUDA card, onnxruntime's CUDA provider computes. Never run on a GPU yet.

What differs from TensorRT is where activations lie. Each session has an arena of its own that it keeps, so the plan
counts a graph's activations as its context: all graphs' add up, where TensorRT's graphs share the largest.
"""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

from ..engines.cuda_graphs import checked_graphs
from ..engines.manifest import Manifest, Model
from ..errors import OutOfDeviceMemory
from ..specs import Family
from .device_backend import DeviceBackend
from .predict import graph_memory
from .residency import CONTEXT_BYTES, GraphMemory

MARGIN_BYTES = 2 << 30
"""What ``auto`` leaves free for other programs and the desktop."""


def open_cuda(engines: Path, manifest: Manifest, images: int, budget_bytes: int | None) -> DeviceBackend:
    """Open an engines directory on the first card.

    Args:
        engines: the engines directory, built with ``--backend cuda``.
        manifest: its manifest.
        images: the most that share a pass.
        budget_bytes: VRAM for all of it; None takes what is free, less :data:`MARGIN_BYTES`.

    Raises:
        CudaGraphsUnusable: there are no graphs for it, or others.
        BackendUnavailable, DeviceFailed: the driver or the card.
        ProviderMissing: this onnxruntime has no CUDA.
        BudgetTooSmall, OutOfDeviceMemory: they need more.
    """
    from ..engines.cuda_device import CudaDevice  # noqa: PLC0415 - the leaf that needs CUDA
    from ..engines.ort_device import CudaTarget, OrtDeviceEngine  # noqa: PLC0415

    # read now, so that an open pipeline outlives a rebuild
    models = {graph: path.read_bytes() for graph, path in checked_graphs(engines, manifest).items()}
    memory = arena_memory(manifest.models, images)
    device = CudaDevice()
    target = CudaTarget(device.compute_stream, device.index)

    def make(graph: str) -> OrtDeviceEngine:
        return OrtDeviceEngine(graph, models[graph], target, memory[graph].context_bytes - CONTEXT_BYTES)

    if budget_bytes is None:
        budget_bytes = device.free_bytes() - MARGIN_BYTES
        if budget_bytes <= 0:
            raise OutOfDeviceMemory(device.name, MARGIN_BYTES, device.free_bytes())
    return DeviceBackend("cuda", device, make, engines, manifest, memory, budget_bytes)


def arena_memory(models: Mapping[Family, Model], images: int) -> dict[str, GraphMemory]:
    """The memory of every graph where each session keeps its arena: matrices in 16 bits, activations, outputs."""
    memories = graph_memory(models, images)
    return {
        graph: replace(
            memory,
            activation_bytes=0,
            value_bytes=0,
            context_bytes=memory.context_bytes + memory.activation_bytes + memory.value_bytes,
        )
        for graph, memory in memories.items()
    }
