"""The pipeline: an opened engines directory that turns images into LoRAs.

The images of a call share passes over the weights, a few at a time: a pass moves all weights once, whatever the batch.
"""

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import TypeAlias

import numpy as np
from PIL import Image

from ..engines.base import MARGIN_BYTES, Array, Backend, Engine, Limits, Value, VramBudget, WeightStore
from ..engines.device.backend import DeviceBackend
from ..engines.device.slots import DeviceStore
from ..engines.directory.manifest import Manifest, Step, content_id
from ..lora.lora import MODEL_METADATA, Lora, factors_by_module, joining_weights, lora_from_factors, require_finite
from ..machine.progress import Report, silent
from ..specs import FAMILIES, AdapterSpec, EncoderSpec, Family
from .cache import EmbeddingCache, encoders_id
from .lanes import Lanes
from .opening import OpenEngines
from .pictures.images import ImageSource, load_image
from .pictures.pixels import pixels_dinov3, pixels_siglip2, square_image
from .pictures.sources import as_several, images_mark, load_squares
from .streamer import stream
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


class Pipeline:
    """An engines directory opened on a backend. Not for several threads at once; a second call pays no set-up again.

    It keeps the build that it was opened with, even if the directory is rebuilt meanwhile. Once closed, everything that
    computes raises :class:`PipelineClosed`.

    Args:
        engines: the directory that ``i2l build-engines`` made.
        backend: ``auto``, ``cpu``, ``cuda`` or ``tensorrt``.
        threads: of the CPU backend; by default one for each physical core, within the container's quota.
        ram_budget_bytes: for the CPU backend's weights: what fits stays in memory between images; by default nothing.
        vram_budget_bytes: for everything on a GPU; by default what is free there, less ``vram_margin_bytes``. On the
            cpu backend it has no effect, which is logged as a warning.
        vram_margin_bytes: left to other programs on the GPU.
        report: told the steps done of the running stage; while the first opening of fp8 engines on the cpu backend
            converts them, MiB of packs.
        cache: a folder that keeps the embeddings of images that were seen, as :mod:`.cache` says; None keeps nothing.
        trace: told every copy and computation.

    Raises:
        EnginesError: the directory is missing, damaged or of another version, or holds fp8 engines and the packs that
            the cpu backend needs of them cannot be written.
        DiskFull: there is no room for those.
        BackendUnavailable: the named backend cannot run here.
    """

    def __init__(
        self,
        engines: Path,
        *,
        backend: str = "auto",
        threads: int | None = None,
        ram_budget_bytes: int | None = None,
        vram_budget_bytes: int | None = None,
        vram_margin_bytes: int = MARGIN_BYTES,
        report: Report = silent,
        cache: Path | None = None,
        trace: Trace | None = None,
    ) -> None:
        self._open = OpenEngines(
            engines,
            backend=backend,
            limits=Limits(
                images=IMAGES_PER_PASS,
                threads=threads,
                ram_budget_bytes=ram_budget_bytes,
                vram=VramBudget(vram_budget_bytes, vram_margin_bytes),
                report=report,
            ),
        )
        self._report = report
        self.cache: EmbeddingCache | None = None if cache is None else EmbeddingCache(cache, self._encoders_id)
        self.from_cache: list[bool] = []
        """For each image of the last call that embedded images: did its embedding come from the cache?"""
        self._trace = trace
        self._lanes: Lanes | None = None
        if trace and isinstance(self._open.backend, DeviceBackend):
            self._lanes = Lanes(self._open.backend.device, trace)
        self.timings = Timings()

    @property
    def manifest(self) -> Manifest:
        """Of the engines that were opened; those for a GPU may lie in an engines directory inside the other."""
        return self._open.manifest

    @property
    def backend_name(self) -> str:
        """Where it computes; ``cpu`` once a GPU that ``auto`` chose has run out of memory."""
        return self._open.name

    @property
    def backend_reason(self) -> str:
        """Why there."""
        return self._open.reason

    def lora_from_images(
        self,
        images: Sequence[ImageSource] | ImageSource,
        *,
        strength: float = 1.0,
        weights: Sequence[float] | None = None,
    ) -> Lora:
        """One LoRA from one or more images; its rank is four per image.

        Args:
            images: paths, PIL images or uint8/float arrays ``[height, width, channels]``; or one array ``[images,
                height, width, channels]``.
            strength: multiplies the LoRA's effect; linear, as it scales one factor only.
            weights: how much each image counts, one number each, taken as they are; by default ``1 / images`` each.

        Raises:
            NoImages, ImageError: nothing to read, or an image that cannot be used.
            StrengthInvalid, WeightsMismatch: a number is not finite, or there is not one weight per image; found before
                any computing.
        """
        self.timings = Timings()
        require_finite("strength", strength)
        with self.timings.stage("images"):
            squares, hashes = load_squares(images)
        joining_weights(weights, len(squares), "image")
        lora = self.lora_from_embeddings(self.embed(squares), strength=strength, weights=weights)
        lora.metadata |= images_mark(hashes)
        return lora

    def embed(self, images: Sequence[ImageSource] | ImageSource) -> Array:
        """The embeddings of images, float32 ``[images, 5632]``: SigLIP2's 1536 values, then DINOv3's 4096.

        At most :data:`IMAGES_PER_PASS` images share a pass over the weights.
        """
        _ = self._backend  # closed? Then not even what the cache knows
        with self.timings.stage("images"):
            squares = [square_image(load_image(image)) for image in as_several(images)]
        if self.cache is None:
            self.from_cache = [False] * len(squares)
            return self._embed_squares(squares)
        embeddings, self.from_cache = self.cache.embed(squares, self._embed_squares)
        return embeddings

    def _embed_squares(self, squares: Sequence[Image.Image]) -> Array:
        starts = range(0, len(squares), IMAGES_PER_PASS)
        return np.concatenate([self.embed_pixels(self.pixels(squares[i : i + IMAGES_PER_PASS])) for i in starts])

    def pixels(self, images: Sequence[ImageSource] | ImageSource) -> dict[Family, Array]:
        """What each encoder sees, float32 ``[images, 3, size, size]``."""
        with self.timings.stage("images"):
            squares = [square_image(load_image(image)) for image in as_several(images)]
            return {
                "siglip2": np.stack([pixels_siglip2(square, self._image_size("siglip2")) for square in squares]),
                "dinov3": np.stack([pixels_dinov3(square, self._image_size("dinov3")) for square in squares]),
            }

    def embed_pixels(self, pixels: Mapping[Family, Array], *, observe: Observer | None = None) -> Array:
        """:meth:`embed` from what :meth:`pixels` gave; ``observe`` is told every step's outputs."""
        return self._open.in_memory(partial(self._encode_all, pixels, observe))

    def lora_from_embeddings(
        self, embeddings: Array, *, strength: float = 1.0, weights: Sequence[float] | None = None
    ) -> Lora:
        """One LoRA from embeddings ``[images, 5632]``; strength and weights as in :meth:`lora_from_images`."""
        return self.lora_from_factors(self.factors(embeddings), strength=strength, weights=weights)

    def factors(self, embeddings: Array) -> dict[str, tuple[Array, Array]]:
        """``module -> (A [images, rank, in], B [images, out, rank])``: the factors of every image, not yet joined."""
        return self._open.in_memory(partial(self._factors, embeddings))

    def lora_from_factors(
        self,
        factors: Mapping[str, tuple[Array, Array]],
        *,
        strength: float = 1.0,
        weights: Sequence[float] | None = None,
    ) -> Lora:
        """Join what :meth:`factors` gave; the metadata says what of."""
        lora = lora_from_factors(factors, strength, weights)
        adapter = self._adapter
        lora.metadata |= MODEL_METADATA[adapter.diffusion_model]
        lora.metadata |= self.origin(lora.rank // adapter.rank, strength, weights)
        return lora

    def origin(self, images: int, strength: float, weights: Sequence[float] | None) -> dict[str, str]:
        """The metadata that says how a LoRA came about, its images aside."""
        return {
            "i2l.precision": self.manifest.precision,
            "i2l.engines": content_id(self.manifest, FAMILIES)[:16],
            "i2l.strength": f"{strength:.9g}",
            "i2l.weights": ",".join(f"{weight:.9g}" for weight in joining_weights(weights, images, "image")),
        }

    @property
    def vram(self) -> dict[str, int] | None:
        """VRAM in bytes: the budget, the peak by the plan and the peak as measured; None on the CPU."""
        if not isinstance(self._backend, DeviceBackend):
            return None
        plan = self._backend.residency
        return {
            "budget_bytes": plan.budget_bytes,
            "planned_peak_bytes": plan.peak_bytes,
            "measured_peak_bytes": self._backend.peak_bytes,
        }

    def close(self) -> None:
        """Give sessions and mapped packs back."""
        self._settle()
        self._open.close()

    def __enter__(self) -> "Pipeline":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _encode_all(self, pixels: Mapping[Family, Array], observe: Observer | None) -> Array:
        """Both encoders on one backend: should the CPU take over, its packs may be of another precision."""
        return np.concatenate([self._encode(family, pixels[family], observe) for family in ENCODERS], axis=1)

    def _encode(self, family: Family, pixels: Array, observe: Observer | None) -> Array:
        """``[images, 3, size, size] -> [images, hidden]`` through embed, blocks and head."""
        with self.timings.stage(family):
            hidden = self._backend.value(pixels)
            for step, engine, weights in self._stream(family):
                ((name, hidden),) = engine.run(hidden, weights).items()
                if observe:
                    observe(step.name, {name: self._backend.array(hidden)})
            return self._backend.array(hidden)

    def _factors(self, embeddings: Array) -> dict[str, tuple[Array, Array]]:
        """The adapter's factors of all images, by module.

        All share one pass over the weights, a few at a time: a device's memory is planned for those.
        """
        factors: dict[str, tuple[Array, Array]] = {}
        starts = range(0, len(embeddings), IMAGES_PER_PASS)
        groups = [np.ascontiguousarray(embeddings[i : i + IMAGES_PER_PASS], np.float32) for i in starts]
        with self.timings.stage("adapter"):
            for step, engine, weights in self._stream("adapter"):
                parts = [
                    {name: self._backend.array(y) for name, y in engine.run(value, weights).items()}
                    for value in map(self._backend.value, groups)
                ]
                outputs = {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
                factors |= factors_by_module(step.name, outputs)
        return factors

    def _stream(self, family: Family) -> Iterator[tuple[Step, Engine, Mapping[str, Value]]]:
        """Every step of a model in order with its engine and weights, progress told on the way."""
        chunks = self._open.running.models[family].chunks
        total = sum(len(chunk.steps) for chunk in chunks)
        for done, (step, weights) in enumerate(stream(self._store(family), chunks)):
            self._report(family, done, total)
            engine = self._backend.engine(step.graph)
            if self._trace:
                engine = TracedEngine(engine, (self._lanes or self._trace).span, step.name)
            yield step, engine, weights
        self._report(family, total, total)

    def _store(self, family: Family) -> WeightStore:
        """A model's weights; traced, if that was asked for."""
        store = self._backend.store(family)
        if self._trace is None:
            return store
        if self._lanes and not isinstance(self._backend, DeviceBackend):  # the CPU took over
            self._settle()
        if self._lanes is None:
            return TracedStore(store, self._trace)
        assert isinstance(store, DeviceStore)
        store.span = self._lanes.span
        return CountedStore(store, self._trace)

    def _encoders_id(self) -> str:
        return encoders_id(content_id(self._open.running, ENCODERS), self.backend_name)

    def _settle(self) -> None:
        """Let the trace have what the device did."""
        if self._lanes:
            self._lanes.settle()
            self._lanes = None

    @property
    def runs_as(self) -> str:
        """The precision of the packs that run: the manifest's, except that the cpu backend runs fp8 as int8."""
        return self._open.running.precision

    @property
    def _backend(self) -> Backend:
        return self._open.backend

    @property
    def _adapter(self) -> AdapterSpec:
        spec = self.manifest.models["adapter"].spec
        assert isinstance(spec, AdapterSpec)
        return spec

    def _image_size(self, family: Family) -> int:
        spec = self.manifest.models[family].spec
        assert isinstance(spec, EncoderSpec)  # the manifest's families are checked when it is read
        return spec.image_size


def open_engines(
    engines: Path | str,
    *,
    backend: str = "auto",
    threads: int | None = None,
    ram_budget_bytes: int | None = None,
    vram_budget_bytes: int | None = None,
    vram_margin_bytes: int = MARGIN_BYTES,
    report: Report = silent,
    cache: Path | str | None = None,
) -> Pipeline:
    """Open an engines directory; use it as a context manager or call ``close()``. See :class:`Pipeline`.

    ``cache`` names a folder for embeddings. Unlike the command line, Python keeps none unless it is told where:
    a library does not write into a home directory by itself.
    """
    folder = None if cache is None else Path(cache).expanduser()
    return Pipeline(
        Path(engines).expanduser(),
        backend=backend,
        threads=threads,
        ram_budget_bytes=ram_budget_bytes,
        vram_budget_bytes=vram_budget_bytes,
        vram_margin_bytes=vram_margin_bytes,
        report=report,
        cache=folder,
    )
