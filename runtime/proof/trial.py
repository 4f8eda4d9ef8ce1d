"""The checks of a proof, on an opened backend. Runs in the proof's own process.

Whole models are run for the time alone, and only where that takes seconds. All else sees a stretch of each: chunks
enough that every slot is used several times, in the order and by the streamer of a real pass.
"""

import time
from collections.abc import Callable, Mapping
from contextlib import closing
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from ...engines.backends import offer_of, right_outputs
from ...engines.base import Array, Limits, Opened, VramBudget
from ...engines.device.residency import Counted, Planned
from ...engines.directory.manifest import Manifest
from ...engines.errors import BudgetTooSmall
from ...specs import Family
from ..streamer import stream
from .activations import seeded_activation
from .card_memory import Told, growth, told_memory
from .judging import (
    TOLERANCES,
    FormOutcome,
    difference,
    difference_failure,
    error_failure,
    first_steps,
    memory_failure,
    time_failure,
    worst_error,
)
from .timing import STRETCH, lane_facts, outputs, pass_time, upload_rates

ROOM_BYTES = 512 << 20
"""Beyond the smallest plan: a few chunks at full size."""
PHASES = 8
"""Of :func:`try_form`, beside one for each kind of graph."""

Tell = Callable[[int, int], None]
"""``(done, total)`` phases."""


