"""Passes over an opened backend, whole or a stretch of each model, and how long they take."""

import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, closing, contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from ...engines.backends import cpu_part, offer_of
from ...engines.base import Array, Backend, Limits, Opened, Value
from ...engines.device.backend import DeviceBackend
from ...engines.device.device import Device, Event, TimedCopy
from ...engines.directory.manifest import Chunk, Manifest, Model, Step
from ...engines.errors import OutOfDeviceMemory
from ...specs import Family
from ..streamer import side_by_side, stream
from .activations import seeded_activation
from .judging import FormOutcome, Interval, busy, overlap, stretch

STRETCH = 7
"""Chunks of a model: with two slots each is used three times."""
CPU_STRETCH = 4
"""Of fp8 engines that the CPU would first convert: about 0.6 GiB at full size."""
LONG_PASS_SECONDS = 6.0
"""A pass that would take longer is estimated from the stretch."""


def time_cpu(engines: Path, manifest: Manifest, limits: Limits) -> FormOutcome:
    """How long an image takes on the CPU, and nothing else: what cards are held against.

    Of fp8 engines that the CPU has not converted to int8 yet, a part is, and the time is that part's.
    """
    start = time.perf_counter()
    cpu = offer_of("cpu")
    with tempfile.TemporaryDirectory(prefix="i2l-proof-", ignore_cleanup_errors=True) as folder:
        part = cpu_part(engines, manifest, lambda chunks: stretch(chunks, CPU_STRETCH), Path(folder))
        opened = cpu.open(*(part or (engines, manifest)), limits)
        with closing(opened.backend):
            models = opened.running.models
            first = {
                family: seeded_activation(model.spec, model.chunks[0].steps[0].graph, 1)
                for family, model in models.items()
            }
            outputs(opened, first, STRETCH)
            _, seconds = outputs(opened, first, STRETCH)
            facts = part_time(manifest, models, seconds) if part else pass_time(opened, first, seconds)
    return FormOutcome(limits.form, seconds=time.perf_counter() - start, **facts)


def outputs(
    opened: Opened,
    inputs: Mapping[Family, Array],
    most: int | None,
    around: Callable[[], AbstractContextManager[None]] = nullcontext,
) -> tuple[list[Array], dict[Family, float]]:
    """What a pass over at most so many chunks of each model gives, and the seconds of each.

    ``around``: every engine's run.
    """
    backend, results = opened.backend, []
    seconds: dict[Family, float] = {}
    for family, model in opened.running.models.items():
        start = time.perf_counter()
        chunks = part_of(model.chunks, most)
        if family == "adapter":
            results += factors(backend, chunks, inputs[family], around)
        else:
            value = backend.value(inputs[family])
            for step, weights in stream(backend.store(family), chunks):
                engine = backend.engine(step.graph)
                with around():
                    (value,) = engine.run(value, weights).values()
            results.append(backend.array(value))
        seconds[family] = time.perf_counter() - start
    return results, seconds


def factors(
    backend: Backend, chunks: Sequence[Chunk], embedding: Array, around: Callable[[], AbstractContextManager[None]]
) -> list[Array]:
    """What the adapter's steps give; they do not follow each other."""
    engines = {step.graph: backend.engine(step.graph) for chunk in chunks for step in chunk.steps}  # before threads

    def work(step: Step, weights: Mapping[str, Value]) -> list[Array]:
        value = backend.value(embedding)
        with around():
            given = engines[step.graph].run(value, weights)
        return list(map(backend.array, given.values()))

    return [factor for given in side_by_side(backend.store("adapter"), chunks, work) for factor in given]


def pass_time(opened: Opened, inputs: Mapping[Family, Array], seconds: Mapping[Family, float]) -> dict[str, Any]:
    """The milliseconds of an image: of a pass, or from those of a stretch where a pass would take long."""
    models = opened.running.models
    ran = {family: replace(model, chunks=part_of(model.chunks, STRETCH)) for family, model in models.items()}
    estimated = part_time(opened.running, ran, seconds)
    if estimated["ms_per_image"] > 1e3 * LONG_PASS_SECONDS:
        return estimated
    outputs(opened, inputs, None)  # chunks that stay come now
    _, whole = outputs(opened, inputs, None)
    return {"ms_per_image": 1e3 * sum(whole.values()), "estimated": False}


def part_time(whole: Manifest, ran: Mapping[Family, Model], seconds: Mapping[Family, float]) -> dict[str, Any]:
    """The milliseconds of an image, from those of a part of each model's chunks, by their bytes."""
    estimate = 0.0
    for family, model in ran.items():
        all_bytes = sum(chunk.nbytes for chunk in whole.models[family].chunks)
        estimate += seconds[family] * all_bytes / sum(chunk.nbytes for chunk in model.chunks)
    return {"ms_per_image": 1e3 * estimate, "estimated": True}


