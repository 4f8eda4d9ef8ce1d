"""How many workers, and what each takes of its machine. Pure: it is told what Ray's machines have."""

from collections.abc import Sequence
from dataclasses import dataclass

from ..engines.backends import BACKENDS
from .errors import MachinesTooSmall

ONE_CARD_EACH = frozenset({"cuda", "tensorrt", "tensorrt-rtx"})
"""Backends that see the one card which Ray leaves visible to a worker, by CUDA_VISIBLE_DEVICES."""


@dataclass(frozen=True)
class Machine:
    """A node of the cluster, with its resources as Ray counts them."""

    node: str
    host: str
    cpus: int
    gpus: int


@dataclass(frozen=True)
class Seat:
    """Room for one worker."""

    node: str
    host: str
    cpus: int
    gpus: int


def plan_seats(machines: Sequence[Machine], backend: str, threads: int | None) -> tuple[list[Seat], str]:
    """Where workers go, and a sentence that says why.

    ``auto`` takes the cards of the cluster, one worker for each, and its CPUs only where no machine has a card: a CPU
    that is twenty times slower than the cards would hold the last pictures back. A worker on the CPU takes as many CPUs
    as it has threads; without a number, all of its machine. A plugin provider cannot be told which of several cards is
    meant, so a machine gets one worker of these, with all its cards.

    Raises:
        MachinesTooSmall: there is room for none.
    """
    assert backend in {"auto", *BACKENDS}
    found = [f"{machine.host}: {machine.cpus} CPUs, {machine.gpus} GPUs" for machine in machines]
    if backend in ONE_CARD_EACH or (backend == "auto" and any(machine.gpus for machine in machines)):
        seats = [Seat(m.node, m.host, 1, 1) for m in machines for _ in range(min(m.gpus, m.cpus))]
        if not seats:
            raise MachinesTooSmall("a GPU and a CPU", found)
        return seats, "one worker for each GPU"
    if backend not in {"auto", "cpu"}:
        seats = [Seat(m.node, m.host, 1, m.gpus) for m in machines if m.cpus]
        if not seats:
            raise MachinesTooSmall("a CPU", found)
        return seats, f"one worker for each machine, as {backend} takes the first card of each"
    if threads is None:
        seats, why = [Seat(m.node, m.host, m.cpus, 0) for m in machines if m.cpus], "one worker for each machine's CPUs"
    else:
        seats = [Seat(m.node, m.host, threads, 0) for m in machines for _ in range(m.cpus // threads)]
        why = f"one worker for each {threads} CPUs" if threads > 1 else "one worker for each CPU"
    if not seats:
        raise MachinesTooSmall(f"{threads or 1} CPUs", found)
    return seats, why
