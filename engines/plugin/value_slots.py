"""The weights behind a plugin provider: slots that are sets of values, and chunks whose values stay.

A value has a fixed shape, so a slot serves the chunks whose steps run the same graphs: each kind of chunk has slots of
its own. Everything is allocated when the weights are opened, written and read back: a value that is not there, or two
that are one, would otherwise only show in a wrong LoRA.
"""

import itertools
from collections import Counter, deque
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from mmap import mmap
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

from ...machine.platforms.mapping import give_back
from ...specs import Family
from ..directory.dtypes import ELEMENT_TYPES
from ..directory.manifest import Chunk, Model, Step, inputs_of
from ..directory.pieces import placed
from ..directory.tensorfile import TensorInfo
from ..errors import OutOfDeviceMemory
from .plugin_device import DeviceValue, PluginDevice

Kind: TypeAlias = tuple[str, ...]
"""The graphs of a chunk's steps."""
Places: TypeAlias = tuple[Mapping[str, TensorInfo], ...]
"""For each step of a chunk, where its graph's inputs lie in the pack."""


def kind_of(chunk: Chunk) -> Kind:
    """Chunks of one kind fit the same slots."""
    return tuple(step.graph for step in chunk.steps)


@dataclass(frozen=True)
class Slot:
    """Values for the steps of a chunk."""

    steps: tuple[dict[str, DeviceValue], ...]


def new_slot(device: PluginDevice, places: Places) -> Slot:
    """Values of these shapes."""
    return Slot(
        tuple(
            {name: device.allocate(ELEMENT_TYPES[info.dtype][0], info.shape) for name, info in step.items()}
            for step in places
        )
    )


class PluginStore:
    """One model's weights; a :class:`WeightStore`.

    Args:
        device: where they go.
        model: of the manifest.
        pack: its pack, mapped.
        places: of the chunks' inputs in the pack.
        resident: indices of the chunks that stay.
        slots: chunks of one kind that may be on the card for the others.
    """

    def __init__(
        self,
        device: PluginDevice,
        model: Model,
        pack: mmap,
        places: Mapping[Chunk, Places],
        resident: Sequence[int],
        slots: int,
    ) -> None:
        self._device = device
        self._pack = pack
        self._places = places
        self.slots = slots
        self.abreast = 1
        staying = [model.chunks[index] for index in resident]
        self._resident = {chunk: new_slot(device, self._places[chunk]) for chunk in staying}
        self.resident = self._resident.keys()
        self._free: dict[Kind, deque[Slot]] = {}
        passing = [chunk for chunk in model.chunks if chunk not in self._resident]
        for kind, count in Counter(map(kind_of, passing)).items():
            first = next(chunk for chunk in passing if kind_of(chunk) == kind)
            self._free[kind] = deque(new_slot(device, places[first]) for _ in range(min(slots, count)))
        self._held: dict[Chunk, Slot] = {}
        self._current: dict[str, Mapping[str, DeviceValue]] = {}

    def fill(self) -> None:
        """Write what stays, and to every slot a pattern of its own."""
        for chunk, slot in self._resident.items():
            self._copy(chunk, slot)
            self._device.settle()
        for value, pattern in self._patterns():
            self._device.write(value, pattern)
            self._device.settle()

    def check(self) -> None:
        """Read all of it back.

        Raises:
            OutOfDeviceMemory: something else is there than was written.
        """
        for chunk, slot in self._resident.items():
            for values, infos in zip(slot.steps, self._places[chunk], strict=True):
                for name, info in infos.items():
                    self._compare(values[name], self._array(info))
            give_back(self._pack, chunk.offset, chunk.nbytes)
        for value, pattern in self._patterns():
            self._compare(value, pattern)

    def prefetch(self, chunk: Chunk) -> None:
        if chunk in self._resident:
            return
        free = self._free[kind_of(chunk)]
        self._copy(chunk, free[0])
        self._held[chunk] = free.popleft()

    def acquire(self, chunk: Chunk) -> None:
        # What this waits for ends before the chunk's own steps are asked for, and the next copy is made while they run.
        self._device.settle()
        slot = self._resident.get(chunk) or self._held[chunk]
        self._current = {step.name: values for step, values in zip(chunk.steps, slot.steps, strict=True)}

    def weights(self, step: Step) -> Mapping[str, DeviceValue]:
        return self._current[step.name]

    def release(self, chunk: Chunk) -> None:
        if slot := self._held.pop(chunk, None):
            self._free[kind_of(chunk)].append(slot)

    def _copy(self, chunk: Chunk, slot: Slot) -> None:
        for values, infos in zip(slot.steps, self._places[chunk], strict=True):
            for name, info in infos.items():
                self._device.write(values[name], self._array(info))
        give_back(self._pack, chunk.offset, chunk.nbytes)

    def _array(self, info: TensorInfo) -> NDArray[np.generic]:
        """A tensor as it lies in the mapped pack."""
        dtype = np.dtype(ELEMENT_TYPES[info.dtype][0])
        flat: NDArray[np.generic] = np.frombuffer(self._pack, dtype, info.nbytes // dtype.itemsize, info.offset)
        return flat.reshape(info.shape)

    def _patterns(self) -> Iterator[tuple[DeviceValue, NDArray[np.generic]]]:
        """``(value, what is written there)`` of every value of every slot; neighbours differ."""
        patterns = itertools.cycle(range(1, 252))
        for kind, free in self._free.items():
            places = next(places for chunk, places in self._places.items() if kind_of(chunk) == kind)
            for slot in free:
                for values, infos in zip(slot.steps, places, strict=True):
                    for name, info in infos.items():
                        pattern = np.full(info.nbytes, next(patterns), np.uint8)
                        yield values[name], pattern.view(ELEMENT_TYPES[info.dtype][0]).reshape(info.shape)

    def _compare(self, value: DeviceValue, wanted: NDArray[np.generic]) -> None:
        found = np.ascontiguousarray(self._device.read(value))
        if found.tobytes() != np.ascontiguousarray(wanted).tobytes():
            raise OutOfDeviceMemory(self._device.name, wanted.nbytes, self._device.free_bytes())


def places_of(model: Model, inputs: Mapping[str, Mapping[str, Sequence[int]]]) -> dict[Chunk, Places]:
    """Where the inputs of every step lie in a model's pack.

    Args:
        model: of the manifest.
        inputs: ``graph -> its inputs but for the activation``, with their shapes.

    Raises:
        ValueError: a graph takes something else than the pack holds.
    """
    return {
        chunk: tuple(placed(inputs_of(step, model), inputs[step.graph]) for step in chunk.steps)
        for chunk in model.chunks
    }


def open_stores(
    device: PluginDevice,
    models: Mapping[Family, Model],
    packs: Mapping[Family, mmap],
    places: Mapping[Family, Mapping[Chunk, Places]],
    resident: Mapping[Family, Sequence[int]],
    slots: int,
) -> dict[Family, PluginStore]:
    """The weights of the three models, filled and read back.

    Raises:
        OutOfDeviceMemory: the card does not hold them.
    """
    stores = {
        family: PluginStore(device, model, packs[family], places[family], resident[family], slots)
        for family, model in models.items()
    }
    for store in stores.values():
        store.fill()
    for store in stores.values():
        store.check()
    return stores
