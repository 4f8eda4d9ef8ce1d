"""The one open pipeline, kept from run to run until ComfyUI wants memory.

ComfyUI knows nothing of memory that onnxruntime or TensorRT hold: its memory management counts and unloads only what
stands in its list of loaded models. So an open pipeline enters that list as a model without weights, and whatever
unloads models (the button, ``/free``, another model that does not fit) closes the pipeline. The next run opens it
again. Before anything is taken of a card, to prove it or to open there, ComfyUI is asked for the memory, as for a model
of its own. For a card that is passed over, as it was proven slower than the CPU, nothing is asked.
"""

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from comfy.model_management import (
    free_memory,
    get_torch_device,
    load_models_gpu,
    soft_empty_cache,
    unet_offload_device,
)
from comfy.model_patcher import ModelPatcher
from comfy.patcher_extension import CallbacksMP

from ..engines.directory.manifest import Manifest
from ..machine.progress import Report, silent
from ..machine.wording import format_path
from .folders import embeddings_folder
from .requirements import pack_requirements

if TYPE_CHECKING:
    from ..engines.base import CardFacts
    from ..runtime.pipeline import Pipeline

log = logging.getLogger(__name__)


class OpenPipelines:
    """At most one pipeline, open for one build of engines on one backend within one budget."""

    def __init__(self) -> None:
        self._pipeline: Pipeline | None = None
        self._key: tuple[object, ...] | None = None
        # ComfyUI's list refers to it weakly and must not lose it while it unloads models (it then pops from a list that
        # has become shorter, which ends its worker thread): so it stays until the next one takes its place.
        self._patcher: Any = None
        self._report: Report = silent

    @contextmanager
    def use(
        self,
        engines: Path,
        manifest: Manifest,
        backend: str,
        vram_budget_bytes: int | None,
        opening: Report,
        report: Report,
        placeholder: Any,
    ) -> Iterator["Pipeline"]:
        """The pipeline for these engines, opened if it is not.

        Args:
            engines: the engines directory.
            manifest: its manifest.
            backend: ``auto`` or a backend's name.
            vram_budget_bytes: for a GPU backend; None leaves it to the pipeline.
            opening: told what opening takes, as the conversion of fp8 engines for the CPU does, once.
            report: told the steps done while the body runs.
            placeholder: a ``torch.nn.Module`` without weights, which stands for a newly opened pipeline in ComfyUI's
                list of models.
        """
        key = (engines, manifest.build, backend, vram_budget_bytes)
        try:
            if self._pipeline is None or self._key != key:
                self.close()
                with pack_requirements():
                    from ..runtime.pipeline import Pipeline  # noqa: PLC0415 - onnxruntime
                self._report = opening
                packs_bytes = sum(manifest.files[model.pack].nbytes for model in manifest.models.values())
                self._pipeline = Pipeline(
                    engines,
                    backend=backend,
                    vram_budget_bytes=vram_budget_bytes,
                    before_card=partial(make_room, packs_bytes, vram_budget_bytes),
                    report=self._tell,
                    cache=embeddings_folder(),
                )
                self._key = key
                log.info("i2l: opened %s on %s", format_path(engines), self._pipeline.backend_name)
                self._enter_list(placeholder)
            self._report = report
            yield self._pipeline
        finally:
            self._report = silent

    def close(self) -> None:
        """Give everything back; the next :meth:`use` opens again."""
        pipeline, self._pipeline = self._pipeline, None
        if pipeline is not None:
            pipeline.close()
            log.info("i2l: closed the pipeline; the next run opens it again")

    def _tell(self, stage: str, done: int, total: int) -> None:
        self._report(stage, done, total)

    def _enter_list(self, placeholder: Any) -> None:
        pipeline = self._pipeline
        # The cpu backend holds no VRAM, but stands under the device all the same: only that one's models are unloaded
        # when the user asks for memory, even if ComfyUI itself computes elsewhere.
        self._patcher = ModelPatcher(placeholder, get_torch_device(), unet_offload_device())

        def detached(_: Any, unpatch_all: bool) -> None:
            if unpatch_all and self._pipeline is pipeline:  # without it ComfyUI only swaps clones or clears up
                self.close()

        self._patcher.add_callback(CallbacksMP.ON_DETACH, detached)
        load_models_gpu([self._patcher])


def make_room(packs_bytes: int, vram_budget_bytes: int | None, card: "CardFacts") -> None:
    """Let ComfyUI unload as many of its models as a backend wants VRAM, before it takes anything of a card.

    torch keeps what they leave, and ComfyUI counts that as free; to others it is not before the cache is emptied.

    Args:
        packs_bytes: without a budget all weights are to find room, beside what ``auto`` leaves free.
        vram_budget_bytes: what the backend may take.
        card: of the backend.
    """
    from ..engines.base import MARGIN_BYTES  # noqa: PLC0415 - numpy

    device = get_torch_device()
    if device.type != "cpu" and not card.software:
        free_memory(vram_budget_bytes or packs_bytes + MARGIN_BYTES, device)
        soft_empty_cache()
