"""The cuda backend: weights stream to a CUDA card, onnxruntime's CUDA provider computes.

What differs from TensorRT is where activations lie. Each session has an arena of its own that it keeps, so the plan
counts a graph's activations as its context: all graphs' add up, where TensorRT's graphs share the largest.
"""

from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path

from ...specs import AdapterSpec, Family, Spec
from ..base import Arithmetic, BackendStatus, Limits, Offer, Opened
from ..device import driver
from ..device.backend import DeviceBackend
from ..device.predict import graph_memory
from ..device.residency import CONTEXT_BYTES, GraphMemory
from ..directory.architectures import BFLOAT16_FROM
from ..directory.manifest import Manifest, Model
from ..errors import BackendUnavailable
from .graph_files import checked_graphs


def find_cuda() -> BackendStatus:
    """It wants a driver, onnxruntime's build for CUDA, and cuda-python."""
    import onnxruntime  # noqa: PLC0415 - as below

    if status := driver.without_driver("cuda"):
        return status
    if "CUDAExecutionProvider" not in onnxruntime.get_available_providers():
        remedy = 'pip uninstall onnxruntime, then pip install "i2l-engines[cuda]"'
        return BackendStatus("cuda", works=False, reason="onnxruntime is the build for the CPU", remedy=remedy)
    if status := driver.without_cuda_python("cuda"):
        return status
    version = onnxruntime.__version__
    return driver.on_cards("cuda", f"onnxruntime {version}", {"onnxruntime-gpu": version})


def open_cuda(engines: Path, manifest: Manifest, limits: Limits) -> Opened:
    """Open an engines directory on the first card.

    Args:
        engines: the engines directory, built with ``--backend cuda``.
        manifest: its manifest.
        limits: images and VRAM.

    Raises:
        CudaGraphsUnusable: there are no graphs for it, or others.
        BackendUnavailable, DeviceFailed: the driver or the card, such as one without bfloat16 products.
        ProviderMissing: this onnxruntime has no CUDA.
        BudgetTooSmall, OutOfDeviceMemory: they need more.
    """
    from ..device.card import CudaDevice  # noqa: PLC0415 - the leaf that needs CUDA
    from .session import CudaTarget, OrtDeviceEngine  # noqa: PLC0415

    # read now, so that an open pipeline outlives a rebuild
    models = {graph: path.read_bytes() for graph, path in checked_graphs(engines, manifest).items()}
    memory = arena_memory(manifest.models, limits.images)
    with ExitStack() as undo:
        device = CudaDevice()
        undo.callback(device.close)
        if device.sm < BFLOAT16_FROM:
            reason = f"its graphs multiply in bfloat16, which {device.name} (sm{device.sm}) cannot"
            raise BackendUnavailable("cuda", reason, "use --backend cpu")
        target = CudaTarget(device.compute_stream, device.index)

        def make(graph: str) -> OrtDeviceEngine:
            return OrtDeviceEngine(graph, models[graph], target, memory[graph].context_bytes - CONTEXT_BYTES)

        budget = limits.vram.on(device)
        backend = DeviceBackend("cuda", device, make, engines, manifest, memory, budget)
        undo.pop_all()
        return Opened(backend, manifest, manifest)


def arena_memory(models: Mapping[Family, Model], images: int) -> dict[str, GraphMemory]:
    """The memory of every graph where each session keeps its arena: matrices in 16 bits, activations, outputs.

    What the host uploads lies outside, in memory that all share.
    """
    memories = graph_memory(models, images)
    inputs = max(input_bytes(model.spec, images) for model in models.values())
    return {
        graph: replace(
            memory,
            activation_bytes=0,
            value_bytes=inputs,
            context_bytes=memory.context_bytes + memory.activation_bytes + memory.value_bytes,
        )
        for graph, memory in memories.items()
    }


def input_bytes(spec: Spec, images: int) -> int:
    """Bytes of what the host uploads for a model, in float32."""
    return 4 * images * (spec.embedding if isinstance(spec, AdapterSpec) else 3 * spec.image_size**2)


ARITHMETIC: Mapping[str, Arithmetic] = dict.fromkeys(("fp8", "int8", "bf16", "fp32"), "bfloat16")
OFFER = Offer(find_cuda, open_cuda, arithmetic=ARITHMETIC)
