"""A batch on Ray: plan, pictures, resume and files stay in this process; passes go to the workers.

So nothing is lost with a worker, nothing is written twice, and no machine but this one needs the folders. Every worker
has two groups at most, one that it is at and the next: it never waits for a picture to be decoded here, and little has
to be dealt again when it dies.
"""

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from .. import __version__
from ..lora.lora import Origin
from ..machine.errors import OutputUnwritable
from ..runtime.jobs import BatchProgress, BatchResult, Job
from ..runtime.making import Form, Loaded, images_of, unfinished_groups, write_made
from .batch_worker import Made, Opened, Order, WorkerSettings
from .crew import LIVES, Crew, Member, answer, connected, first_ready
from .dealing import DEATHS, Dealer, Hand
from .errors import PictureFatal, WorkersLost
from .placing import plan_seats

log = logging.getLogger(__name__)
GROUPS_EACH = 2
TICK_SECONDS = 0.5
PATIENCE_TICKS = 40
"""Without a worker for so long, it is said what is waited for."""


@dataclass(frozen=True)
class WorkerShare:
    """Who made how much."""

    worker: int
    host: str
    backend: str
    loras: int


def run_on_ray(
    address: str | None,
    settings: WorkerSettings,
    jobs: Sequence[Job],
    form: Form,
    progress: BatchProgress,
    result: BatchResult,
) -> list[WorkerShare]:
    """Make the output of every job that is not finished yet, by the workers of a cluster.

    Args:
        address: of the cluster; None starts Ray here, for the time of the batch.
        settings: what each worker opens.
        jobs: as :func:`plan_jobs` planned them.
        form: of the LoRAs.
        progress: told how far all of them are.
        result: what is made is noted there at once, so it is known even if an error ends the batch.

    Raises:
        RayUnreachable, MachinesTooSmall: there is nobody to work.
        WorkersLost: nobody is left; every file that is there is whole.
        DiskFull: there is no room for a LoRA.
    """
    with connected(address) as machines:
        seats, why = plan_seats(machines, settings.options["backend"], settings.options["threads"])
        log.info("%d worker%s on %d machine%s: %s", len(seats), "s" * (len(seats) != 1), len(machines),
                 "s" * (len(machines) != 1), why)  # fmt: skip
        crew = Crew(seats, settings, form)
        try:
            return _Drive(crew, jobs, form, progress, result).run()
        finally:
            crew.dismiss()


class _Drive:
    """One batch under way."""

    def __init__(
        self, crew: Crew, jobs: Sequence[Job], form: Form, progress: BatchProgress, result: BatchResult
    ) -> None:
        self._crew = crew
        self._progress = progress
        self._origin: Origin | None = None
        self._result = result
        self._said: set[str] = set()
        self._shares: dict[tuple[int, str, str], int] = {}
        self._dealer = Dealer(unfinished_groups(jobs, self._known_origin, form, progress, self._result))

    def run(self) -> list[WorkerShare]:
        ticks = 0
        while True:
            dealt = self._deal()
            members = self._crew.members
            at_work = any(member.hands for member in members)
            if not dealt and not at_work and any(member.opened for member in members):
                return [WorkerShare(*who, loras) for who, loras in sorted(self._shares.items())]
            if not members:
                raise WorkersLost(self._crew.reasons)
            waited = {member.hands[0][0] if member.opened else member.opening: member
                      for member in members if member.hands or not member.opened}  # fmt: skip
            for ref in first_ready(list(waited), 0.0 if dealt else TICK_SECONDS):
                self._settle(waited[ref], ref)
            if at_work and not dealt:
                self._progress.under_way(self._crew.ask())
            ticks = 0 if any(member.opened for member in members) else ticks + 1
            if ticks == PATIENCE_TICKS:
                log.warning("no worker has started yet: the cluster's CPUs or GPUs are in use by others, or busy")

    def _deal(self) -> bool:
        """Give the next group to whoever has least to do; False if nobody is free or nothing is left."""
        free = [
            member
            for member in self._crew.members
            if member.opened and len(member.hands) < GROUPS_EACH and not any(hand.suspect for _, hand in member.hands)
        ]
        if not free or (hand := self._dealer.next()) is None:
            return False
        member = min(free, key=lambda each: len(each.hands))
        if hand.suspect and member.hands:
            self._dealer.give_back(hand)
            return False
        orders = [
            Order(loaded.job.output.name, tuple(np.asarray(s) for s in loaded.squares), dict(loaded.marks))
            for loaded in hand.jobs
        ]
        member.hands.append((member.actor.make.remote(orders), hand))
        return True

    def _settle(self, member: Member, ref: Any) -> None:
        """A worker has opened its engines, has made a group, or is gone."""
        got: Opened | Made | None = answer(ref)
        if got is None:
            self._died(member)
        elif isinstance(got, Opened):
            self._opened(member, got)
        elif got.problem:
            for _, hand in reversed(member.hands):
                self._dealer.give_back(hand)
            self._crew.retire(member, got.problem)
        else:
            self._take(member, got)

    def _opened(self, member: Member, opened: Opened) -> None:
        problem = opened.problem
        if opened.version != __version__:
            problem = f"it has i2l {opened.version}, and this is {__version__}: install the same version there"
        elif not problem and opened.origin != (self._origin or opened.origin):
            problem = "its engines are not those of the first worker: copy one engines directory to all machines"
        if problem:
            self._crew.retire(member, problem)
            return
        member.opened, self._origin = opened, opened.origin
        card = f", GPU {opened.cards}" if member.seat.gpus else ""
        reason = "" if opened.reason in self._said else f" ({opened.reason})"
        self._said.add(opened.reason)
        log.info("%s is ready: %s%s%s", member.name, opened.backend, card, reason)

    def _take(self, member: Member, made: Made) -> None:
        """Write what a worker has made."""
        _, hand = member.hands.popleft()
        member.share, member.asked, member.lives = 0.0, None, LIVES
        who = (member.number, member.seat.host, made.backend)
        for loaded, file in zip(hand.jobs, made.files, strict=True):
            output = loaded.job.output
            if isinstance(file, str):
                self._result.failed.append((output, file))
                continue
            try:
                write_made(file, output)
            except OutputUnwritable as error:
                self._result.failed.append((output, str(error)))
                continue
            self._result.written.append(output)
            self._shares[who] = self._shares.get(who, 0) + 1
        self._result.from_cache += made.from_cache
        self._progress.begin_pass(images_of(hand.jobs))
        self._progress.end_pass()

    def _died(self, member: Member) -> None:
        """What it was at is done again by others, with care; the rest as if nothing had been."""
        hands = [hand for _, hand in member.hands]
        for hand in reversed(hands[1:]):
            self._dealer.give_back(hand)
        for hand in hands[:1]:
            self._blame(hand, alone=len(hands) == 1)
        self._crew.replace(member)

    def _blame(self, hand: Hand[Loaded], *, alone: bool) -> None:
        lost = self._dealer.died_over(hand, alone=alone)
        if lost is not None:
            pictures = [path.name for path in lost.job.images]
            self._result.failed.append((lost.job.output, str(PictureFatal(pictures, DEATHS))))
            self._progress.leave_out(len(pictures))

    def _known_origin(self) -> Origin:
        assert self._origin is not None, "groups are asked for once a worker is open"
        return self._origin
