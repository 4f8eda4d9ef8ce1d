"""A card that is played, and what can be wrong with one: a backend over the fake device, told by ``$PLAYED_CARD``.

A proof runs in a process of its own, which no patch of a test reaches: so the part is in the environment.
"""

import json
import os
import sys
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import onnxruntime as ort

from fake_device import DeviceTensor, FakeDevice, FakeEngine
from i2l.engines.base import BackendStatus, CardFacts, Limits, Offer, Opened
from i2l.engines.device.backend import DeviceBackend
from i2l.engines.device.residency import GraphMemory, plan_residency
from i2l.engines.directory.manifest import Manifest
from i2l.engines.errors import BudgetTooSmall, DeviceFailed, EnginesMissing, OutOfDeviceMemory

VARIABLE = "PLAYED_CARD"
NAME = "played"
COMPANY = {"batches": 1.5, "company": 1 + 1e-6}
"""What becomes of the last picture of a batch."""


@dataclass(frozen=True)
class Part:
    """What is played."""

    fault: str = ""
    only: str = ""
    """The form that has the fault; all of them by default."""
    forms: tuple[str, ...] = ()
    driver: str = "1.0"
    library: str = "1.0"
    software: bool = False
    modest: bool = False
    """It takes the least by itself, as a card that does not tell what is free."""

    def text(self) -> str:
        return json.dumps(asdict(self))


def part() -> Part:
    values = json.loads(os.environ.get(VARIABLE, "{}"))
    return Part(**{**values, "forms": tuple(values.get("forms", ()))})


class PlayedDevice(FakeDevice):
    """Its fault ``stale``: what lies in a slot stays there."""

    def __init__(self, fault: str) -> None:
        super().__init__(1 << 30)
        self._fault = fault
        self._written: set[int] = set()

    def copy_async(self, source: memoryview, address: int) -> None:
        if self._fault != "stale" or address not in self._written:
            super().copy_async(source, address)
        self._written.add(address)


class PlayedEngine:
    """The right outputs but for the fault."""

    def __init__(self, engine: FakeEngine, graph: str, fault: str) -> None:
        self._engine, self._graph, self._fault = engine, graph, fault
        self.activation = engine.activation

    def run(self, activation: ort.OrtValue, weights: Mapping[str, DeviceTensor]) -> dict[str, ort.OrtValue]:
        outputs = self._engine.run(activation, weights)
        if self._fault == "crashes":
            sys.stderr.write(f"cannot load {Path.home()}/driver.so\n")
            sys.stderr.flush()
            os.abort()
        if self._fault == "hangs":
            time.sleep(600)
        if self._fault == "fails":
            raise DeviceFailed("played card", "lost")
        if self._fault == "raises":
            raise RuntimeError("what no room explains")
        time.sleep({"slow": 0.02, "lazy": 0.003}.get(self._fault, 0.0))
        return {name: owning(self._off(value.numpy())) for name, value in outputs.items()}

    def _off(self, array: np.ndarray) -> np.ndarray:
        array = array.copy()
        if self._fault == "off" and self._graph == "dinov3.block":
            array[:, -1] *= 1.02  # one token
        if self._fault == "nan" and self._graph == "siglip2.head":
            array[0, 0] = np.nan
        if self._fault in COMPANY and len(array) > 1:
            array[-1] *= COMPANY[self._fault]
        if self._fault == "restless":
            array += 1e-7 * np.random.default_rng().standard_normal(array.shape, np.float32)
        return array


def owning(array: np.ndarray) -> ort.OrtValue:
    value = ort.OrtValue.ortvalue_from_shape_and_type(array.shape, np.float32)
    value.update_inplace(np.ascontiguousarray(array))
    return value


def open_played(engines: Path, manifest: Manifest, limits: Limits) -> Opened:
    played = part()
    fault = played.fault if played.only in ("", limits.form) else ("lazy" if played.forms else "")
    if fault == "unbuilt":
        raise EnginesMissing(engines)
    device = PlayedDevice(fault)
    if fault == "full":
        raise OutOfDeviceMemory(device.name, 2, 1)
    graphs = {graph: GraphMemory(5000, 400_000, 100) for graph in manifest.graphs}
    budget = limits.vram.budget_bytes or 1 << 30
    if played.modest and limits.vram.budget_bytes is None:
        budget = least_bytes(manifest, graphs)
    if fault == "roomy":
        fault = "off" if budget > least_bytes(manifest, graphs) else ""

    def make(graph: str) -> PlayedEngine:
        path = engines / manifest.build / manifest.graphs[graph]
        return PlayedEngine(FakeEngine(device, graph, path, lambda _: None), graph, fault)

    backend = DeviceBackend(NAME, device, make, engines, manifest, graphs, budget)
    if fault == "greedy":
        device.peak_bytes = 1 << 40
    return Opened(backend, manifest, manifest)


def least_bytes(manifest: Manifest, graphs: Mapping[str, GraphMemory]) -> int:
    try:
        plan_residency({family: model.chunks for family, model in manifest.models.items()}, graphs, 1)
    except BudgetTooSmall as error:
        return error.needed_bytes
    raise AssertionError("a byte was enough")


def find_played() -> BackendStatus:
    played = part()
    card = CardFacts("Played Card", played.driver, {"playing": played.library}, played.software)
    return BackendStatus(NAME, works=True, reason="it is played", cards=(card,))


OFFER = Offer(find_played, open_played, part().forms)
