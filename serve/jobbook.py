"""The book of jobs: what is waiting, what runs, and how each ended, exactly once.

One lock guards it. Requests come from the event loop's thread, passes from the worker's; each end is told to whoever
listens, after the lock was let go. A job goes through its states in one direction only::

    reading -> waiting -> running -> done | failed
    and from each of the first three   -> cancelled | failed | lost
"""

import logging
import secrets
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, TypeAlias

from ..machine.errors import I2LError
from .errors import JobLost, JobUnknown, QueueFull, RequestTimedOut, ServiceStopping
from .grouping import leading, retry_seconds, seconds_to_wait
from .settings import ServeLimits, Sharing
from .spool import Record, Spool, forget_pictures
from .wishes import Wish

log = logging.getLogger(__name__)
State: TypeAlias = Literal["reading", "waiting", "running", "done", "failed", "cancelled", "lost"]
OPEN: tuple[State, ...] = ("reading", "waiting", "running")
MAX_KEPT = 1000
"""Finished jobs that are remembered; the oldest go first."""


@dataclass(eq=False)
class ServedJob:
    """One request for a LoRA. Whoever changes it holds the book's lock."""

    id: str
    folder: Path
    began: float
    """``time.monotonic()`` of its first byte."""
    wish: Wish = field(default_factory=Wish)
    pictures: int = 0
    marks: dict[str, str] = field(default_factory=dict)
    """The header entries that name its pictures."""
    state: State = "reading"
    queued: float = 0.0
    """``time.monotonic()`` when it was accepted."""
    progress: float = 0.0
    """0 to 1."""
    seconds: dict[str, float] = field(default_factory=dict)
    """Per stage of the pass that it was in."""
    from_cache: list[bool] = field(default_factory=list)
    shared_with: int = 0
    """Other requests in its pass."""
    facts: dict[str, Any] = field(default_factory=dict)
    """Of the LoRA: rank, tensors, bytes."""
    error: I2LError | None = None
    ended_at: float = 0.0
    """Seconds since 1970."""
    listeners: list[Callable[[], None]] = field(default_factory=list)

    @property
    def is_open(self) -> bool:
        return self.state in OPEN


