"""From a backend's name, or ``auto``, to where to compute; proves on the way what was not proven yet."""

import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from ... import __version__
from ...engines.backends import detect_backends, offer_of, working_backend
from ...engines.base import BackendStatus, CardFacts, Limits
from ...engines.directory.manifest import Manifest
from ...machine.wording import format_path
from .child import TimeLimits
from .choice import Candidate, Chosen, choose, proven_choice
from .judging import FormOutcome
from .proving import TIMING, Prover
from .records import Record, Records, Subject, card_of
from .sentences import verdict

log = logging.getLogger(__name__)


@dataclass
class Decider:
    """Chooses a backend for an engines directory.

    Args:
        engines: the directory, whose files were checked.
        manifest: its manifest.
        limits: what a backend may take; ``report`` is told of proofs, ``before_card`` asked before each.
        fallback: the folder for records where the directory cannot be written.
        time_limits: when a proof is taken for hung.
    """

    engines: Path
    manifest: Manifest
    limits: Limits
    fallback: Path
    time_limits: TimeLimits = field(default_factory=TimeLimits)
    _cpu: FormOutcome | None = None

    def __post_init__(self) -> None:
        self.records = Records(self.engines, self.manifest.build, self.fallback)
        self._prover = Prover(self.engines, self.limits, self.time_limits)

    def decide(self, backend: str, *, prove: bool) -> Chosen:
        """Where to compute.

        Args:
            backend: ``auto``, or a backend's name.
            prove: for ``auto``: let cards prove themselves that did not yet.

        Raises:
            BackendUnavailable: the named backend cannot run here.
        """
        if backend != "auto":
            return self._named(working_backend(backend))
        return choose(list(self._candidates(prove=prove)))

    def subject(self, status: BackendStatus) -> Subject | None:
        """What a proof of a backend would be of; None where it has no such card."""
        card = card_for(status, self.limits.device)
        return Subject(status.name, card, self.manifest.build, __version__) if card else None

    def prove(self, subject: Subject) -> Record:
        """Prove a backend now, and keep the record.

        Two proofs at once would spoil each other's times: who comes second waits, and takes what the first found.
        """
        waited = False

        def waiting() -> None:
            nonlocal waited
            waited = True
            log.info("another process proves a card: waiting for it")

        with self.records.turn(waiting, lambda: self.limits.report("waiting for another proof", 0, 1)):
            record = self.records.of(subject) if waited else None
            return record or self._prove(subject)

    def _prove(self, subject: Subject) -> Record:
        self._cpu = self._cpu or self._prover.cpu_time()
        self.limits.before_card(subject.card)
        record = self._prover.prove(subject, self._cpu)
        if record.lasting:
            self.records.keep(record)
        return record

    def _candidates(self, *, prove: bool) -> Iterator[Candidate]:
        for status in detect_backends():
            if status.name == TIMING:
                continue
            subject = self.subject(status) if status.works else None
            record = self.records.of(subject) if subject else None
            if subject and not record and prove and not subject.card.software:
                where = f"{status.name} on {subject.card.name}"
                log.info("%s was not proven with these engines: it proves itself now, once (--no-prove waits)", where)
                record = self.prove(subject)
                log.info("%s: %s, in %.0f s", where, verdict(record), record.seconds)
            yield Candidate(status, subject.card if subject else None, record)

    def _named(self, status: BackendStatus) -> Chosen:
        """A backend that was asked for runs; what is not known of it, or known against it, is said."""
        subject = self.subject(status)
        record = self.records.of(subject) if subject else None
        card = subject.card if subject else None
        if record and record.best:
            return proven_choice(record, "asked for")
        if subject:
            where = f"{status.name} on {subject.card.name}"
            how = f"i2l prove --engines {format_path(self.engines)} --backend {status.name}"
            if record and not record.refused:
                log.warning("%s failed its proof (%s): its LoRAs may be wrong", where, record.failure)
            else:
                log.warning("%s is not proven with these engines: %s shows whether it is right", where, how)
        return Chosen(status.name, "asked for", card=card)


def card_for(status: BackendStatus, device: str | None) -> CardFacts | None:
    """The card that a backend would take; None where there is no such one."""
    named = offer_of(status.name).card
    asked = named and (device is not None or len(status.cards) > 1)  # one card alone is no question
    return named(device) if named and asked else card_of(status.cards, device)


def to_prove(backend: str, device: str | None) -> tuple[list[BackendStatus], Sequence[str]]:
    """What ``i2l prove`` proves: the named backend, or all with a card; and why not the others.

    Raises:
        BackendUnavailable: the named backend cannot run here.
    """
    if backend != "auto":
        return [working_backend(backend)], []
    chosen, reasons = [], []
    for status in detect_backends():
        card = card_for(status, device) if status.works else None
        if not status.works:
            reasons.append(f"{status.name}: no ({status.reason}); {status.remedy}")
        elif card is None:
            if status.cards:  # the CPU has none
                reasons.append(f"{status.name}: it finds no such card")
        elif card.software:
            reasons.append(
                f"{status.name}: {card.name} is a renderer in software: prove it with --backend {status.name}"
            )
        else:
            chosen.append(status)
    return chosen, reasons
