"""Records: what proofs came to, kept beside the engines and read back only for exactly what they were made of.

    engines/
      proofs.json      one record for each backend and card, of the build that the manifest names

Where that cannot be written, the file lies in the user's cache folder under the build's name. A record that does not
parse, or that is of another driver, library, build or i2l, is as good as none: the card then proves itself anew.
"""

import json
import logging
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from ...engines.base import CardFacts
from ...engines.directory.manifest import PROOFS
from ...engines.directory.typed_facts import typed
from ...machine.errors import I2LError
from ...machine.files import atomic_path, read_small, remove_leftovers
from ...machine.locks import exclusive
from ...machine.wording import format_path
from .judging import FormOutcome

log = logging.getLogger(__name__)
LOCK = "lock"
FORMAT = 3
"""Raised whenever a proof checks something else, or a record says something else."""


@dataclass(frozen=True)
class Subject:
    """What a record holds for: all of it must be as it was."""

    backend: str
    card: CardFacts
    build: str
    """The build folder, whose name no other build has."""
    version: str
    """Of i2l."""


@dataclass(frozen=True)
class Record:
    """What a card has shown."""

    subject: Subject
    forms: tuple[FormOutcome, ...]
    """Each on its own, as a crash ends a process."""
    cpu_ms_per_image: float | None
    """None where it could not be timed."""
    cpu_estimated: bool
    seconds: float
    """The proof took, the CPU's time included."""
    made: str
    """UTC, ISO 8601."""

    @property
    def best(self) -> FormOutcome | None:
        """The fastest form that is right."""
        passed = [outcome for outcome in self.forms if outcome.passed]
        return min(passed, key=lambda outcome: outcome.ms_per_image or 0.0, default=None)

    @property
    def failure(self) -> str:
        """Why no form is right; empty if one is."""
        if self.best:
            return ""
        reasons = {f"{_named(outcome.form)}{outcome.failure or outcome.refusal}" for outcome in self.forms}
        return "; ".join(sorted(reasons))

    @property
    def refused(self) -> bool:
        """No form could begin: nothing was shown against the card."""
        return bool(self.forms) and all(outcome.refusal for outcome in self.forms)

    @property
    def lasting(self) -> bool:
        """Whether another proof would come to the same, so that it is worth keeping."""
        return all(outcome.lasting for outcome in self.forms)


def card_of(cards: Sequence[CardFacts], device: str | None) -> CardFacts | None:
    """The card that a backend would take; None where there is no such one."""
    if device is None:
        return next(iter(cards), None)
    if device.isdecimal():
        return cards[int(device)] if int(device) < len(cards) else None
    return next((card for card in cards if device.casefold() in card.name.casefold()), None)


class Records:
    """The records of an engines directory.

    Args:
        engines: the directory.
        build: its build; records of others are not read.
        fallback: a folder to write to where the directory cannot be written.
    """

    def __init__(self, engines: Path, build: str, fallback: Path) -> None:
        self._build = build
        self._paths = (engines / PROOFS, fallback / f"{build}.json")
        self._lock = fallback / LOCK

    @contextmanager
    def turn(self, waiting: Callable[[], None], meanwhile: Callable[[], None]) -> Iterator[None]:
        """One proof of this user at a time, whatever the engines; where no lock can be made, that is said.

        Args:
            waiting: called once if another one runs.
            meanwhile: called while waiting; what it raises ends that.
        """
        with ExitStack() as stack:
            try:
                self._lock.parent.mkdir(parents=True, exist_ok=True)
                stack.enter_context(exclusive(self._lock, waiting=waiting, meanwhile=meanwhile))
            except OSError as error:
                reason = os.strerror(error.errno or 0)
                log.warning("%s: %s: another proof at the same time would spoil its times", self._lock, reason)
            yield

    def read(self) -> list[Record]:
        """All records of the build."""
        kept: dict[tuple[str, str], Record] = {}
        for path in reversed(self._paths):  # the ones beside the engines count
            kept |= {(record.subject.backend, record.subject.card.name): record for record in _read(path)}
        return [record for record in kept.values() if record.subject.build == self._build]

    def of(self, subject: Subject) -> Record | None:
        """The record of exactly this."""
        return next((record for record in self.read() if record.subject == subject), None)

    def keep(self, record: Record) -> Path | None:
        """Write a record in place of the one of the same backend and card; where to, or None if nowhere."""
        same = (record.subject.backend, record.subject.card.name)
        others = [kept for kept in self.read() if (kept.subject.backend, kept.subject.card.name) != same]
        reasons = []
        for path in self._paths:
            remove_leftovers(path.parent)
            try:
                with atomic_path(path) as temporary:
                    temporary.write_text(records_to_json([*others, record]), encoding="utf-8")
            except I2LError as error:
                reasons.append(str(error))
                continue
            if reasons:
                log.info("%s: the proof is kept in %s", reasons[0].partition(":")[0], format_path(path))
            return path
        log.warning("the proof is not kept: %s", reasons[-1])
        return None


def records_to_json(records: Iterable[Record]) -> str:
    """The text of ``proofs.json``."""
    return json.dumps({"format": FORMAT, "records": [asdict(record) for record in records]}, indent=1)


def records_from_json(text: str | bytes) -> list[Record]:
    """What :func:`records_to_json` wrote.

    Raises:
        ValueError, KeyError, TypeError, AttributeError: it does not parse, or a value is of another kind.
    """
    values = json.loads(text)
    if values["format"] != FORMAT:
        return []
    return [_record(row) for row in values["records"]]


def outcome_from_dict(row: Mapping[str, Any]) -> FormOutcome:
    """An outcome that went through JSON."""
    return FormOutcome(**row)


def _record(row: Mapping[str, Any]) -> Record:
    subject = {**row["subject"], "card": typed(CardFacts(**row["subject"]["card"]))}
    forms = tuple(typed(outcome_from_dict(outcome)) for outcome in row["forms"])
    record = Record(**{**row, "subject": typed(Subject(**subject)), "forms": forms})
    if any(outcome.passed and outcome.ms_per_image is None for outcome in forms):
        raise ValueError("a form is right and has no time")
    return typed(record)


def _read(path: Path) -> list[Record]:
    try:
        return records_from_json(read_small(path))
    except FileNotFoundError:
        return []
    except OSError as error:
        reason = error.strerror or str(error)
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        reason = "it does not parse"
    log.warning("%s cannot be used (%s): cards prove themselves anew", format_path(path), reason)
    return []


def _named(form: str | None) -> str:
    return f"{form}: " if form else ""
