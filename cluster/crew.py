"""Workers as Ray's actors: hired, watched, replaced when they die. The only file that knows Ray, with its driver."""

import logging
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, TypeAlias

import ray
from ray.exceptions import ActorDiedError, ActorUnavailableError, ObjectLostError, RayActorError, RayError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from ..machine.threads import default_threads
from ..runtime.making import Form, Loaded
from .batch_worker import BatchWorker, Opened, WorkerSettings
from .dealing import Hand
from .errors import RayUnreachable
from .placing import Machine, Seat

log = logging.getLogger(__name__)
Ref: TypeAlias = Any
"""Ray's promise of a result."""
LIVES = 3
"""A seat whose workers die so often, without one group done between, gets no further one."""
LOST = (RayActorError, ActorDiedError, ActorUnavailableError, ObjectLostError)
"""What Ray raises for the results of a worker, or of a machine, that is gone."""
ASKING = "asking"
"""A thread of the worker beside the one that computes."""


@contextmanager
def connected(address: str | None) -> Iterator[list[Machine]]:
    """Ray's machines, at an address or started here: on loopback, without its dashboard.

    Raises:
        RayUnreachable: there is none.
    """
    options: dict[str, Any] = {"log_to_driver": False, "logging_level": logging.ERROR}
    if address is None:
        options |= {"num_cpus": default_threads(), "include_dashboard": False, "_node_ip_address": "127.0.0.1"}
    try:
        ray.init(address=address or "local", **options)
    except (OSError, RuntimeError, ValueError, RayError) as error:
        reason = next(iter(str(error).strip().splitlines()), type(error).__name__)
        raise RayUnreachable(address, reason) from error
    try:
        yield [
            Machine(
                node["NodeID"],
                node["NodeManagerHostname"],
                int(node["Resources"].get("CPU", 0)),
                int(node["Resources"].get("GPU", 0)),
            )
            for node in ray.nodes()
            if node["Alive"]
        ]
    finally:
        ray.shutdown()


@dataclass(eq=False)
class Member:
    """A worker, what it was given, and what came of it."""

    seat: Seat
    actor: Any
    opening: Ref
    opened: Opened | None = None
    hands: deque[tuple[Ref, Hand[Loaded]]] = field(default_factory=deque)
    """What it was given and has not answered; it is at the first."""
    share: float = 0.0
    """Of the first, as it said lately."""
    asked: Ref | None = None
    lives: int = LIVES

    @property
    def name(self) -> str:
        """For people."""
        return f"the worker on {self.seat.host}"


class Crew:
    """All workers of a batch.

    Args:
        seats: where they sit.
        settings: what they open.
        form: what they make.
    """

    def __init__(self, seats: Sequence[Seat], settings: WorkerSettings, form: Form) -> None:
        self._actor_class = ray.remote(concurrency_groups={ASKING: 1})(BatchWorker)
        self._told = (settings, form)
        self.members = [self._hire(seat) for seat in seats]
        self.reasons: list[str] = []
        """Why those who are gone are."""

    def _hire(self, seat: Seat) -> Member:
        placed = NodeAffinitySchedulingStrategy(seat.node, soft=False)
        actor = self._actor_class.options(
            num_cpus=seat.cpus, num_gpus=seat.gpus, max_restarts=0, scheduling_strategy=placed
        ).remote(*self._told)
        return Member(seat, actor, actor.open.remote())

    def replace(self, member: Member) -> None:
        """Its process is gone: another takes its seat, unless that keeps happening."""
        self._end(member)
        if member.lives <= 1:
            self.reasons.append(f"{member.name} died {LIVES} times in a row")
            log.warning("%s died %d times in a row: it is not started again", member.name, LIVES)
            return
        log.warning("%s died: its pictures are done again, and another takes its place", member.name)
        successor = self._hire(member.seat)
        successor.lives = member.lives - 1
        self.members.append(successor)

    def retire(self, member: Member, reason: str) -> None:
        """It can do nothing further."""
        self.reasons.append(f"{member.name}: {reason}")
        log.warning("%s is left out: %s", member.name, reason)
        self._end(member)

    def dismiss(self) -> None:
        """End them all."""
        for member in list(self.members):
            self._end(member)

    def _end(self, member: Member) -> None:
        self.members.remove(member)
        ray.kill(member.actor)

    def ask(self) -> float:
        """How many images' worth of unanswered work is done, as far as workers said."""
        done = 0.0
        for member in self.members:
            if not member.hands:
                continue
            if member.asked is None:
                member.asked = member.actor.share.options(concurrency_group=ASKING).remote()
            elif ray.wait([member.asked], timeout=0)[0]:
                try:
                    member.share = ray.get(member.asked)
                except LOST:  # whoever waits for its result finds out too
                    member.share = 0.0
                member.asked = None
            done += member.share * sum(len(loaded.squares) for loaded in member.hands[0][1].jobs)
        return done


def answer(ref: Ref) -> Any:
    """What a worker answered; None if it is gone."""
    try:
        return ray.get(ref)
    except LOST as error:
        log.debug("lost: %s", error)
        return None


def first_ready(refs: Sequence[Ref], seconds: float) -> list[Ref]:
    """Those that are answered, waited for so long."""
    return list(ray.wait(list(refs), num_returns=1, timeout=seconds)[0]) if refs else []
