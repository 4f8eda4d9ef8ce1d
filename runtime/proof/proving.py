"""A proof from beginning to end: every form of a backend's graphs, the CPU's time, and the record of it."""

import time
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from pathlib import Path

from ...engines.backends import offer_of
from ...engines.base import Limits
from .child import Task, TimeLimits, run_task
from .judging import FormOutcome
from .records import Record, Subject
from .trial import Tell

TIMING = "cpu"
"""What cards are held against."""


@dataclass(frozen=True)
class Prover:
    """Proves backends over one engines directory.

    Args:
        engines: the directory, whose files were checked.
        limits: what a backend may take; ``report`` is told the progress and may interrupt by raising.
        time_limits: when a proof is taken for hung.
    """

    engines: Path
    limits: Limits
    time_limits: TimeLimits = field(default_factory=TimeLimits)

    def prove(self, subject: Subject, cpu: FormOutcome | None) -> Record:
        """The record of a backend.

        Args:
            subject: what is proven.
            cpu: the time of the CPU, from :meth:`cpu_time`.
        """
        start = time.monotonic()
        forms: Sequence[str | None] = offer_of(subject.backend).forms or (None,)
        outcomes = tuple(self._form(subject, form) for form in forms)
        return Record(
            subject=subject,
            forms=outcomes,
            cpu_ms_per_image=cpu.ms_per_image if cpu else None,
            cpu_estimated=bool(cpu and cpu.estimated),
            seconds=time.monotonic() - start + (cpu.seconds if cpu else 0.0),
            made=datetime.now(UTC).isoformat(timespec="seconds"),
        )

    def cpu_time(self) -> FormOutcome:
        """How long the CPU takes for an image."""
        task = Task(self.engines, TIMING, replace(self.limits, device=None, form=None), time_only=True)
        return run_task(task, self._tell("timing the CPU"), self.time_limits)

    def _form(self, subject: Subject, form: str | None) -> FormOutcome:
        backend = subject.backend
        task = Task(self.engines, backend, replace(self.limits, form=form), software=subject.card.software)
        return run_task(task, self._tell(f"proving {backend}{f' ({form})' if form else ''}"), self.time_limits)

    def _tell(self, stage: str) -> Tell:
        return lambda done, total: self.limits.report(stage, done, total)
