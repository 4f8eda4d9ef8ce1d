"""Where workers sit, and who gets what when some of them die: decided without Ray."""

from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from i2l.cluster.dealing import DEATHS, Dealer
from i2l.cluster.placing import Machine, Seat, plan_seats
from i2l.errors import MachinesTooSmall

BOX, EDGE = Machine("a", "box", 16, 2), Machine("b", "edge", 4, 0)


def seats(*numbers: tuple[Machine, int, int]) -> list[Seat]:
    return [Seat(machine.node, machine.host, cpus, gpus) for machine, cpus, gpus in numbers]


@pytest.mark.parametrize(
    ("machines", "backend", "threads", "wanted", "why"),
    [
        ([EDGE], "auto", 1, [(EDGE, 1, 0)] * 4, "for each CPU"),
        ([EDGE], "auto", None, [(EDGE, 4, 0)], "each machine's CPUs"),
        ([BOX, EDGE], "cpu", 4, [(BOX, 4, 0)] * 4 + [(EDGE, 4, 0)], "each 4 CPUs"),
        ([BOX, EDGE], "auto", 1, [(BOX, 1, 1)] * 2, "each GPU"),
        ([BOX, EDGE], "cuda", None, [(BOX, 1, 1)] * 2, "each GPU"),
        ([BOX, EDGE], "webgpu", None, [(BOX, 1, 2), (EDGE, 1, 0)], "webgpu takes the first card"),
    ],
)
def test_workers_get_cards_or_cpus(
    machines: list[Machine], backend: str, threads: int | None, wanted: list[tuple[Machine, int, int]], why: str
) -> None:
    planned, said = plan_seats(machines, backend, threads)
    assert planned == seats(*wanted)
    assert why in said


@pytest.mark.parametrize(
    ("machines", "backend", "threads", "needed"),
    [([EDGE], "cpu", 8, "8 CPUs"), ([EDGE], "cuda", None, "a GPU and a CPU"), ([], "auto", None, "it has none")],
)
def test_machines_that_have_too_little_are_named(
    machines: list[Machine], backend: str, threads: int | None, needed: str
) -> None:
    with pytest.raises(MachinesTooSmall, match=needed):
        plan_seats(machines, backend, threads)


@given(
    groups=st.lists(st.integers(1, 4), max_size=8),
    fatal=st.sets(st.integers(0, 31), max_size=3),
    fates=st.lists(st.sampled_from(["done", "died", "died with others", "given back"]), max_size=40),
)
def test_every_job_is_done_or_given_up_and_none_twice(groups: list[int], fatal: set[int], fates: list[str]) -> None:
    """Workers die over fatal jobs always and over others sometimes; only a job that was alone each time is given up.

    A worker that has a suspect has nothing else; of others it may have two, and what it said of the first may be lost.
    """
    numbers = iter(range(sum(groups)))
    dealer = Dealer(iter([[next(numbers) for _ in range(size)] for size in groups]))
    done: Counter[int] = Counter()
    given_up: Counter[int] = Counter()
    alone: Counter[int] = Counter()
    accidents = iter(fates)
    while (hand := dealer.next()) is not None:
        fate = next(accidents, "done")
        if fate == "given back":
            dealer.give_back(hand)
        elif fate == "done" and not fatal & set(hand.jobs):
            done.update(hand.jobs)
        else:
            is_alone = hand.suspect or fate != "died with others"
            alone.update(hand.jobs if len(hand.jobs) == 1 and is_alone else ())
            given_up.update([] if (lost := dealer.died_over(hand, alone=is_alone)) is None else [lost])
    assert sorted([*done.elements(), *given_up.elements()]) == list(range(sum(groups)))
    assert fatal & set(range(sum(groups))) <= given_up.keys()
    assert all(alone[job] == DEATHS for job in given_up)