@dataclass
class Trial:
    """A backend on trial.

    Args:
        engines: the engines directory.
        manifest: its manifest.
        backend: its name.
        limits: what it may take, and the form of graphs.
        tell: told the phases done.
        software: the card is a renderer on the CPU.
    """

    engines: Path
    manifest: Manifest
    backend: str
    limits: Limits
    tell: Tell
    software: bool = False
    facts: dict[str, Any] = field(default_factory=dict)
    """What was measured, by the names of :class:`FormOutcome`."""
    results: list[Array] = field(default_factory=list)
    """Of one image, to which all else must be equal."""
    _before: Told | None = None
    """What the process held before the card was opened."""
    _done: int = 0
    _least_bytes: int = 0
    _streamed: int | None = None
    """Bytes a pass copies, by the plan in force; None for a backend without a plan."""
    _everything_streams: int | None = None

    def run(self) -> FormOutcome:
        """All checks, until one fails."""
        start = time.perf_counter()
        self._advance(0)
        offer_of(self.backend)  # what it imports is not the card's
        self._before = told_memory(software=self.software)
        failure = self._in_force() or self._smallest() or self._roomier()
        return FormOutcome(self.limits.form, failure, seconds=time.perf_counter() - start, **self.facts)

    def _in_force(self) -> str:
        """The plan as the budget gives it."""
        opened = offer_of(self.backend).open(self.engines, self.manifest, self.limits)
        with closing(opened.backend):
            self._advance()
            self.facts["errors"] = self._errors(opened)
            arithmetic = offer_of(self.backend).arithmetic.get(opened.running.precision, "float32")
            self.facts["tolerance"] = TOLERANCES[arithmetic]
            if failure := error_failure(self.facts["errors"], TOLERANCES[arithmetic]):
                return failure
            images = self._inputs(opened, self.limits.images)
            first = {family: array[:1] for family, array in images.items()}
            self.results, _ = outputs(opened, first, STRETCH)
            again, seconds = outputs(opened, first, STRETCH)
            self._advance()
            if failure := difference_failure("a second time", difference(self.results, again)):
                return failure
            if failure := self._company(opened, images):
                return failure
            self.facts |= pass_time(opened, first, seconds)
            self._advance()
            self.facts |= memory(opened)
            told = self._told()
            self.facts |= {"told_bytes": told.nbytes, "told_by": told.by} if told else {}
            self._streamed = streamed_bytes(opened)
        return memory_failure(self.facts["peak_bytes"], self.facts["budget_bytes"], told)

    def _smallest(self) -> str:
        """The least plan that works, where everything streams; nothing to do for a backend without a budget."""
        offer = offer_of(self.backend)
        try:
            offer.open(self.engines, self.manifest, replace(self.limits, vram=VramBudget(1))).backend.close()
        except BudgetTooSmall as error:
            self._least_bytes = error.needed_bytes
        else:
            return ""
        opened = offer.open(self.engines, self.manifest, self._within(self._least_bytes))
        if isinstance(opened.backend, Planned) and opened.backend.residency.least_bytes < self._least_bytes:
            self._least_bytes = opened.backend.residency.least_bytes  # some backends see only now what they need
            opened.backend.close()
            opened = offer.open(self.engines, self.manifest, self._within(self._least_bytes))
        with closing(opened.backend):
            self._everything_streams = streamed_bytes(opened)
            self._advance()
            first = self._inputs(opened, 1)
            found, _ = outputs(opened, first, STRETCH)
            if failure := difference_failure("with the smallest slots", difference(self.results, found)):
                return failure
            self._advance()
            self.facts |= upload_rates(opened, first)
            self._advance()
            self.facts |= lane_facts(opened, first)
            self._advance()
            used, told = memory(opened), self._told()
        rate = self.facts.get("upload_bytes_per_second")
        late = time_failure(self.facts["ms_per_image"], self._streamed, rate)
        return memory_failure(used["peak_bytes"], used["budget_bytes"], told) or late

    def _roomier(self) -> str:
        """A plan where chunks stay, if that in force is the smallest, as where a card does not tell what is free."""
        given = self.limits.vram.budget_bytes is not None
        if given or self._streamed is None or self._streamed != self._everything_streams:
            return ""
        limits = self._within(self._least_bytes + ROOM_BYTES)
        opened = offer_of(self.backend).open(self.engines, self.manifest, limits)
        with closing(opened.backend):
            found, _ = outputs(opened, self._inputs(opened, 1), STRETCH)
        return difference_failure("with chunks that stay", difference(self.results, found))

    def _told(self) -> Told | None:
        """What others say that the card holds for this process, now that everything has run."""
        return growth(self._before, told_memory(software=self.software))

    def _within(self, budget_bytes: int) -> Limits:
        return replace(self.limits, vram=VramBudget(budget_bytes))

    def _errors(self, opened: Opened) -> dict[str, float]:
        """``graph -> error`` of the first step of each kind."""
        folder = (opened.engines or self.engines) / opened.running.build
        errors = {}
        for family, model in opened.running.models.items():
            firsts = {step.name for step in first_steps(model)}
            chunks = [chunk for chunk in model.chunks if any(step.name in firsts for step in chunk.steps)]
            for step, weights in stream(opened.backend.store(family), chunks):
                if step.name in firsts:
                    activation = seeded_activation(model.spec, step.graph, images=1)
                    given = opened.backend.engine(step.graph).run(opened.backend.value(activation), weights)
                    found = {name: opened.backend.array(value) for name, value in given.items()}
                    wanted = right_outputs(folder / model.pack, model, step, activation)
                    errors[step.graph] = worst_error(model.spec, activation, found, wanted)
                    self._advance()
        return errors

    def _company(self, opened: Opened, images: Mapping[Family, Array]) -> str:
        """In a batch every image must get what it gets alone; other bits within the tolerance cost it the batch."""
        together, _ = outputs(opened, images, STRETCH)
        apart = 0.0
        for index in {0, self.limits.images - 1}:
            one = {family: array[index : index + 1] for family, array in images.items()}
            alone = self.results if index == 0 else outputs(opened, one, STRETCH)[0]
            apart = max(apart, difference(alone, [array[index : index + 1] for array in together]))
        self._advance()
        self.facts["alone"] = 0 < apart <= self.facts["tolerance"]
        return "" if self.facts["alone"] else difference_failure(f"in a batch of {self.limits.images}", apart)

    def _inputs(self, opened: Opened, images: int) -> dict[Family, Array]:
        """What the first step of each model takes."""
        models = opened.running.models
        return {
            family: seeded_activation(model.spec, model.chunks[0].steps[0].graph, images)
            for family, model in models.items()
        }

    def _advance(self, phases: int = 1) -> None:
        self._done += phases
        self.tell(self._done, PHASES + sum(len(first_steps(model)) for model in self.manifest.models.values()))


def memory(opened: Opened) -> dict[str, int | None]:
    """What was in use at most, and what was allowed, as far as the backend counts it."""
    backend = opened.backend
    return {
        "peak_bytes": backend.peak_bytes if isinstance(backend, Counted) else None,
        "budget_bytes": backend.residency.budget_bytes if isinstance(backend, Planned) else None,
    }


def streamed_bytes(opened: Opened) -> int | None:
    """What a pass copies to the device; None for a backend that plans nothing."""
    return opened.backend.residency.streamed_bytes if isinstance(opened.backend, Planned) else None
