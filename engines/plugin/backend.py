"""The backend of every plugin provider: weights stream to a card, onnxruntime's plugin computes there in float32.

The provider keeps what its runs take, for every size of buffer, so the plan adds up the graphs' intermediate tensors,
each at its own worst (they stand in the graphs' metadata). Short of memory, everything is closed, the library with it,
and opened again within a smaller plan.
"""

import logging
import traceback
from collections.abc import Callable, Mapping
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np

from ...machine.platforms.mapping import open_mapped
from ...machine.wording import format_bytes
from ...specs import Family
from ..base import Array, Limits, Opened
from ..device.residency import GraphMemory, Residency, Slots, plan_residency
from ..directory.integrity import fingerprint, require_unchanged
from ..directory.manifest import INTERMEDIATES, Chunk, Manifest, Model
from ..errors import BackendUnavailable, EngineFileDamaged, OutOfDeviceMemory, ShapeMismatch
from .graph_paths import graph_paths
from .plugin_device import DeviceValue, PluginDevice
from .presence import Seat, seat_for
from .providers import Provider
from .value_slots import Places, PluginStore, kind_of, open_stores, places_of

log = logging.getLogger(__name__)


class PluginEngine:
    """A session of one graph on the card."""

    def __init__(self, graph: str, device: PluginDevice, model: bytes, images: int) -> None:
        self._graph = graph
        self._device = device
        self._session = session = device.session(graph, model)
        first, *others = session.get_inputs()
        self.activation: str = first.name
        self._shape = list(first.shape[1:])
        self.inputs: dict[str, list[int]] = {value.name: value.shape for value in others}
        """The weights, whole or in pieces, with their shapes."""
        self._outputs = [output.name for output in session.get_outputs()]
        fixed, each = map(int, session.get_modelmeta().custom_metadata_map[INTERMEDIATES].split(","))
        self.memory_bytes = fixed + each * images
        """What runs with so many pictures take beside the inputs."""
        self.input_bytes = 4 * images * int(np.prod(self._shape))

    @property
    def placement(self) -> dict[str, set[str]]:
        """``provider -> operators`` that onnxruntime gave to it."""
        found: dict[str, set[str]] = {}
        for part in self._session.get_provider_graph_assignment_info():
            found.setdefault(part.ep_name, set()).update(node.op_type for node in part.get_nodes())
        return found

    def run(self, activation: DeviceValue, weights: Mapping[str, DeviceValue]) -> dict[str, DeviceValue]:
        shape = activation.shape()
        if shape[1:] != self._shape:
            raise ShapeMismatch(self._graph, self.activation, str(shape), str(["batch", *self._shape]))
        feed = {self.activation: activation, **weights}
        return self._device.run(self._session, feed, self._outputs, self.memory_bytes)


@dataclass(frozen=True)
class PluginBuild:
    """What is opened: files that were read, so that a rebuild changes nothing."""

    directory: Path
    manifest: Manifest
    graphs: Mapping[str, bytes]
    images: int


