"""Which group a worker gets next, and what the death of a worker means for what it had. Pure.

A worker that dies takes nothing with it: what it was at, and what it was to do next, is dealt again. But a picture can
be what kills workers, and would then kill one after the other. So what a dead worker was at is dealt again job by job,
alone; a job that is alone with :data:`DEATHS` dying workers is given up, and only that one.

Of two groups that a worker had, nobody knows which it died over: it may have made the first, and what it said of that
be lost with it. So with a suspect it gets nothing else.
"""

from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Generic, TypeVar

T = TypeVar("T")
DEATHS = 2
"""Workers that may die over one job alone: the first death may have been somebody's kill -9, or memory."""


@dataclass(frozen=True)
class Hand(Generic[T]):
    """Jobs that share a pass."""

    jobs: tuple[T, ...]
    deaths: int = 0
    """Workers that died with this job alone."""
    suspect: bool = False
    """A worker may have died over it: the next one gets nothing beside it."""


class Dealer(Generic[T]):
    """Deals groups of jobs.

    Args:
        groups: asked for the next one only when somebody is free: reading pictures takes memory.
    """

    def __init__(self, groups: Iterator[Sequence[T]]) -> None:
        self._groups = groups
        self._again: deque[Hand[T]] = deque()

    def next(self) -> Hand[T] | None:
        """What to do next; None if everything is dealt."""
        if self._again:
            return self._again.popleft()
        group = next(self._groups, None)
        return None if group is None else Hand(tuple(group))

    def give_back(self, hand: Hand[T]) -> None:
        """Nobody began with it, or its worker was not fit for it: it keeps its place."""
        self._again.appendleft(hand)

    def died_over(self, hand: Hand[T], *, alone: bool) -> T | None:
        """A worker died that had this first, ``alone`` or others too; the job that is given up, if one is."""
        if len(hand.jobs) > 1 or not alone:
            self._again.extend(Hand((job,), hand.deaths, suspect=True) for job in hand.jobs)
            return None
        if hand.deaths + 1 >= DEATHS:
            return hand.jobs[0]
        self._again.append(Hand(hand.jobs, hand.deaths + 1, suspect=True))
        return None
