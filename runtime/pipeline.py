"""The pipeline: an opened engines directory that turns images into LoRAs."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import NoReturn, Self

import numpy as np
from PIL import Image

from ..engines.base import MARGIN_BYTES, Array, Backend, CardFacts, Limits, VramBudget
from ..engines.device.backend import DeviceBackend
from ..engines.device.residency import Planned
from ..engines.directory.manifest import Manifest, content_id
from ..lora.lora import MODEL_METADATA, Lora, Origin, joining_weights, lora_from_factors, require_finite
from ..machine.locks import OneUser
from ..machine.progress import Report, silent
from ..machine.threads import require_threads
from ..specs import FAMILIES, AdapterSpec, EncoderSpec, Family
from .cache import EmbeddingCache, encoders_id
from .errors import PipelineBusy, PipelineInChild, PipelineNotPicklable
from .opening import OpenEngines
from .passes import ENCODERS, IMAGES_PER_PASS, Observer, Passes, Timings
from .pictures.images import ImageSource, load_image
from .pictures.pixels import pixels_dinov3, pixels_siglip2, square_image
from .pictures.sources import as_several, colours_mark, images_mark, load_squares
from .trace import Trace


class Pipeline:
    """An engines directory opened on a backend; a second call pays no set-up again.

    It keeps the build that it was opened with, even if the directory is rebuilt meanwhile. Once closed, everything that
    computes raises :class:`PipelineClosed`. It is for one thread at a time: a second one gets :class:`PipelineBusy`. A
    forked child and another process open their own.

    Args:
        engines: the directory that ``i2l build-engines`` made.
        backend: ``auto`` or the name of one, such as ``webgpu``.
        threads: of the CPU backend; by default one for each physical core, within the container's quota.
        ram_budget_bytes: for the CPU backend's weights: what fits stays in memory between images; by default nothing.
        vram_budget_bytes: for everything on a GPU; by default what is free there, less ``vram_margin_bytes``. On the
            cpu backend it has no effect, which is logged as a warning.
        vram_margin_bytes: left to other programs on the GPU.
        device: which card of several, as ``i2l doctor`` names them; by default the one with the most free memory, for
            webgpu the first.
        prove: with ``auto``, let a card that was not proven with these engines prove itself now, in a process of its
            own (:mod:`.proof`); without it such a card is passed over.
        before_card: called with a card before anything is taken of it; a program that has it full makes room then.
        report: told the steps done of the running stage; while the first opening of fp8 engines on the cpu backend
            converts them, MiB of packs; while a card proves itself, the phases.
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
        device: str | None = None,
        prove: bool = True,
        before_card: Callable[[CardFacts], None] = lambda _: None,
        report: Report = silent,
        cache: Path | None = None,
        trace: Trace | None = None,
    ) -> None:
        require_threads(threads)
        self._one = OneUser(lambda: PipelineBusy(engines), lambda: PipelineInChild(engines))
        self._open = OpenEngines(
            engines,
            backend=backend,
            limits=Limits(
                images=IMAGES_PER_PASS,
                threads=threads,
                ram_budget_bytes=ram_budget_bytes,
                vram=VramBudget(vram_budget_bytes, vram_margin_bytes),
                device=device,
                report=report,
                before_card=before_card,
            ),
            prove=prove,
        )
        self._passes = Passes(self._open, report, trace)
        self.cache: EmbeddingCache | None = None if cache is None else EmbeddingCache(cache, self._encoders_id)
        self.from_cache: list[bool] = []
        """For each image of the last call that embedded images: did its embedding come from the cache?"""

    @property
    def timings(self) -> Timings:
        """Seconds spent per stage of the last call."""
        return self._passes.timings

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
        ignore_icc: bool = False,
    ) -> Lora:
        """One LoRA from one or more images; its rank is four per image.

        Args:
            images: paths, PIL images or uint8/float arrays ``[height, width, channels]``; or one array ``[images,
                height, width, channels]``.
            strength: multiplies the LoRA's effect; linear, as it scales one factor only.
            weights: how much each image counts, one number each, taken as they are; by default ``1 / images`` each.
            ignore_icc: take the pixels for sRGB whatever their colour profile says, as the original does.

        Raises:
            NoImages, ImageError: nothing to read, or an image that cannot be used.
            StrengthInvalid, WeightsMismatch: a number is not finite, or there is not one weight per image; found before
                any computing.
        """
        with self._one.using():
            self._passes.timings = Timings()
            require_finite("strength", strength)
            with self.timings.stage("images"):
                squares, hashes = load_squares(images, ignore_icc=ignore_icc)
            joining_weights(weights, len(squares), "image")
            lora = self.lora_from_embeddings(self.embed(squares), strength=strength, weights=weights)
            lora.metadata |= images_mark(hashes) | colours_mark(ignore_icc=ignore_icc)
            return lora

    def embed(self, images: Sequence[ImageSource] | ImageSource) -> Array:
        """The embeddings of images, float32 ``[images, 5632]``: SigLIP2's 1536 values, then DINOv3's 4096.

        At most :data:`IMAGES_PER_PASS` images share a pass over the weights.
        """
        _ = self._backend  # closed? Then not even what the cache knows
        with self.timings.stage("images"):
            squares = [square_image(load_image(image)) for image in as_several(images)]
        with self._one.using():
            if self.cache is None:
                self.from_cache = [False] * len(squares)
                return self._embed_squares(squares)
            embeddings, self.from_cache = self.cache.embed(squares, self._embed_squares, IMAGES_PER_PASS)
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
        with self._one.using():
            return self._passes.embeddings(pixels, observe)

    def lora_from_embeddings(
        self, embeddings: Array, *, strength: float = 1.0, weights: Sequence[float] | None = None
    ) -> Lora:
        """One LoRA from embeddings ``[images, 5632]``; strength and weights as in :meth:`lora_from_images`."""
        return self.lora_from_factors(self.factors(embeddings), strength=strength, weights=weights)

    def factors(self, embeddings: Array) -> dict[str, tuple[Array, Array]]:
        """``module -> (A [images, rank, in], B [images, out, rank])``: the factors of every image, not yet joined."""
        with self._one.using():
            return self._passes.factors(embeddings)

    def lora_from_factors(
        self,
        factors: Mapping[str, tuple[Array, Array]],
        *,
        strength: float = 1.0,
        weights: Sequence[float] | None = None,
    ) -> Lora:
        """Join what :meth:`factors` gave; the metadata says what of."""
        lora = lora_from_factors(factors, strength, weights)
        images = lora.rank // self._adapter.rank
        lora.metadata |= MODEL_METADATA[self._adapter.diffusion_model] | self.origin.marks(images, strength, weights)
        return lora

    @property
    def origin(self) -> Origin:
        """What the headers of its LoRAs say of its engines."""
        return Origin(self.manifest.precision, content_id(self.manifest, FAMILIES)[:16])

    @property
    def vram(self) -> dict[str, int] | None:
        """Bytes of VRAM: the budget, the plan's peak; of a device its graphs and the measured peak; None on the CPU."""
        backend = self._backend
        if not isinstance(backend, Planned):
            return None
        plan = backend.residency
        facts = {"budget_bytes": plan.budget_bytes, "planned_peak_bytes": plan.peak_bytes}
        if isinstance(backend, DeviceBackend):
            facts |= backend.graph_facts
            facts["measured_peak_bytes"] = backend.peak_bytes
        return facts

    def close(self) -> None:
        """Give sessions and mapped packs back. A forked child leaves them to its parent."""
        if self._one.in_child:
            return
        with self._one.using():
            self._passes.settle()
            self._open.close()

    def __reduce__(self) -> NoReturn:
        raise PipelineNotPicklable(self._open.path)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _encoders_id(self) -> str:
        return encoders_id(content_id(self._open.running, ENCODERS), self._open.computes, self._backend.fingerprint)

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
    device: str | None = None,
    prove: bool = True,
    report: Report = silent,
    cache: Path | str | None = None,
) -> Pipeline:
    """Open an engines directory; use it as a context manager or call ``close()``. See :class:`Pipeline`.

    ``cache`` names a folder for embeddings. Unlike the command line, Python keeps none unless it is told where:
    a library does not write into a home directory by itself.
    """
    return Pipeline(
        Path(engines).expanduser(),
        backend=backend,
        threads=threads,
        ram_budget_bytes=ram_budget_bytes,
        vram_budget_bytes=vram_budget_bytes,
        vram_margin_bytes=vram_margin_bytes,
        prove=prove,
        device=device,
        report=report,
        cache=None if cache is None else Path(cache).expanduser(),
    )
