"""The one thread that owns the pipeline: it opens it, makes the passes that the book hands out, and closes it.

A pipeline is not for several threads at once, and two passes at once would only halve each other's share of the memory
bus. So requests meet in the book, and this thread takes them from there in groups. A pass that nobody waits for any
more is dropped at its next step: the report that the pipeline calls before every step raises :class:`PassAbandoned`.
"""

import logging
import secrets
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from time import monotonic
from typing import Protocol

import numpy as np

from ..engines.errors import DeviceFailed
from ..lora.lowrank import reduce_lora
from ..machine.errors import I2LError
from ..machine.files import explained_os_errors
from ..machine.progress import Report
from ..runtime.passes import ENCODERS, IMAGES_PER_PASS
from ..runtime.pipeline import Pipeline
from .errors import InternalFailure, ServiceNotReady
from .jobbook import JobBook, ServedJob
from .spool import Spool, kept_squares

log = logging.getLogger(__name__)


class PassAbandoned(Exception):
    """Nobody waits for the pass."""


class Watcher(Protocol):
    """Told what passes did: the metrics."""

    def passed(self, pictures: int, from_cache: int, seconds: dict[str, float]) -> None: ...


@dataclass(frozen=True)
class Health:
    """What the engines do, for ``/readyz`` and the metrics."""

    ready: bool
    backend: str
    reason: str
    fallen_back: bool
    """The CPU took over from a card."""
    vram: dict[str, int] | None = None


