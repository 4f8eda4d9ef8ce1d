"""The weights on a device: slots that chunks pass through, and chunks that stay.

One allocation holds both, laid out by the residency plan. The three models share the slots, as they run one after
another. Two orders make it safe, each an event between the lanes:

- a chunk is used after its copy: the compute lane waits for the event behind the copy;
- a slot is overwritten after its last use: the copy lane waits for the event behind the last step of the chunk before.

The host waits for nothing, so the next copy runs while the device computes.
"""

import logging
from collections import deque
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import TypeAlias

from ...machine.wording import format_bytes
from ...specs import Family
from ..base import Value
from ..directory.manifest import Chunk, Model, Step, inputs_of
from ..errors import DeviceFailed, OutOfDeviceMemory
from .device import Device, Event, Lane, Workspace, aligned, finish_at_last
from .residency import Residency

log = logging.getLogger(__name__)
Span: TypeAlias = Callable[..., AbstractContextManager[None]]
"""``span(lane, name, nbytes=...)``: times what its body enqueues."""


@dataclass
class Slot:
    """Where one chunk lies."""

    address: int
    consumed: Event = None
    """Behind the last use of the chunk that was here before."""


class DeviceWeights:
    """The weights of the three models on one device.

    Args:
        device: where they go.
        models: of the manifest.
        packs: the packs' bytes, mapped.
        plan: a budget to a residency.
        budget_bytes: to begin with.
        workspace: told where the engines' memory lies, again after every :meth:`shrink`.

    Raises:
        BudgetTooSmall: the smallest plan is over the budget.
        OutOfDeviceMemory: not even the smallest plan fits the device's free memory.
    """

    def __init__(
        self,
        device: Device,
        models: Mapping[Family, Model],
        packs: Mapping[Family, memoryview],
        plan: Callable[[int], Residency],
        budget_bytes: int,
        workspace: Workspace | None = None,
    ) -> None:
        self.device = device
        self.workspace = workspace or Workspace()
        self.residency = plan(budget_bytes)
        self._models = models
        self._packs = packs
        self._plan = plan
        self._allocations: list[int] = []
        self.stores: dict[Family, DeviceStore] = {}
        """None where memory ran out with the smallest plan."""
        self._open_or_shrink()

    @property
    def slots_region(self) -> tuple[int, int]:
        """``(address, bytes)`` of all slots, which hold nothing between passes; there is one where chunks stream."""
        plan = self.residency
        return self._allocations[-1], plan.slots * plan.slot_bytes

    def reopen(self) -> None:
        """Try again, if memory ran out with the smallest plan; whoever had it may have given it back.

        Raises:
            OutOfDeviceMemory: there is still not enough.
        """
        if not self.stores:
            self._open_or_shrink()

    def shrink(self, cause: OutOfDeviceMemory) -> None:
        """Go on with less memory; chunks that stay are copied again.

        Raises:
            OutOfDeviceMemory: ``cause``, as the plan was the smallest already.
        """
        self.close()
        self._replan(cause)
        self._open_or_shrink()

    def close(self) -> None:
        """Give all memory back."""
        self.stores = {}
        if self._allocations:
            finish_at_last(self.device)
        while self._allocations:
            self.device.free(self._allocations.pop())

    def _open_or_shrink(self) -> None:
        while True:
            try:
                self._open()
            except OutOfDeviceMemory as error:
                self.close()
                self._replan(error)
            else:
                return

    def _replan(self, cause: OutOfDeviceMemory) -> None:
        """The next smaller plan, within what is free now, said once."""
        old = self.residency
        available = self.device.free_bytes() + old.reserved_bytes + old.context_bytes  # engines are open: not free
        wanted = min(available, (old.peak_bytes + old.least_bytes) // 2)  # a few tries reach the smallest plan
        if old.peak_bytes <= old.least_bytes or available < old.least_bytes:
            raise cause
        self.residency = self._plan(max(wanted, old.least_bytes))
        log.warning(
            "out of memory on %s: going on with %s instead of %s of it, %s instead of %s copied per pass",
            self.device.name,
            format_bytes(self.residency.peak_bytes),
            format_bytes(old.peak_bytes),
            format_bytes(self.residency.streamed_bytes),
            format_bytes(old.streamed_bytes),
        )

    def _open(self) -> None:
        plan = self.residency
        working = plan.activation_bytes + plan.value_bytes
        for nbytes in (working, plan.weight_bytes):
            if nbytes:
                self._allocations.append(self.device.allocate(nbytes))
        self.workspace.address = self._allocations[0] if working else 0
        self.workspace.scratch_bytes, self.workspace.values_bytes = plan.activation_bytes, plan.value_bytes
        address = self._allocations[-1] if plan.weight_bytes else 0
        slots = deque(Slot(address + index * plan.slot_bytes) for index in range(plan.slots))
        address += plan.slots * plan.slot_bytes
        for family, model in self._models.items():
            places = {}
            for index in plan.resident[family]:
                places[model.chunks[index]] = address
                address += aligned(model.chunks[index].nbytes)
            self.stores[family] = DeviceStore(self.device, model, self._packs[family], slots, places)


class DeviceStore:
    """One model's weights; a :class:`WeightStore`."""

    def __init__(
        self, device: Device, model: Model, pack: memoryview, slots: deque[Slot], places: Mapping[Chunk, int]
    ) -> None:
        self.span: Span = untimed
        """Put around every copy; for a trace."""
        self.slots = len(slots)
        self.abreast = 1
        self.resident = places.keys()
        self._device = device
        self._chunks = len(model.chunks)
        self._inputs = {step.name: inputs_of(step, model) for chunk in model.chunks for step in chunk.steps}
        self._pack = pack
        self._free = slots
        self._places = places
        self._loaded: set[Chunk] = set()
        self._held: dict[Chunk, Slot] = {}
        self._ready: dict[Chunk, Event] = {}
        self._bases: dict[str, int] = {}

    @property
    def settled(self) -> bool:
        """All chunks are there to stay: a pass copies none."""
        return len(self._loaded) == self._chunks

    def prefetch(self, chunk: Chunk) -> None:
        if chunk in self._loaded:
            return
        if chunk in self._places:
            self._copy(chunk, self._places[chunk])
            self._loaded.add(chunk)
            return
        slot = self._free[0]
        if slot.consumed is not None:
            self._device.wait("copy", slot.consumed)
        self._copy(chunk, slot.address)
        self._held[chunk] = self._free.popleft()

    def acquire(self, chunk: Chunk) -> None:
        if (ready := self._ready.pop(chunk, None)) is not None:
            self._device.wait("compute", ready)
        address = self._places[chunk] if chunk in self._places else self._held[chunk].address
        self._bases = {step.name: address - chunk.offset for step in chunk.steps}

    def weights(self, step: Step) -> Mapping[str, Value]:
        base = self._bases[step.name]
        return {name: self._device.value(base + info.offset, info) for name, info in self._inputs[step.name].items()}

    def release(self, chunk: Chunk) -> None:
        if slot := self._held.pop(chunk, None):
            self._ready.pop(chunk, None)
            slot.consumed = None
            try:
                slot.consumed = self._device.record("compute")
            except (DeviceFailed, OutOfDeviceMemory):  # what cannot be marked is waited for: the slot is not lost
                finish_at_last(self._device)
                raise
            finally:
                self._free.append(slot)

    def _copy(self, chunk: Chunk, address: int) -> None:
        with self.span("copy", f"copy {chunk.steps[0].name}", nbytes=chunk.nbytes):
            self._device.copy_async(self._pack[chunk.offset : chunk.offset + chunk.nbytes], address)
        self._ready[chunk] = self._device.record("copy")


def untimed(lane: Lane, name: str, *, nbytes: int) -> AbstractContextManager[None]:  # noqa: ARG001
    """No span."""
    return nullcontext()
