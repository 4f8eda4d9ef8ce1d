"""The tensorrt backend: weights stream to a CUDA card, TensorRT's plans compute.

Plans are opened before anything is planned, as only the card's own TensorRT knows how much scratch their kernels take
there; the builder's number is for another machine. All graphs share one workspace, which is counted once, at its
largest.
"""

import logging
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path

from ...machine.errors import PackageMissing
from ..base import Arithmetic, Array, BackendStatus, CardFacts, Limits, Offer, Opened, Value
from ..device import driver
from ..device.backend import DeviceBackend
from ..device.device import Workspace, close_engines, finish_at_last
from ..device.residency import CONTEXT_BYTES, RESERVED_BYTES, GraphMemory
from ..device.which_card import card_facts, chosen_card
from ..directory.generations import engines_for
from ..directory.integrity import check_files
from ..directory.manifest import Manifest, graphs_of, read_manifest
from ..errors import BackendUnavailable
from .engine import PlanRuntime, TensorRTEngine
from .library import Flavour, current_sm, find_flavour, installed_flavours, knows
from .plans import checked_plan, plans_folder, wanted_key
from .runtime_cache import RuntimeCache

log = logging.getLogger(__name__)


def find_tensorrt() -> BackendStatus:
    """It wants a driver, a TensorRT that loads and knows the first card, and cuda-python."""
    if status := driver.without_driver("tensorrt") or _without_tensorrt() or driver.without_cuda_python("tensorrt"):
        return status
    try:
        sm = current_sm()
        flavour = find_flavour(sm)
        status = driver.on_cards("tensorrt", f"{flavour}, sm{sm}{_why(flavour)}", {})
        cards = tuple(replace(card, libraries=_libraries(index)) for index, card in enumerate(status.cards))
    except BackendUnavailable:
        remedy = "see what nvidia-smi says, or use --backend cpu"
        return BackendStatus("tensorrt", works=False, reason="the NVIDIA driver finds no GPU", remedy=remedy)
    except (ImportError, OSError) as error:  # its libraries do not load
        remedy = "install it again, or use --backend cuda"
        return BackendStatus("tensorrt", works=False, reason=f"TensorRT does not load ({error})", remedy=remedy)
    if not knows(flavour, sm):
        reason = f"{flavour} does not know this GPU, sm{sm}"
        remedy = "use --backend cuda, or pip install tensorrt beside it"
        return BackendStatus("tensorrt", works=False, reason=reason, remedy=remedy)
    return replace(status, cards=cards)


def _without_tensorrt() -> BackendStatus | None:
    try:
        installed_flavours()
    except PackageMissing:
        reason, remedy = "tensorrt or tensorrt_rtx is not installed", 'pip install "i2l-engines[tensorrt]"'
        return BackendStatus("tensorrt", works=False, reason=reason, remedy=remedy)
    return None


def _libraries(index: int) -> dict[str, str]:
    """``package -> version`` of what computes on a card."""
    flavour = find_flavour(current_sm(index))
    return {flavour.name: flavour.version}


def _why(flavour: Flavour) -> str:
    return f": {flavour.reason}" if flavour.reason else ""


def card_on_tensorrt(device: str | None) -> CardFacts | None:
    """The card that a name or number stands for."""
    card = card_facts("tensorrt", {}, device)
    return card and replace(card, libraries=_libraries(chosen_card("tensorrt", device)))


def open_tensorrt(engines: Path, manifest: Manifest, limits: Limits) -> Opened:
    """Open an engines directory on a card: the one that was asked for, or the one with the most free memory.

    Args:
        engines: the engines directory, built with ``--backend tensorrt`` for the card's generation.
        manifest: its manifest. Newer generations get the FP8 engines inside, if there are any.
        limits: images and VRAM.

    Raises:
        PackageMissing: no TensorRT is installed.
        BackendUnavailable: there is no driver or no card.
        EngineFileDamaged: a file of the FP8 engines inside is not what the build wrote.
        PlanMissing, PlanStale: there is no plan for this TensorRT and this card; the error says what differs.
        DeviceFailed: TensorRT refuses a plan; with its own words.
        BudgetTooSmall, OutOfDeviceMemory: they need more.
    """
    from ..device.card import CudaDevice  # noqa: PLC0415 - the leaf that needs CUDA

    index = chosen_card("tensorrt", limits.device)
    sm = current_sm(index)
    directory = engines_for(engines, sm)
    if directory != engines:
        manifest = read_manifest(directory)
        check_files(directory, manifest)
    flavour = find_flavour(sm)
    with ExitStack() as undo:
        card = CudaDevice(index=index, backend="tensorrt")
        undo.callback(card.close)
        plans = checked_plans(directory, manifest, flavour, card.sm)
        budget = limits.vram.on(card, RESERVED_BYTES)  # before contexts take of what is free
        workspace = Workspace()
        cache = RuntimeCache(plans_folder(directory, card.sm, manifest.precision), flavour, card.name)
        runtime = PlanRuntime(flavour, card, workspace, limits.images, cache)
        log.info("tensorrt: opening %d plans on %s%s", len(plans), runtime.where, _why(flavour))
        opened: dict[str, TensorRTEngine] = {}
        undo.callback(close_engines, opened)
        memory = open_plans(runtime, plans, opened)
        backend = TensorRTBackend(directory, manifest, runtime, opened, memory, budget)
        undo.pop_all()
        return Opened(backend, manifest, manifest, directory)


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

    def later(self, values: Mapping[str, Value]) -> Callable[[], dict[str, Array]]:
        take = super().later(values)

        def taken() -> dict[str, Array]:
            arrays = take()
            self._runtime.cache.save()
            return arrays

        return taken

    def close(self) -> None:
        finish_at_last(self.device)
        self._runtime.cache.save()  # what an interrupted pass compiled
        close_engines(self.opened)
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
    runtime: PlanRuntime, plans: Mapping[str, bytes], opened: dict[str, TensorRTEngine]
) -> dict[str, GraphMemory]:
    """``graph -> memory``, as this card's TensorRT tells it; ``graph -> engine`` goes into ``opened``.

    What a context took of the free memory may be less than it will: CUDA loads code when it first runs. So at least
    the usual assumption counts.
    """
    memory = {}
    for graph, plan in plans.items():
        free = runtime.card.free_bytes()
        engine = opened[graph] = runtime.open(graph, plan)
        scratch, values = engine.scratch_bytes, engine.value_bytes
        memory[graph] = GraphMemory(scratch, values, max(CONTEXT_BYTES, free - runtime.card.free_bytes()))
    return memory


ARITHMETIC: Mapping[str, Arithmetic] = {
    "fp8": "float8", "int8": "bfloat16", "bf16": "bfloat16", "fp32": "bfloat16",
}  # fmt: skip
OFFER = Offer(find_tensorrt, open_tensorrt, card=card_on_tensorrt, arithmetic=ARITHMETIC)
