"""The cuda backend: weights stream to a CUDA card, onnxruntime's CUDA provider computes.

As with TensorRT, all graphs share one workspace, and what they need of it is seen on the card before anything is
planned.
"""

from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING

from ..base import Arithmetic, BackendStatus, CardFacts, Limits, Offer, Opened
from ..device import driver
from ..device.backend import DeviceBackend
from ..device.device import Workspace, close_engines, finish_at_last
from ..device.residency import RESERVED_BYTES, GraphMemory
from ..device.which_card import card_facts, chosen_card
from ..directory.architectures import BFLOAT16_FROM
from ..directory.manifest import Manifest
from ..errors import BackendUnavailable
from .arena import Arena
from .graph_files import checked_graphs
from .libraries import missing_libraries

if TYPE_CHECKING:
    from ..device.card import CudaDevice
    from .session import OrtDeviceEngine


LIBRARIES = 'pip install "onnxruntime-gpu[cuda]" nvidia-cublas'
"""Its own extra leaves out cuBLAS."""


def find_cuda() -> BackendStatus:
    """It wants a driver, onnxruntime's build for CUDA, and cuda-python."""
    import onnxruntime  # noqa: PLC0415 - as below

    if status := driver.without_driver("cuda"):
        return status
    if "CUDAExecutionProvider" not in onnxruntime.get_available_providers():
        remedy = 'pip uninstall onnxruntime, then pip install "i2l-engines[cuda]"'
        return BackendStatus("cuda", works=False, reason="onnxruntime is the build for the CPU", remedy=remedy)
    if lacking := missing_libraries():
        reason = f"CUDA's libraries are missing for onnxruntime-gpu {onnxruntime.__version__} ({', '.join(lacking)})"
        return BackendStatus("cuda", works=False, reason=reason, remedy=LIBRARIES)
    if status := driver.without_cuda_python("cuda"):
        return status
    version = onnxruntime.__version__
    return driver.on_cards("cuda", f"onnxruntime {version}", {"onnxruntime-gpu": version})


def card_on_cuda(device: str | None) -> CardFacts | None:
    """The card that a name or number stands for."""
    import onnxruntime  # noqa: PLC0415 - as above

    return card_facts("cuda", {"onnxruntime-gpu": onnxruntime.__version__}, device)


def open_cuda(engines: Path, manifest: Manifest, limits: Limits) -> Opened:
    """Open an engines directory on a card: the one that was asked for, or the one with the most free memory.

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
    from .warming import measured_memory, session_bytes, too_small  # noqa: PLC0415

    # read now, so that an open pipeline outlives a rebuild
    models = {graph: path.read_bytes() for graph, path in checked_graphs(engines, manifest).items()}
    with ExitStack() as undo:
        device = CudaDevice(index=chosen_card("cuda", limits.device))
        undo.callback(device.close)
        if device.sm < BFLOAT16_FROM:
            reason = f"its graphs multiply in bfloat16, which {device.name} (sm{device.sm}) cannot"
            raise BackendUnavailable("cuda", reason, "use --backend cpu")
        budget = limits.vram.on(device, RESERVED_BYTES)
        if budget < RESERVED_BYTES:
            raise too_small(manifest.models, limits.images, budget, session_bytes(device.sm) * len(models))
        used = device.used_bytes
        arena = Arena(device, Workspace())
        undo.callback(arena.close)
        opened: dict[str, OrtDeviceEngine] = {}
        undo.callback(close_engines, opened)  # no session outlives the card and its streams
        target = CudaTarget(arena, device.compute_stream, device.index)
        for graph, model in models.items():
            opened[graph] = OrtDeviceEngine(graph, model, target, arena.workspace)
        memory = measured_memory(device, arena, opened, manifest.models, limits.images, budget, used)
        backend = CudaBackend(engines, manifest, device, arena, opened, memory, budget)
        undo.pop_all()
        return Opened(backend, manifest, manifest)


class CudaBackend(DeviceBackend):
    """Sessions in one arena on a card."""

    def __init__(
        self,
        engines: Path,
        manifest: Manifest,
        device: "CudaDevice",
        arena: Arena,
        opened: "dict[str, OrtDeviceEngine]",
        memory: Mapping[str, GraphMemory],
        budget_bytes: int,
    ) -> None:
        self._opened = opened
        self._arena = arena
        super().__init__("cuda", device, opened.__getitem__, engines, manifest, memory, budget_bytes, arena.workspace)

    def close(self) -> None:
        finish_at_last(self.device)
        self._engines.clear()
        close_engines(self._opened)
        self._arena.close()
        super().close()


ARITHMETIC: Mapping[str, Arithmetic] = dict.fromkeys(("fp8", "int8", "bf16", "fp32"), "bfloat16")
OFFER = Offer(find_cuda, open_cuda, card=card_on_cuda, arithmetic=ARITHMETIC)
