"""Which backend ``auto`` takes: pure, from what there is and what was proven.

The fastest that is right, and faster than the CPU. A card is never taken on trust, and a renderer in software never by
itself, as it is the CPU with a detour.
"""

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from ...engines.base import BackendStatus, CardFacts
from .records import Record


@dataclass(frozen=True)
class Candidate:
    """A backend, the card that it would take, and what is known of that."""

    status: BackendStatus
    card: CardFacts | None
    record: Record | None = None
    """Of exactly this card, driver, libraries and build."""


@dataclass(frozen=True)
class Chosen:
    """Where to compute."""

    name: str
    reason: str
    form: str | None = None
    """Of the backend's graphs; None takes its first."""
    card: CardFacts | None = None
    """None for the CPU."""
    alone: bool = False
    """Pictures do not share a pass there, as a bit would differ."""

    @property
    def computes(self) -> str:
        """What may make a difference to a bit: another card, driver or form is another."""
        if self.card is None:
            return self.name
        libraries = sorted(self.card.libraries.items())
        return json.dumps([self.name, self.form, self.card.name, self.card.driver, libraries])


def choose(candidates: Iterable[Candidate]) -> Chosen:
    """The fastest backend that is proven, or the CPU; with the reason, and why the others were passed over."""
    passed: dict[str, str] = {}
    right: dict[str, Record] = {}
    for candidate in candidates:
        if reason := passed_over(candidate):
            passed[candidate.status.name] = reason
        elif candidate.record:
            right[candidate.status.name] = candidate.record
    if not right:
        return Chosen("cpu", f"auto: the best that works here{_others(passed)}")
    times = {name: ms_per_image(record) for name, record in right.items()}
    name = min(times, key=lambda name: times[name])
    passed |= {other: f"proven, {ms:.0f} ms an image" for other, ms in times.items() if other != name}
    record = right[name]
    cpu = "" if record.cpu_ms_per_image is None else f", the CPU {record.cpu_ms_per_image:.0f}"
    proven = f"proven on {record.subject.card.name}, {times[name]:.0f} ms an image{cpu}"
    return proven_choice(record, f"auto: {proven}{_others(passed)}")


def proven_choice(record: Record, reason: str) -> Chosen:
    """A backend as its proof says that it is right."""
    assert record.best is not None
    return Chosen(record.subject.backend, reason, record.best.form, record.subject.card, record.best.alone)


def passed_over(candidate: Candidate) -> str:
    """Why ``auto`` does not take a backend; empty if it may."""
    status, card = candidate.status, candidate.card
    if not status.works:
        return status.reason
    if card is None:
        return f"{status.reason}; it finds no such card"
    if card.software:
        return f"{card.name} is a renderer in software: only by name"
    return _shown(card, candidate.record)


def _shown(card: CardFacts, record: Record | None) -> str:
    """What speaks against a card; empty if nothing does."""
    if record is None:
        return f"{card.name} is not proven: i2l prove does it"
    if record.best is None:
        what = "could not be proven" if record.refused else "failed its proof"
        return f"{card.name} {what}: {record.failure}"
    ms, cpu = ms_per_image(record), record.cpu_ms_per_image
    if cpu is not None and ms >= cpu:
        return f"{card.name} is right, but takes {ms:.0f} ms an image, the CPU {cpu:.0f}"
    return ""


def ms_per_image(record: Record) -> float:
    """Of the fastest form that is right."""
    assert record.best is not None
    return record.best.ms_per_image or 0.0


def _others(passed: Mapping[str, str]) -> str:
    return f" ({'; '.join(f'{name}: {reason}' for name, reason in passed.items())})" if passed else ""
