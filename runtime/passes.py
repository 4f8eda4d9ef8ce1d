"""Passes over the weights: pixels to embeddings, embeddings to factors, every step on whatever backend is open.

The images of a call share passes, a few at a time: a pass moves all weights once, whatever the batch.
"""

import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import TypeAlias

import numpy as np

from ..engines.base import Array, Backend, Engine, Value, WeightStore
from ..engines.device.backend import DeviceBackend
from ..engines.device.slots import DeviceStore
from ..engines.directory.manifest import Step
from ..engines.errors import ShapeMismatch
from ..engines.replay.model_graphs import Fetched, ModelGraphs, taken
from ..engines.replay.outbox import Outputs
from ..lora.lora import factors_by_module
from ..machine.progress import Report
from ..specs import AdapterSpec, EncoderSpec, Family
from .errors import EmbeddingNotFinite
from .lanes import Lanes
from .opening import OpenEngines
from .streamer import side_by_side, stream
from .trace import CountedStore, Trace, TracedEngine, TracedStore

Observer: TypeAlias = Callable[[str, dict[str, Array]], None]
"""Told every step's name and outputs; for comparing with a reference."""


@dataclass
class Timings:
    """Seconds spent per stage of the last call."""

    seconds: dict[str, float] = field(default_factory=dict)

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        start = time.perf_counter()
        try:
            yield
        finally:
            self.seconds[name] = self.seconds.get(name, 0.0) + time.perf_counter() - start


IMAGES_PER_PASS = 4
"""Images that share one pass over the weights. At full width on the CPU, int8, each image after the first adds 297 MiB
to the peak (770, 1065, 1661 MiB for 1, 2, 4), while the time per image falls by less than a tenth as long as the packs
are in the page cache. Where they are not, four images share one reading of the encoders' 7.3 GiB."""
ENCODERS: tuple[Family, ...] = ("siglip2", "dinov3")
"""In the order of their outputs in an embedding."""


def require_finite(what: str, values: Array) -> None:
    """Raise :class:`EmbeddingNotFinite` if some of the values are no numbers.

    The quantised adapter would turn them into finite ones: another LoRA, and nothing to see.
    """
    if not (finite := np.isfinite(values)).all():
        raise EmbeddingNotFinite(what, int(finite.size - np.count_nonzero(finite)))


def finite_factors(step: Step, outputs: dict[str, Array]) -> dict[str, Array]:
    """The factors of a step, which :func:`require_finite` has seen, unless whoever fetched them saw numbers alone."""
    if not (isinstance(outputs, Outputs) and outputs.finite):
        for name, values in outputs.items():
            require_finite(f"{step.name}.{name}", values)
    return outputs


def joined(parts: Sequence[dict[str, Array]]) -> dict[str, Array]:
    """The factors of some images each, as one; without a copy where there is one."""
    if len(parts) == 1:
        return parts[0]
    return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}