class Worker(threading.Thread):
    """Opens and runs a pipeline until the book is empty and stopping.

    Args:
        open_pipeline: opens the engines on a backend, ``auto`` or a name, with a report.
        backend: asked for first.
        book: where requests wait.
        spool: where LoRAs go.
        watcher: told what each pass did.
        on_end: called when the thread ends, whatever the reason.
    """

    def __init__(
        self,
        open_pipeline: Callable[[str, Report], Pipeline],
        backend: str,
        book: JobBook,
        spool: Spool,
        watcher: Watcher,
        on_end: Callable[[], None],
    ) -> None:
        super().__init__(name="i2l passes", daemon=True)
        self._open_pipeline = open_pipeline
        self._backend = backend
        self._book = book
        self._spool = spool
        self._watcher = watcher
        self._on_end = on_end
        self._group: Sequence[ServedJob] = ()
        self._pieces = self._piece = 0
        self.failure: I2LError | None = None
        """Why the engines could not be opened, or can no longer be used."""
        self.health = Health(ready=False, backend="", reason="opening the engines", fallen_back=False)

    def run(self) -> None:
        try:
            pipeline = self._open(self._backend, fallen_back=False)
        except I2LError as error:
            self._fail(error)
            return
        try:
            while group := self._book.take():
                pipeline = self._answer(pipeline, group)
        except I2LError as error:  # the card failed, and the CPU could not take over or was not to
            self._fail(error)
        finally:
            pipeline.close()
            if self.failure is None:
                self.health = Health(False, self.health.backend, "the service has stopped", self.health.fallen_back)
            self._on_end()

    def _open(self, backend: str, *, fallen_back: bool, reason: str = "") -> Pipeline:
        pipeline = self._open_pipeline(backend, self._report)
        self.health = Health(True, pipeline.backend_name, reason or pipeline.backend_reason, fallen_back, pipeline.vram)
        return pipeline

    def _fail(self, error: I2LError) -> None:
        self.failure = error
        self.health = Health(False, self.health.backend, str(error), self.health.fallen_back)
        log.error("%s", error)
        self._book.stop()
        for job in self._book.open_jobs():
            self._book.end(job, "failed", ServiceNotReady(str(error)))
        self._on_end()

    def _answer(self, pipeline: Pipeline, group: Sequence[ServedJob]) -> Pipeline:
        """One pass; the pipeline to go on with."""
        self._group = group
        try:
            self._make(pipeline, group)
        except PassAbandoned:
            pass
        except DeviceFailed as error:
            if self._backend != "auto" or pipeline.backend_name == "cpu":
                self._end_all(group, error)
                raise
            log.warning("%s: going on with the CPU", error)
            failed = pipeline.backend_name
            pipeline.close()
            pipeline = self._open("cpu", fallen_back=True, reason=f"{failed} failed: {error}")
            return self._answer(pipeline, group)
        except I2LError as error:
            self._end_all(group, error)
        except Exception:  # a thread that ended in silence would leave everybody waiting
            reference = secrets.token_hex(4)
            log.exception("%s: a pass failed", reference)
            self._end_all(group, InternalFailure(reference))
        self._look(pipeline)
        return pipeline

    def _look(self, pipeline: Pipeline) -> None:
        """The CPU may have taken over inside the pipeline, when a card's memory ran out."""
        before = self.health
        if pipeline.backend_name != before.backend:
            self.health = Health(True, pipeline.backend_name, pipeline.backend_reason, fallen_back=True)
        elif before.vram is not None:
            self.health = Health(True, before.backend, before.reason, before.fallen_back, pipeline.vram)

    def _make(self, pipeline: Pipeline, group: Sequence[ServedJob]) -> None:
        """Embed the group's pictures, run the adapter once for all, write each LoRA."""
        began, before = monotonic(), dict(pipeline.timings.seconds)
        loaded = []
        for job in group:
            with explained_os_errors(job.folder):
                try:
                    loaded.append((job, kept_squares(job.folder, job.pictures)))
                except FileNotFoundError:
                    if self._book.progress([job], 0.0):  # still wanted: then its files should be there
                        raise
        squares = [square for _, own in loaded for square in own]
        starts = range(0, len(squares), IMAGES_PER_PASS)
        self._pieces = len(starts)
        embeddings, known = [], []
        for self._piece, start in enumerate(starts):
            self._require_wanted(0.0)
            embeddings.append(pipeline.embed(squares[start : start + IMAGES_PER_PASS]))
            known += pipeline.from_cache
        self._require_wanted(0.0)
        factors = pipeline.factors(np.concatenate(embeddings))
        seconds = {
            stage: round(value - before.get(stage, 0.0), 4)
            for stage, value in pipeline.timings.seconds.items()
            if value > before.get(stage, 0.0)
        }
        self._book.seconds_per_picture = (monotonic() - began) / len(squares)
        self._watcher.passed(len(squares), sum(known), seconds)
        start = 0
        for job, own in loaded:
            stop = start + len(own)
            part = {module: (a[start:stop], b[start:stop]) for module, (a, b) in factors.items()}
            job.seconds, job.from_cache = seconds, known[start:stop]
            start = stop
            if not self._book.progress([job], 0.98):
                continue
            lora = pipeline.lora_from_factors(part, strength=job.wish.strength, weights=job.wish.weights)
            lora.metadata |= job.marks
            try:
                if job.wish.rank is not None:
                    lora, _ = reduce_lora(lora, job.wish.rank)
                path = lora.save(
                    self._spool.lora(job.id, job.wish.name), dtype=job.wish.dtype, key_format=job.wish.key_format
                )
            except I2LError as error:
                self._book.end(job, "failed", error)
                continue
            job.facts = {"rank": lora.rank, "tensors": 2 * len(lora.factors), "bytes": path.stat().st_size}
            self._book.end(job, "done")

    def _end_all(self, group: Sequence[ServedJob], error: I2LError) -> None:
        for job in group:
            self._book.end(job, "failed", error)

    def _require_wanted(self, share: float) -> None:
        if not self._book.progress(self._group, share):
            raise PassAbandoned

    def _report(self, stage: str, done: int, total: int) -> None:
        """The pipeline's :class:`Report`: each encoder is nearly half of a piece, the adapter the last twentieth."""
        if stage in ENCODERS:
            part = (ENCODERS.index(stage) + done / max(total, 1)) / len(ENCODERS)
            self._require_wanted(0.95 * (self._piece + part) / max(self._pieces, 1))
        elif stage == "adapter":
            self._require_wanted(0.95 + 0.03 * done / max(total, 1))
