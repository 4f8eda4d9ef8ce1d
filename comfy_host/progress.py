"""ComfyUI's progress bar and interrupt behind i2l's :class:`Report`.

A report is called before every step, so an interrupt acts within one chunk. ComfyUI's exception passes through: nothing
here or in the pipeline catches it. While engines are built, reports come from the thread that writes the packs; the bar
finds its node through context variables, so the caller's context goes along.
"""

import math
from contextvars import copy_context

from comfy.model_management import throw_exception_if_processing_interrupted
from comfy.utils import ProgressBar

from ..engines.directory.manifest import Manifest
from ..machine.progress import Report


def comfy_report(total: int | None = None) -> Report:
    """A :class:`Report` that moves the running node's bar and raises ComfyUI's interrupt.

    Args:
        total: units of all stages together, which then count one after the other towards one bar; the adapter ends it,
            as pictures whose embeddings are known skip the encoders. Without it every report's ``done`` and ``total``
            are of the whole.
    """
    context = copy_context()
    bar = ProgressBar(total or 1)
    position, stage_before, done_before = 0, "", 0

    def move(stage: str, done: int, stage_total: int) -> None:
        nonlocal position, stage_before, done_before
        throw_exception_if_processing_interrupted()
        goes_on = stage == stage_before and done >= done_before
        position += done - done_before if goes_on else done
        if total is not None and stage == "adapter":
            position = total - stage_total + done
        stage_before, done_before = stage, done
        bar.update_absolute(*((done, stage_total) if total is None else (position, total)))

    return lambda stage, done, stage_total: context.run(move, stage, done, stage_total)


def total_steps(manifest: Manifest, images: int) -> int:
    """The steps of a run: the encoders once per group of images that share a pass, the adapter once."""
    from ..runtime.passes import IMAGES_PER_PASS  # noqa: PLC0415 - onnxruntime: starting ComfyUI must not pay for it

    steps = {family: sum(len(chunk.steps) for chunk in model.chunks) for family, model in manifest.models.items()}
    passes = math.ceil(images / IMAGES_PER_PASS)
    return passes * (steps["siglip2"] + steps["dinov3"]) + steps["adapter"]
