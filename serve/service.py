"""The service as one thing that starts and stops, whatever it is reached by."""

import logging
import time
from collections.abc import Callable
from pathlib import Path

from ..machine.progress import Report
from ..runtime.pipeline import Pipeline
from .jobbook import JobBook, ServedJob
from .metrics import Metrics
from .settings import ServeLimits, Sharing
from .spool import Spool
from .worker import Health, Worker

log = logging.getLogger(__name__)


class Service:
    """Jobs, the thread that does them, and what is counted.

    Args:
        jobs_dir: where jobs are kept; it is this service's alone.
        open_pipeline: opens the engines on ``auto`` or a named backend.
        backend: asked for first.
        limits: of everything.
        sharing: which requests go together.

    Raises:
        JobsFolderTaken, OutputUnwritable, DiskFull: the folder cannot be had.
    """

    def __init__(
        self,
        jobs_dir: Path,
        open_pipeline: Callable[[str, Report], Pipeline],
        *,
        backend: str,
        limits: ServeLimits,
        sharing: Sharing,
    ) -> None:
        self.limits = limits
        self.spool = Spool(jobs_dir)
        self.metrics = Metrics()
        self.book = JobBook(self.spool, limits, sharing, self._ended)
        self.on_end: Callable[[], None] = lambda: None
        """Called, in the worker's thread, when no more passes will be made."""
        self.worker = Worker(open_pipeline, backend, self.book, self.spool, self.metrics, self._no_more_passes)

    def start(self) -> None:
        """Begin to open the engines."""
        self.worker.start()

    @property
    def health(self) -> Health:
        """What the engines do."""
        return self.worker.health

    def stop(self, deadline: float) -> None:
        """Do what was accepted, until ``time.monotonic()`` is ``deadline``; then say that the rest is lost."""
        self.book.stop()
        while self.worker.is_alive() and self.book.open_jobs() and time.monotonic() < deadline:
            time.sleep(0.02)
        self.book.give_up()
        if self.worker.is_alive():
            self.worker.join(timeout=5.0)  # the pass that ran is dropped at its next step
        self.spool.close()

    def metrics_text(self) -> bytes:
        """For Prometheus."""
        return self.metrics.text(self.health, waiting=self.book.waiting(), open_requests=len(self.book.open_jobs()))

    def _no_more_passes(self) -> None:
        self.on_end()

    def _ended(self, job: ServedJob) -> None:
        if job.queued:  # it was accepted
            self.metrics.requests.labels(job.state).inc()
            if job.state == "done":
                self.metrics.seconds.observe(time.monotonic() - job.began)
