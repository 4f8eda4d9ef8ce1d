"""A trace of a run: what was copied and computed when, and how much memory was held.

The file is Chrome's trace format, which Perfetto (ui.perfetto.dev) and ``chrome://tracing`` open. On the CPU backend
``prefetch`` asks for a chunk, ``acquire`` waits for it, ``run`` computes, by the host's clock. On a device ``copy`` and
``run`` are what its lanes did, by its own clock (:mod:`.lanes`). Nothing is wrapped and nothing costs if no trace was
asked for.

Where several threads work at a time, what meets in a lane goes side by side: ``compute``, ``compute 2``.
"""

import itertools
import json
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from collections.abc import Set as AbstractSet
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any

from ..engines.base import Engine, Value, WeightStore
from ..engines.device.device import Lane
from ..engines.directory.manifest import Chunk, Step
from ..machine.outputs import Format, Found, output_path

LANES: tuple[Lane, ...] = ("copy", "compute")
HEAD = b'{"otherData": {"by": "i2l"}, '
"""How every trace of ours begins."""


def _find(path: Path) -> Found | None:
    with path.open("rb") as file:
        return None if file.read(len(HEAD)) == HEAD else Found("there already, and no trace of i2l")


TRACE = Format("a trace", (".json",), _find)


class Trace:
    """Collects events; times in microseconds since it was made."""

    def __init__(self) -> None:
        self._start = time.perf_counter_ns()
        self._held: dict[Chunk, None] = {}
        self._lock = threading.Lock()
        self._busy: set[int] = set()
        self._named: set[int] = set()
        self.events: list[dict[str, Any]] = []
        for lane in LANES:
            self._name(lane, 0)

    @contextmanager
    def span(self, lane: Lane, name: str, **facts: object) -> Iterator[None]:
        """Time the body, beside what another thread is doing in that lane."""
        with self._lock:
            place = next(place for place in itertools.count() if _number(lane, place) not in self._busy)
            number = _number(lane, place)
            self._busy.add(number)
            self._name(lane, place)
        begin = self.now()
        try:
            yield
        finally:
            self._add(number, name, begin, self.now() - begin, facts)
            with self._lock:
                self._busy.remove(number)

    def add(self, lane: Lane, name: str, begin_us: float, duration_us: float, **facts: object) -> None:
        """A span that was timed elsewhere."""
        self._add(_number(lane, 0), name, begin_us, duration_us, facts)

    def count(self, name: str, **values: int) -> None:
        """Values of a counter from now on."""
        self.events.append({"ph": "C", "name": name, "pid": 1, "ts": self.now(), "args": values})

    def hold(self, chunk: Chunk) -> None:
        """A chunk's memory is held from now on."""
        with self._lock:
            self._held[chunk] = None
            self._memory()

    def drop(self, chunk: Chunk) -> None:
        """A chunk's memory was given back."""
        with self._lock:
            self._held.pop(chunk, None)
            self._memory()

    def save(self, path: Path) -> None:
        """Write the JSON file.

        Raises:
            OutputMisnamed, OutputTaken, OutputUnwritable, DiskFull: it cannot be written; what was there stays.
        """
        values = {"otherData": {"by": "i2l"}, "traceEvents": self.events, "displayTimeUnit": "ms"}
        with output_path(path, TRACE) as temporary:
            temporary.write_text(json.dumps(values), encoding="utf-8")

    def _name(self, lane: Lane, place: int) -> None:
        number = _number(lane, place)
        if number not in self._named:
            self._named.add(number)
            name = f"{lane} {place + 1}" if place else lane
            event = {"ph": "M", "name": "thread_name", "pid": 1, "tid": number, "args": {"name": name}}
            self.events.append(event)

    def _add(self, number: int, name: str, begin_us: float, duration_us: float, facts: dict[str, object]) -> None:
        event = {"ph": "X", "name": name, "pid": 1, "tid": number, "ts": begin_us}
        self.events.append({**event, "dur": duration_us, "args": facts})

    def _memory(self) -> None:
        self.count("memory", weights=sum(chunk.nbytes for chunk in self._held))

    def now(self) -> float:
        """Microseconds since the trace was made."""
        return (time.perf_counter_ns() - self._start) / 1000


def _number(lane: Lane, place: int) -> int:
    """A lane's number in the file."""
    return 1 + LANES.index(lane) + place * len(LANES)


class CountedStore:
    """A :class:`WeightStore` of whose chunks a trace knows which are held."""

    def __init__(self, store: WeightStore, trace: Trace) -> None:
        self._store = store
        self._trace = trace

    @property
    def slots(self) -> int:
        return self._store.slots

    @property
    def abreast(self) -> int:
        return self._store.abreast

    @property
    def resident(self) -> AbstractSet[Chunk]:
        return self._store.resident

    def prefetch(self, chunk: Chunk) -> None:
        self._store.prefetch(chunk)
        self._trace.hold(chunk)

    def acquire(self, chunk: Chunk) -> None:
        self._store.acquire(chunk)

    def weights(self, step: Step) -> Mapping[str, Value]:
        return self._store.weights(step)

    def release(self, chunk: Chunk) -> None:
        self._store.release(chunk)
        if chunk not in self._store.resident:
            self._trace.drop(chunk)


class TracedStore(CountedStore):
    """One whose calls are timed on the host."""

    def prefetch(self, chunk: Chunk) -> None:
        with self._trace.span("copy", f"prefetch {chunk.steps[0].name}", nbytes=chunk.nbytes):
            super().prefetch(chunk)

    def acquire(self, chunk: Chunk) -> None:
        with self._trace.span("copy", f"acquire {chunk.steps[0].name}", nbytes=chunk.nbytes):
            super().acquire(chunk)


class TracedEngine:
    """An :class:`Engine` whose runs are spans under a step's name."""

    def __init__(self, engine: Engine, span: Callable[[Lane, str], AbstractContextManager[None]], step: str) -> None:
        self.activation = engine.activation
        self._engine = engine
        self._span = span
        self._step = step

    def run(self, activation: Value, weights: Mapping[str, Value]) -> dict[str, Value]:
        with self._span("compute", f"run {self._step}"):
            return self._engine.run(activation, weights)
