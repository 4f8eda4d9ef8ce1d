"""A backend on a device: engines of that device, weights that stream to it within a budget.

Only the device and its engines differ between CUDA and TensorRT, and between those and the fake of the tests.
"""

import contextlib
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path

from ...machine.memory import available_bytes
from ...machine.platforms.mapping import open_mapped
from ...specs import Family
from ..base import Array, Engine, Value
from ..directory.integrity import fingerprint, require_unchanged
from ..directory.manifest import Manifest
from ..errors import OutOfDeviceMemory, ShapeMismatch
from ..replay.model_graphs import ModelGraphs, Recording
from .device import Device, Workspace, finish_at_last
from .pinned.host_cache import plan_host_cache, values_pinned
from .residency import GraphMemory, Residency, plan_residency
from .slots import DeviceStore, DeviceWeights

MOST_PINNED_BYTES = 256 << 20
"""Of one copy that shows the bandwidth; more would show no other."""


class DeviceBackend:
    """An engines directory on a device.

    Args:
        name: such as ``tensorrt``.
        device: where to compute.
        make_engine: a graph's name to its engine.
        directory: the engines directory.
        manifest: its manifest.
        graphs: memory of every graph.
        budget_bytes: for weights, activations and all.
        workspace: of engines that compute in the memory that the plan counts for them.

    Raises:
        BudgetTooSmall: these engines need more.
        OutOfDeviceMemory: the device has less free than the smallest plan needs.
    """

    def __init__(
        self,
        name: str,
        device: Device,
        make_engine: Callable[[str], Engine],
        directory: Path,
        manifest: Manifest,
        graphs: Mapping[str, GraphMemory],
        budget_bytes: int,
        workspace: Workspace | None = None,
    ) -> None:
        self.name = name
        self.device = device
        self._make_engine = make_engine
        self._engines: dict[str, Engine] = {}
        folder = directory / manifest.build
        self._maps = {family: open_mapped(folder / model.pack) for family, model in manifest.models.items()}
        self.fingerprint = fingerprint(directory, [pack.opened for pack in self._maps.values()])
        self._chunks = {family: model.chunks for family, model in manifest.models.items()}
        self._values_bytes = values_pinned(manifest.models["adapter"], graphs)
        packs = {family: memoryview(pack) for family, pack in self._maps.items()}
        plan = partial(plan_residency, self._chunks, graphs)
        self._weights = DeviceWeights(device, manifest.models, packs, plan, budget_bytes, workspace)
        self.graphs = ModelGraphs(device, self._left_bytes) if isinstance(device, Recording) else None
        """Of whole models, where the device can record them."""
        self.keep_on_host()

    @property
    def residency(self) -> Residency:
        """The plan in force."""
        return self._weights.residency

    @property
    def peak_bytes(self) -> int:
        """The most that the device saw in use."""
        return self.device.peak_bytes

    @property
    def graph_facts(self) -> dict[str, int]:
        """What CUDA graphs have of the device's memory, beside the plan; nothing where none can be made."""
        return {} if self.graphs is None else {"graphs_bytes": self.graphs.taken_bytes}

    def engine(self, graph: str) -> Engine:
        if graph not in self._engines:
            self._engines[graph] = self._make_engine(graph)
        return self._engines[graph]

    def store(self, family: Family) -> DeviceStore:
        """The weights of a model, if its pack is still the one that was opened."""
        require_unchanged(self._maps[family])
        self._weights.reopen()
        return self._weights.stores[family]

    def value(self, array: Array) -> Value:
        """An array at the beginning of the workspace's values; it stays there until the next."""
        self._weights.reopen()
        if array.nbytes > self._weights.workspace.values_bytes:
            raise ShapeMismatch(self.name, "value", str(list(array.shape)), "fewer images at once")
        return self.device.upload(array, self._weights.workspace.values_address)

    def array(self, value: Value) -> Array:
        return self.device.download(value)

    def later(self, values: Mapping[str, Value]) -> Callable[[], dict[str, Array]]:
        return self.device.fetch(values)

    def shrink(self, cause: OutOfDeviceMemory) -> None:
        self._drop_graphs()
        self._weights.shrink(cause)
        self.keep_on_host()

    def keep_on_host(self) -> None:
        """Tell the device which chunks will come in every pass, as far as the host's memory is for them."""
        self.device.keep_on_host((), 0)  # what is kept already is not available
        resident, values = self.residency.resident, self._values_bytes
        plan = plan_host_cache(self._chunks, resident, available_bytes(), values_bytes=values)
        kept = ((self._maps[family], self._chunks[family][index]) for family, index in plan.kept)
        regions = [memoryview(pack)[chunk.offset : chunk.offset + chunk.nbytes] for pack, chunk in kept]
        self.device.keep_on_host(regions, plan.floor_bytes)

    def pinned_bandwidth(self) -> float:
        """Bytes per second of plain copies from pinned memory: what streaming is measured against, between passes.

        They go into the slots, so that the card holds no more than the plan says.

        Raises:
            OutOfDeviceMemory: so much of the host's memory cannot be pinned.
        """
        address, nbytes = self._weights.slots_region
        return self.device.pinned_rate(address, min(nbytes, MOST_PINNED_BYTES))

    def close(self) -> None:
        finish_at_last(self.device)  # an engine must not go while it computes
        self._drop_graphs()
        self._engines.clear()
        self._weights.close()
        self.device.close()
        with contextlib.suppress(BufferError):  # an error's traceback still holds weights: the maps go when they go
            for pack in self._maps.values():
                pack.close()

    def _left_bytes(self) -> int:
        """Of the budget beside the plan: graphs may take it."""
        return self.residency.budget_bytes - self.residency.peak_bytes

    def _drop_graphs(self) -> None:
        if self.graphs is not None:
            self.graphs.drop()