class Passes:
    """What computes in a pipeline.

    Args:
        engines: opened.
        report: told the steps done of the running stage.
        trace: told every copy and computation.
    """

    def __init__(self, engines: OpenEngines, report: Report, trace: Trace | None) -> None:
        self._open = engines
        self._report = report
        self._trace = trace
        self._lanes: Lanes | None = None
        if trace and isinstance(engines.backend, DeviceBackend):
            self._lanes = Lanes(engines.backend.device, trace)
        self.timings = Timings()
        """Seconds spent per stage; whoever calls begins a new one."""

    def embeddings(self, pixels: Mapping[Family, Array], observe: Observer | None) -> Array:
        """Both encoders' outputs side by side; with less memory if it runs out.

        Raises:
            ShapeMismatch: the pixels are not what the encoders take.
            EmbeddingNotFinite: the outputs are no numbers.
        """
        pixels = {family: self._fitting_pixels(family, pixels) for family in ENCODERS}
        if len({len(values) for values in pixels.values()}) != 1:
            found = " and ".join(str(len(values)) for values in pixels.values())
            raise ShapeMismatch("the encoders", "pixels", f"of {found} images", "as many for both")
        return self._open.in_memory(partial(self._encode_all, pixels, observe))

    def factors(self, embeddings: Array) -> dict[str, tuple[Array, Array]]:
        """The adapter's factors of all images, by module; with less memory if it runs out.

        Raises:
            ShapeMismatch: the embeddings are not what the adapter takes.
            EmbeddingNotFinite: they, or the factors, are no numbers.
        """
        spec = self._open.manifest.models["adapter"].spec
        assert isinstance(spec, AdapterSpec)
        embeddings = np.asarray(embeddings)
        if embeddings.shape[1:] != (spec.embedding,) or not len(embeddings) or embeddings.dtype.kind != "f":
            found = f"{list(embeddings.shape)} of {embeddings.dtype}"
            raise ShapeMismatch("the adapter", "embeddings", found, f"[images, {spec.embedding}] of float32")
        require_finite("the embeddings", embeddings)
        return self._open.in_memory(partial(self._factors, embeddings))

    def _encode_all(self, pixels: Mapping[Family, Array], observe: Observer | None) -> Array:
        """Both encoders on one backend: should the CPU take over, its packs may be of another precision."""
        images = len(pixels["siglip2"])
        most = 1 if self._open.alone else images
        rows = []
        for start in range(0, images, most):
            some = {family: pixels[family][start : start + most] for family in ENCODERS}
            rows.append(np.concatenate([self._encode(family, some[family], observe) for family in ENCODERS], axis=1))
        return np.concatenate(rows)

    def _encode(self, family: Family, pixels: Array, observe: Observer | None) -> Array:
        """``[images, 3, size, size] -> [images, hidden]`` through embed, blocks and head."""

        def steps(hidden: Value, report: Report) -> list[Fetched]:
            for step, engine, weights in self._stream(family, report):
                outputs = engine.run(hidden, weights)
                (hidden,) = outputs.values()
                if observe:
                    observe(step.name, {name: self._backend.array(value) for name, value in outputs.items()})
            return [self._backend.later({"embedding": hidden})]

        with self.timings.stage(family):
            (row,) = self._computed(family, pixels, steps, self._graphs(family) if observe is None else None)
            require_finite(family, row["embedding"])
            return row["embedding"]

    def _fitting_pixels(self, family: Family, pixels: Mapping[Family, Array]) -> Array:
        """The pixels for an encoder, as float32."""
        spec = self._open.manifest.models[family].spec
        assert isinstance(spec, EncoderSpec)
        values = np.asarray(pixels[family])
        if values.shape[1:] != (3, spec.image_size, spec.image_size) or not len(values) or values.dtype.kind != "f":
            size = f"[images, 3, {spec.image_size}, {spec.image_size}] of float32"
            raise ShapeMismatch(family, "pixels", f"{list(values.shape)} of {values.dtype}", size)
        return np.ascontiguousarray(values, np.float32)

    def _factors(self, embeddings: Array) -> dict[str, tuple[Array, Array]]:
        """The adapter's factors of all images, by module; a few at a time, as a device's memory is planned for those.

        Where weights move, all images share one pass over them.
        """
        most = 1 if self._open.alone else IMAGES_PER_PASS
        starts = range(0, len(embeddings), most)
        groups = [np.ascontiguousarray(embeddings[i : i + most], np.float32) for i in starts]
        steps = self._steps("adapter")
        factors: dict[str, tuple[Array, Array]] = {}
        with self.timings.stage("adapter"):
            for step, parts in zip(steps, self._rows(steps, groups), strict=True):
                factors |= factors_by_module(step.name, joined(parts))
        return factors

    def _rows(self, steps: Sequence[Step], groups: Sequence[Array]) -> Iterator[Sequence[dict[str, Array]]]:
        """For every step the factors of each group, all of them numbers."""
        graphs = self._graphs("adapter")
        rows: list[Iterable[dict[str, Array]]]
        if len(groups) == 1 and self._backend.store("adapter").abreast == 1:
            rows = [self._computed("adapter", groups[0], self._adapter_steps, graphs)]
        elif graphs is not None:  # each to its end, as the next one's results go where this one's are
            rows = [list(self._computed("adapter", group, self._adapter_steps, graphs)) for group in groups]
        else:
            yield from self._shared_rows(steps, groups)
            return
        for step, *parts in zip(steps, *rows, strict=True):
            yield [finite_factors(step, part) for part in parts]

    def _adapter_steps(self, embedding: Value, report: Report) -> list[Fetched]:
        """The factors of every step, of images that share a pass."""
        steps = self._stream("adapter", report)
        return [self._backend.later(engine.run(embedding, weights)) for _, engine, weights in steps]

    def _shared_rows(self, steps: Sequence[Step], groups: Sequence[Array]) -> Iterator[list[dict[str, Array]]]:
        """For every step the factors of each group, in one pass over the weights, chunks side by side."""
        store, chunks = self._store("adapter"), self._open.running.models["adapter"].chunks
        engines = {step.graph: self._backend.engine(step.graph) for step in steps}  # before threads

        def work(step: Step, weights: Mapping[str, Value]) -> list[dict[str, Array]]:
            engine, values = self._traced(engines[step.graph], step), map(self._backend.value, groups)
            taken = (self._backend.later(engine.run(value, weights))() for value in values)
            return [finite_factors(step, outputs) for outputs in taken]

        for done, row in enumerate(side_by_side(store, chunks, work)):
            self._report("adapter", done, len(steps))
            yield row
        self._report("adapter", len(steps), len(steps))

    def _computed(
        self,
        family: Family,
        array: Array,
        steps: Callable[[Value, Report], list[Fetched]],
        graphs: ModelGraphs | None,
    ) -> Iterator[dict[str, Array]]:
        """What the steps of a model fetch for this input: by a graph of the device where there is one."""
        upload = partial(self._backend.value, array)
        if graphs is None:
            yield from taken(steps(upload(), self._report))
            return
        key = (family, len(array))
        again, total = key in graphs, len(self._steps(family))
        if again:
            self._report(family, 0, total)
        yield from graphs.computed(key, upload, steps, self._report)
        if again:
            self._report(family, total, total)

    def _graphs(self, family: Family) -> ModelGraphs | None:
        """Where a pass over a model is recorded, if it copies no weights and nobody looks at its steps."""
        backend = self._backend
        if self._trace is not None or not isinstance(backend, DeviceBackend) or not backend.store(family).settled:
            return None
        return backend.graphs

    def _stream(self, family: Family, report: Report) -> Iterator[tuple[Step, Engine, Mapping[str, Value]]]:
        """Every step of a model in order with its engine and weights, progress told on the way."""
        total = len(self._steps(family))
        chunks = self._open.running.models[family].chunks
        for done, (step, weights) in enumerate(stream(self._store(family), chunks)):
            report(family, done, total)
            yield step, self._traced(self._backend.engine(step.graph), step), weights
        report(family, total, total)

    def _traced(self, engine: Engine, step: Step) -> Engine:
        """The engine; its run a span of that step, if a trace was asked for."""
        if self._trace is None:
            return engine
        return TracedEngine(engine, (self._lanes or self._trace).span, step.name)

    def _steps(self, family: Family) -> list[Step]:
        """Of a model, in order."""
        return [step for chunk in self._open.running.models[family].chunks for step in chunk.steps]

    def _store(self, family: Family) -> WeightStore:
        """A model's weights; traced, if that was asked for."""
        store = self._backend.store(family)
        if self._trace is None:
            return store
        if self._lanes and not isinstance(self._backend, DeviceBackend):  # the CPU took over
            self.settle()
        if self._lanes is None:
            return TracedStore(store, self._trace)
        assert isinstance(store, DeviceStore)
        store.span = self._lanes.span
        return CountedStore(store, self._trace)

    def settle(self) -> None:
        """Let the trace have what the device did."""
        if self._lanes:
            self._lanes.settle()
            self._lanes = None

    @property
    def _backend(self) -> Backend:
        return self._open.backend
