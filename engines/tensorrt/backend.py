"""The tensorrt backend: weights stream to a CUDA card, TensorRT's plans compute. Never run on a GPU yet.

Plans are opened before anything is planned, as only the card's own TensorRT knows how much scratch their kernels take
there; the builder's number is for another machine. All graphs share one workspace, which is counted once, at its
largest.
"""

import logging
from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path

from ..base import Array, Value
from ..device.backend import DeviceBackend, VramBudget
from ..device.device import Workspace
from ..device.residency import CONTEXT_BYTES, GraphMemory
from ..directory.manifest import Manifest, graphs_of
from .engine import PlanRuntime, TensorRTEngine
from .library import Flavour, find_flavour
from .plans import checked_plan, plans_folder, wanted_key
from .runtime_cache import RuntimeCache

log = logging.getLogger(__name__)


def open_tensorrt(engines: Path, manifest: Manifest, images: int, vram: VramBudget) -> "TensorRTBackend":
    """Open an engines directory on the first card.

    Args:
        engines: the engines directory, built with ``--backend tensorrt`` for the card's generation.
        manifest: its manifest.
        images: the most that share a pass.
        vram: for all of it.

    Raises:
        PackageMissing: no TensorRT is installed.
        BackendUnavailable: there is no driver or no card.
        PlanMissing, PlanStale: there is no plan for this TensorRT and this card; the error says what differs.
        DeviceFailed: TensorRT refuses a plan; with its own words.
        BudgetTooSmall, OutOfDeviceMemory: they need more.
    """
    from ..device.card import CudaDevice  # noqa: PLC0415 - the leaf that needs CUDA

    flavour = find_flavour()
    with ExitStack() as undo:
        card = CudaDevice(backend="tensorrt")
        undo.callback(card.close)
        plans = checked_plans(engines, manifest, flavour, card.sm)
        budget = vram.on(card)  # before contexts take of what is free
        workspace = Workspace()
        cache = RuntimeCache(plans_folder(engines, card.sm, manifest.precision), flavour, card.name)
        runtime = PlanRuntime(flavour, card, workspace, images, cache)
        log.info("tensorrt: opening %d plans on %s", len(plans), runtime.where)
        opened, memory = open_plans(runtime, plans)
        backend = TensorRTBackend(engines, manifest, runtime, opened, memory, budget)
        undo.pop_all()
        return backend


class TensorRTBackend(DeviceBackend):
    """Plans on a card; keeps what TensorRT-RTX compiles as soon as it was used."""

    def __init__(
        self,
        engines: Path,
        manifest: Manifest,
        runtime: PlanRuntime,
        opened: dict[str, TensorRTEngine],
        memory: Mapping[str, GraphMemory],
        budget_bytes: int,
    ) -> None:
        self.opened = opened
        self._runtime = runtime
        make, workspace = opened.__getitem__, runtime.workspace
        super().__init__("tensorrt", runtime.card, make, engines, manifest, memory, budget_bytes, workspace)

    def array(self, value: Value) -> Array:
        array = super().array(value)
        self._runtime.cache.save()
        return array

    def close(self) -> None:
        self.device.finish()
        self._runtime.cache.save()  # what an interrupted pass compiled
        self.opened.clear()
        super().close()


def checked_plans(engines: Path, manifest: Manifest, flavour: Flavour, sm: int) -> dict[str, bytes]:
    """``graph -> plan`` of every graph of a build, each exactly what is wanted."""
    plans = {}
    for model in manifest.models.values():
        for graph in sorted(graphs_of(model)):
            key = wanted_key(engines, graph, model.spec, manifest.precision, flavour.name, flavour.version, sm)
            plans[graph] = checked_plan(engines, graph, key)
    return plans


def open_plans(
    runtime: PlanRuntime, plans: Mapping[str, bytes]
) -> tuple[dict[str, TensorRTEngine], dict[str, GraphMemory]]:
    """``graph -> engine`` and ``graph -> memory``, as this card's TensorRT tells it.

    What a context took of the free memory may be less than it will: CUDA loads code when it first runs. So at least
    the usual assumption counts.
    """
    opened, memory = {}, {}
    for graph, plan in plans.items():
        free = runtime.card.free_bytes()
        engine = opened[graph] = runtime.open(graph, plan)
        scratch, values = engine.scratch_bytes, engine.value_bytes
        memory[graph] = GraphMemory(scratch, values, max(CONTEXT_BYTES, free - runtime.card.free_bytes()))
    return opened, memory