class JobBook:
    """Every job of a service.

    Args:
        spool: the jobs' folder; what it remembers is in the book.
        limits: of requests and times.
        sharing: which requests go together.
        ended: told every job that ends.
    """

    def __init__(
        self, spool: Spool, limits: ServeLimits, sharing: Sharing, ended: Callable[[ServedJob], None] = lambda _: None
    ) -> None:
        self._spool = spool
        self._limits = limits
        self._sharing = sharing
        self._ended = ended
        self._changed = threading.Condition()
        self._jobs: OrderedDict[str, ServedJob] = OrderedDict()
        self._open = 0
        self.stopping = False
        self.seconds_per_picture = 1.0
        """Lately; for telling when to try again."""
        for record in spool.recover():
            self._jobs[record.id] = _remembered(record, spool)

    # --- from requests ---

    def begin(self) -> ServedJob:
        """Room for one more request.

        Raises:
            ServiceStopping, QueueFull: there is none.
            DiskFull, OutputUnwritable: its folder cannot be made.
        """
        with self._changed:
            if self.stopping:
                raise ServiceStopping
            if self._open >= self._limits.requests:
                ahead = sum(max(job.pictures, 1) for job in self._jobs.values() if job.is_open)
                raise QueueFull(self._open, retry_seconds(ahead, self.seconds_per_picture))
            job_id = secrets.token_hex(16)
            job = ServedJob(job_id, self._spool.make(job_id), time.monotonic())
            self._jobs[job_id] = job
            self._open += 1
            return job

    def accept(self, job: ServedJob) -> None:
        """The request is whole and its pictures are read: remember it, also beyond this process, and queue it.

        Raises:
            ServiceStopping: it came too late. JobUnknown: it has ended meanwhile.
            DiskFull, OutputUnwritable: it cannot be remembered.
        """
        self._spool.write(Record(job.id, job.wish.name, "accepted", time.time()))
        with self._changed:
            if self.stopping:
                raise ServiceStopping
            if job.state != "reading":
                raise job.error or JobUnknown
            job.state, job.queued = "waiting", time.monotonic()
            self._changed.notify_all()

    def get(self, job_id: str) -> ServedJob:
        """A job; raises :class:`JobUnknown`."""
        with self._changed:
            if job_id not in self._jobs:
                raise JobUnknown
            return self._jobs[job_id]

    def cancel(self, job: ServedJob) -> None:
        """Nobody waits for it any more; nothing happens if it has ended."""
        self.end(job, "cancelled")

    def forget(self, job: ServedJob) -> None:
        """It has ended and was fetched, or was never accepted."""
        with self._changed:
            self._jobs.pop(job.id, None)
        self._spool.remove(job.id)

    def listen(self, job: ServedJob, listener: Callable[[], None]) -> None:
        """Have ``listener`` called, in any thread, once the job has ended; at once if it has."""
        with self._changed:
            if job.is_open:
                job.listeners.append(listener)
                return
        listener()

    # --- from the worker ---

    def take(self) -> list[ServedJob]:
        """The requests of the next pass, waited for; none once the service is stopping and nothing is left."""
        with self._changed:
            while True:
                waiting = [job for job in self._jobs.values() if job.state == "waiting"]
                if not waiting:
                    if self.stopping:
                        return []
                    self._changed.wait()
                    continue
                waiting.sort(key=lambda job: job.queued)
                pictures = [job.pictures for job in waiting]
                pause = seconds_to_wait(pictures, time.monotonic() - waiting[0].queued, self._sharing)
                if pause > 0 and not self.stopping:
                    self._changed.wait(pause)
                    continue
                group = waiting[: leading(pictures, self._sharing.pictures)]
                for job in group:
                    job.state, job.shared_with = "running", len(group) - 1
                return group

    def progress(self, group: Iterable[ServedJob], share: float) -> bool:
        """A pass has come so far; False if nobody waits for it any more."""
        with self._changed:
            wanted = [job for job in group if job.state == "running"]
            for job in wanted:
                job.progress = max(job.progress, min(share, 1.0))
            return bool(wanted)

    def end(self, job: ServedJob, state: State, error: I2LError | None = None) -> bool:
        """How it ended; False, and nothing changes, if it has ended already."""
        with self._changed:
            if not job.is_open:
                return False
            accepted = job.state != "reading"
            job.state, job.error, job.ended_at = state, error, time.time()
            if state == "done":
                job.progress = 1.0
            self._open -= 1
            listeners, job.listeners = job.listeners, []
            self._changed.notify_all()
        if accepted:
            self._remember(job)
        forget_pictures(job.folder)
        self._ended(job)
        for listener in listeners:
            listener()
        return True

    # --- from the clock ---

    def expire(self) -> None:
        """End what takes too long, forget what was kept long enough."""
        now = time.monotonic()
        with self._changed:
            began = now - self._limits.request_seconds
            late = [job for job in self._jobs.values() if job.is_open and job.began < began]
            ended = [job for job in self._jobs.values() if not job.is_open]
            oldest = time.time() - self._limits.keep_seconds
            old = [job for job in ended if job.ended_at < oldest]
            old += [job for job in ended if job not in old][: max(0, len(ended) - len(old) - MAX_KEPT)]
        for job in late:
            self.end(job, "failed", RequestTimedOut(self._limits.request_seconds))
        for job in old:
            self.forget(job)

    def stop(self) -> None:
        """Take no more; what was accepted is still done."""
        with self._changed:
            self.stopping = True
            self._changed.notify_all()

    def give_up(self) -> None:
        """The time for stopping is over: what is still open is lost, and known to be."""
        for job in self.open_jobs():
            self.end(job, "lost", ServiceStopping())

    def open_jobs(self) -> Sequence[ServedJob]:
        """Those that have not ended."""
        with self._changed:
            return [job for job in self._jobs.values() if job.is_open]

    def waiting(self) -> int:
        """How many requests wait for a pass."""
        with self._changed:
            return sum(job.state == "waiting" for job in self._jobs.values())

    def _remember(self, job: ServedJob) -> None:
        facts = {"pictures": job.pictures, "seconds": job.seconds, "from_cache": job.from_cache, "lora": job.facts}
        if job.error:
            facts["error"] = str(job.error)
        try:
            self._spool.write(Record(job.id, job.wish.name, job.state, job.ended_at, facts))
        except I2LError as error:  # what became of it is known until this process ends; then it counts as lost
            log.warning("job %s: %s", job.id, error)


def _remembered(record: Record, spool: Spool) -> ServedJob:
    """A job of an earlier service."""
    job = ServedJob(record.id, spool.folder / record.id, time.monotonic(), Wish(name=record.name))
    job.state, job.ended_at = _state(record.state), record.at
    job.pictures = int(record.facts.get("pictures", 0))
    job.seconds = dict(record.facts.get("seconds", {}))
    job.from_cache = list(record.facts.get("from_cache", []))
    job.facts = dict(record.facts.get("lora", {}))
    job.progress = float(job.state == "done")
    if job.state == "lost":
        job.error = JobLost()
    elif "error" in record.facts:
        job.error = I2LError(record.facts["error"])
    return job


def _state(text: str) -> State:
    for state in ("done", "failed", "cancelled"):
        if state == text:
            return state
    return "lost"
