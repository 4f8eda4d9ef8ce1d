"""Workers as Ray's actors: hired, watched, replaced when they die. The only file that knows Ray.

Ray reads its environment when it is imported: so it is imported once :func:`connected` has set that.
"""

import logging
import os
import socket
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeAlias

from ..machine.errors import PackageMissing
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
CONNECT_SECONDS = 10
TOKEN_FILE = Path("~/.ray/auth_token")
"""Where Ray keeps the token of the clusters that this user starts and joins."""
ASKING = "asking"
"""A thread of the worker beside the one that computes."""


@contextmanager
def connected(address: str | None) -> Iterator[list[Machine]]:
    """Ray's machines, at an address or started here, without its dashboard.

    Raises:
        PackageMissing: Ray is not installed.
        RayUnreachable: there is none.
    """
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # whether to report use is the user's to say, not a library's
    options: dict[str, Any] = {"log_to_driver": False, "logging_level": logging.ERROR}
    if address is None:
        options |= {"num_cpus": default_threads(), "include_dashboard": False}
    else:
        _require_somebody(address)
        if TOKEN_FILE.expanduser().exists() or {"RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH"} & os.environ.keys():
            os.environ.setdefault("RAY_AUTH_MODE", "token")  # 2.60 starts heads with a token, and sends none by itself
    try:
        import ray  # noqa: PLC0415 - see above
    except ModuleNotFoundError as error:
        raise PackageMissing("ray", "i2l batch --ray", "ray") from error
    try:
        ray.init(address=address or "local", **options)
    except (OSError, RuntimeError, ValueError, ray.exceptions.RayError) as error:
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


def _require_somebody(address: str) -> None:
    """Ray itself waits two minutes for a machine that does not answer, and says little."""
    host, colon, port = address.rpartition(":")
    if address == "auto":
        return
    if not (host and colon and port.isdecimal()) or "/" in host:
        raise RayUnreachable(address, "the address of a head is HOST:PORT, or auto on one of its machines")
    try:
        socket.create_connection((host.strip("[]"), int(port)), CONNECT_SECONDS).close()
    except (OSError, OverflowError) as error:
        raise RayUnreachable(address, getattr(error, "strerror", None) or str(error)) from error


@dataclass(eq=False)
class Member:
    """A worker, what it was given, and what came of it."""

    number: int
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
        return f"worker {self.number} on {self.seat.host}"


class Crew:
    """All workers of a batch.

    Args:
        seats: where they sit.
        settings: what they open.
        form: what they make.
    """

    def __init__(self, seats: Sequence[Seat], settings: WorkerSettings, form: Form) -> None:
        import ray  # noqa: PLC0415 - see above

        remote: Any = ray.remote  # its types know no groups
        self._actor_class = remote(concurrency_groups={ASKING: 1})(BatchWorker)
        self._told = (settings, form)
        self.members = [self._hire(number, seat) for number, seat in enumerate(seats, 1)]
        self.reasons: list[str] = []
        """Why those who are gone are."""

    def _hire(self, number: int, seat: Seat) -> Member:
        from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy  # noqa: PLC0415

        placed = NodeAffinitySchedulingStrategy(seat.node, soft=False)
        actor = self._actor_class.options(
            num_cpus=seat.cpus, num_gpus=seat.gpus, max_restarts=0, scheduling_strategy=placed
        ).remote(*self._told)
        return Member(number, seat, actor, actor.open.remote())

    def replace(self, member: Member) -> None:
        """Its process is gone: another takes its seat, unless that keeps happening."""
        self._end(member)
        if member.lives <= 1:
            self.reasons.append(f"{member.seat.host}: it died {LIVES} times in a row")
            log.warning("%s died %d times in a row: it is not started again", member.name, LIVES)
            return
        log.warning("%s died: its pictures are done again, and another takes its place", member.name)
        successor = self._hire(member.number, member.seat)
        successor.lives = member.lives - 1
        self.members.append(successor)

    def retire(self, member: Member, reason: str) -> None:
        """It can do nothing further."""
        self.reasons.append(f"{member.seat.host}: {reason}")
        log.warning("%s is left out: %s", member.name, reason)
        self._end(member)

    def dismiss(self) -> None:
        """End them all."""
        for member in list(self.members):
            self._end(member)

    def _end(self, member: Member) -> None:
        import ray  # noqa: PLC0415

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
            elif first_ready([member.asked], 0):
                member.share, member.asked = answer(member.asked) or 0.0, None
            done += member.share * sum(len(loaded.squares) for loaded in member.hands[0][1].jobs)
        return done


def answer(ref: Ref) -> Any:
    """What a worker answered; None if it, or its machine, is gone."""
    import ray  # noqa: PLC0415

    try:
        return ray.get(ref)
    except (ray.exceptions.RayActorError, ray.exceptions.ObjectLostError) as error:
        log.debug("lost: %s", error)
        return None


def first_ready(refs: Sequence[Ref], seconds: float) -> list[Ref]:
    """Those that are answered, waited for so long."""
    import ray  # noqa: PLC0415

    return list(ray.wait(list(refs), num_returns=1, timeout=seconds)[0]) if refs else []