class PluginBackend:
    """An engines directory on a card.

    Args:
        seat: the provider and the card.
        build: what is opened.
        budget_bytes: for everything; None takes the least that works, for cards that do not tell what is free.

    Raises:
        BudgetTooSmall: these engines need more.
        OutOfDeviceMemory: the card has less than the smallest plan needs.
        ProviderFailed: the provider does not come up, or refuses a graph.
    """

    def __init__(self, seat: Seat, build: PluginBuild, budget_bytes: int | None) -> None:
        self.name = seat.provider.backend
        self._seat = seat
        self._build = build
        folder = build.directory / build.manifest.build
        models = build.manifest.models
        self._packs = {family: open_mapped(folder / model.pack) for family, model in models.items()}
        self.fingerprint = fingerprint(build.directory, [pack.opened for pack in self._packs.values()])
        self._opened = ExitStack()
        self._engines: dict[str, PluginEngine] = {}
        self._stores: dict[Family, PluginStore] = {}
        self._residency: Residency | None = None
        try:
            self._open(budget_bytes)
        except BaseException:
            self.close()
            raise

    @property
    def residency(self) -> Residency:
        """The plan in force."""
        assert self._residency is not None
        return self._residency

    @property
    def peak_bytes(self) -> int:
        """The most of the card by our own count, since it was last opened."""
        return self.device.peak_bytes

    @property
    def placement(self) -> dict[str, dict[str, set[str]]]:
        """``graph -> provider -> operators``."""
        return {graph: engine.placement for graph, engine in self._engines.items()}

    def engine(self, graph: str) -> PluginEngine:
        return self._engines[graph]

    def store(self, family: Family) -> PluginStore:
        """The weights of a model, if its pack is still the one that was opened."""
        require_unchanged(self._packs[family])
        return self._stores[family]

    def value(self, array: Array) -> DeviceValue:
        value = self.device.allocate(np.float32, array.shape)
        self.device.write(value, np.ascontiguousarray(array, np.float32))
        return value

    def array(self, value: DeviceValue) -> Array:
        return np.asarray(self.device.read(value), np.float32)

    def later(self, values: Mapping[str, DeviceValue]) -> Callable[[], dict[str, Array]]:
        arrays = {name: self.array(value) for name, value in values.items()}
        return lambda: arrays

    def shrink(self, cause: OutOfDeviceMemory) -> None:
        plan = self.residency
        wanted = (plan.peak_bytes + plan.least_bytes) // 2  # a few tries reach the smallest plan
        if plan.peak_bytes <= plan.least_bytes:
            raise cause
        error: BaseException | None = cause
        while error is not None:  # whoever failed still holds values and sessions
            traceback.clear_frames(error.__traceback__)
            error = error.__cause__
        log.warning("out of memory on %s: opening again with a smaller plan", self._seat.name)
        self._close_device()
        self._open(wanted)
        self._tell(plan)

    def close(self) -> None:
        self._close_device()
        for pack in self._packs.values():
            with suppress(BufferError):  # an error's traceback still looks at it: the map goes when that goes
                pack.close()

    # --------------------------------------------------------------------------------------------------------------

    def _open(self, budget_bytes: int | None) -> None:
        """Sessions, the plan, then the weights; with less while memory runs out."""
        while True:
            try:
                self._open_device()
                plan = self._residency = self._plan(budget_bytes)
                models = self._build.manifest.models
                self._stores = open_stores(self.device, models, self._packs, self._places(), plan.resident, plan.slots)
            except OutOfDeviceMemory as error:
                failed = self._residency
                if failed is None or failed.peak_bytes <= failed.least_bytes:
                    raise
                traceback.clear_frames(error.__traceback__)
                self._close_device()
                budget_bytes = (failed.peak_bytes + failed.least_bytes) // 2
                log.warning("%s: trying %s", error, format_bytes(budget_bytes))
            else:
                return

    def _open_device(self) -> None:
        self.device = self._seat.open()
        self._opened.callback(self.device.close)
        for graph, model in self._build.graphs.items():
            self._engines[graph] = PluginEngine(graph, self.device, model, self._build.images)
        self.device.open()

    def _close_device(self) -> None:
        self._stores = {}
        self._engines = {}
        self._opened.close()

    def _plan(self, budget_bytes: int | None) -> Residency:
        memory = {
            graph: GraphMemory(0, engine.input_bytes, engine.memory_bytes) for graph, engine in self._engines.items()
        }
        plan = partial(plan_plugin, self._build.manifest.models, memory, self.device.reserved_bytes)
        return plan(plan(1 << 62).least_bytes if budget_bytes is None else budget_bytes)

    def _places(self) -> dict[Family, dict[Chunk, Places]]:
        inputs = {graph: engine.inputs for graph, engine in self._engines.items()}
        build = self._build
        try:
            return {family: places_of(model, inputs) for family, model in build.manifest.models.items()}
        except ValueError as error:
            raise EngineFileDamaged(build.directory / build.manifest.build, build.directory, str(error)) from error

    def _tell(self, old: Residency) -> None:
        log.warning(
            "%s: going on with %s instead of %s of it, %s instead of %s copied per pass",
            self._seat.name,
            format_bytes(self.residency.peak_bytes),
            format_bytes(old.peak_bytes),
            format_bytes(self.residency.streamed_bytes),
            format_bytes(old.streamed_bytes),
        )


def plan_plugin(
    models: Mapping[Family, Model], graphs: Mapping[str, GraphMemory], reserved_bytes: int, budget_bytes: int
) -> Residency:
    """The plan of a budget behind a plugin provider. Pure.

    Args:
        models: of the manifest.
        graphs: memory of every graph.
        reserved_bytes: what the provider takes beside the tensors.
        budget_bytes: for everything.

    Raises:
        BudgetTooSmall: these engines need more.
    """
    chunks = {family: model.chunks for family, model in models.items()}
    kinds = {(family, i): kind_of(chunk) for family, row in chunks.items() for i, chunk in enumerate(row)}
    # Opening reads every value back, through a buffer of its size that is kept (measured).
    largest_read = max(info.nbytes for model in models.values() for info in model.tensors.values())
    slots = Slots(kinds=kinds, staged=True)
    return plan_residency(chunks, graphs, budget_bytes, slots=slots, reserved_bytes=reserved_bytes + largest_read)


def open_plugin(provider: Provider, engines: Path, manifest: Manifest, limits: Limits) -> Opened:
    """Open an engines directory behind a plugin provider.

    Args:
        provider: the row of facts.
        engines: the engines directory, with int8 or fp32 packs.
        manifest: its manifest.
        limits: images, VRAM, device and form.

    Raises:
        BackendUnavailable: the provider cannot run here, has no such card or no such form.
        PluginGraphsMissing: there are no graphs for these packs.
        BudgetTooSmall, OutOfDeviceMemory: they need more.
        ProviderFailed: the provider does not come up.
    """
    form = limits.form or provider.forms[0]
    if form not in provider.forms:
        reason = f"it has no form {form} of its graphs"
        raise BackendUnavailable(provider.backend, reason, f"use one of {', '.join(provider.forms)}")
    paths = graph_paths(engines, manifest, form)
    graphs = {graph: path.read_bytes() for graph, path in paths.items()}
    seat = seat_for(provider, limits.device)
    build = PluginBuild(engines, manifest, graphs, limits.images)
    return Opened(PluginBackend(seat, build, seat.budget_bytes(limits.vram)), manifest, manifest)