def upload_rates(opened: Opened, inputs: Mapping[Family, Array]) -> dict[str, float]:
    """Bytes a second that reach the device: with nothing computing, and while it computes."""
    _, busy = outputs(opened, inputs, STRETCH)
    nbytes, alone = _streamed_alone(opened, inputs)
    if not nbytes:
        return {}
    return {
        "upload_bytes_per_second": nbytes / min(alone, _streamed_alone(opened, inputs)[1]),  # once may be disturbed
        "busy_upload_bytes_per_second": nbytes / sum(busy.values()),
    }


def _streamed_alone(opened: Opened, inputs: Mapping[Family, Array]) -> tuple[int, float]:
    """``(bytes, seconds)`` of a stretch of each model that passes through, and nothing else."""
    backend, nbytes, seconds = opened.backend, 0, 0.0
    for family, model in opened.running.models.items():
        store, chunks = backend.store(family), part_of(model.chunks, STRETCH)
        nbytes += sum(chunk.nbytes for chunk in chunks if chunk not in store.resident)
        start = time.perf_counter()
        for _ in stream(store, chunks):
            pass
        backend.array(backend.value(inputs["adapter"]))  # waits for what was enqueued
        seconds += time.perf_counter() - start
    return nbytes, seconds


@dataclass
class DeviceClock:
    """When a device's lanes worked, by its own events; begun when both stand still.

    Spans begin behind what a lane waits for: a run behind the wait for its chunk, a copy behind that for its slot and
    the filling of pinned memory. What the host is late with while a step's kernels are launched is in the step's span.
    """

    device: Device
    runs: list[tuple[Event, Event]] = field(default_factory=list)
    copies: list[TimedCopy] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.device.finish()
        self._zero = self.device.record("compute", timed=True)
        self.device.time_copies(self.copies)

    @contextmanager
    def run(self) -> Iterator[None]:
        """Around what computes."""
        begin = self.device.record("compute", timed=True)
        yield
        self.runs.append((begin, self.device.record("compute", timed=True)))

    def settle(self) -> tuple[list[Interval], list[Interval]]:
        """When it copied and when it computed, in microseconds, once all is done."""
        self.device.finish()
        self.device.time_copies(None)
        copies = [(copy.begin, copy.end) for copy in self.copies]
        copying, computing = ([(self._at(x), self._at(y)) for x, y in lane] for lane in (copies, self.runs))
        return copying, computing

    def _at(self, event: Event) -> float:
        return self.device.elapsed_us(self._zero, event)


def lane_facts(opened: Opened, inputs: Mapping[Family, Array]) -> dict[str, Any]:
    """How far copies hide behind computing, and what they reach of pinned memory's bandwidth, by the device's events.

    Nothing for a device without lanes, where all chunks stay, or whose events tell no time.
    """
    backend = opened.backend
    if not isinstance(backend, DeviceBackend) or not backend.residency.streamed_bytes:
        return {}
    clock = DeviceClock(backend.device)
    outputs(opened, inputs, STRETCH, clock.run)
    copying, computing = clock.settle()
    both = overlap(copying, computing)
    if both is None:
        return {}
    facts = {"overlap": both, "mostly_copying": busy(copying) > busy(computing)}
    try:
        pinned = backend.pinned_bandwidth()
    except OutOfDeviceMemory:  # of the host's memory, whatever the driver calls it
        return facts | {"unpinned": True}
    rate = 1e6 * sum(copy.nbytes for copy in clock.copies) / busy(copying)
    return facts | {
        "pinned_bytes_per_second": pinned,
        "copying_share": rate / pinned,
        "streaming_share": _rate_alone(opened, backend) / pinned,
    }


def _rate_alone(opened: Opened, backend: DeviceBackend) -> float:
    """Bytes per second of a stretch of each model, with nothing computing, from its first copy to its last."""
    nbytes, us = 0, 0.0
    for family, model in opened.running.models.items():
        clock = DeviceClock(backend.device)
        for _ in stream(backend.store(family), part_of(model.chunks, STRETCH)):
            pass
        copying, _ = clock.settle()
        if copying:
            nbytes += sum(copy.nbytes for copy in clock.copies)
            us += copying[-1][1] - copying[0][0]
    return 1e6 * nbytes / us


def part_of(chunks: Sequence[Chunk], most: int | None) -> tuple[Chunk, ...]:
    """At most so many chunks; all for None."""
    return tuple(chunks) if most is None else stretch(tuple(chunks), most)
