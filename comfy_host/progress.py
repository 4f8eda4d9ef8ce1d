"""ComfyUI's progress bar and interrupt behind i2l's :class:`Report`, and where the bar stands.

A report is called before every step, so an interrupt acts within one chunk. ComfyUI's exception passes through: nothing
here or in the pipeline catches it. While engines are built, reports come from the thread that writes the packs; the bar
finds its node through context variables, so the caller's context goes along.
"""

import math
from collections.abc import Callable
from contextvars import copy_context
from typing import TypeAlias

from comfy.model_management import throw_exception_if_processing_interrupted
from comfy.utils import ProgressBar

from ..engines.directory.manifest import Manifest
from ..machine.progress import Report
from .node_text import Tell

Place: TypeAlias = Callable[[str, int, int], tuple[int, int]]
"""``(stage, done, total)`` of a report to where the bar stands, ``(value, of)``."""
EXPORT_SHARE = 4
"""The graphs of a build have a quarter of what its packs have of the bar: exporting takes seconds whatever the size of
the models, so that is too much for the published ones and too little for tiny ones."""


def comfy_report(tell: Tell, place: Place, doing: str) -> Report:
    """A :class:`Report` that moves the running node's bar, says the stage on the node and raises ComfyUI's interrupt.

    Args:
        tell: shows a text on the node.
        place: where the bar stands.
        doing: what the text begins with, such as ``building engines, once: ``.
    """
    context = copy_context()
    bar = ProgressBar(1)

    def move(stage: str, done: int, total: int) -> None:
        throw_exception_if_processing_interrupted()
        value, of = place(stage, done, total)
        tell(f"{doing}{stage}, {100 * value // max(of, 1)} %")
        bar.update_absolute(value, of)

    return lambda stage, done, total: context.run(move, stage, done, total)


def whole(stage: str, done: int, total: int) -> tuple[int, int]:  # noqa: ARG001 - a Place
    """For reports whose ``done`` and ``total`` are of the whole."""
    return done, total


def of_build(graphs: int) -> Place:
    """For a build: graphs are exported before there are bytes of packs to count, so they count by themselves.

    Args:
        graphs: how often a report comes without new bytes: once before a model's graphs, and after each.
    """
    exported, done_before = 0, 0

    def place(stage: str, done: int, total: int) -> tuple[int, int]:  # noqa: ARG001
        nonlocal exported, done_before
        exported += done == done_before and exported < graphs
        done_before = done
        unit = max(total // (EXPORT_SHARE * graphs), 1)
        return exported * unit + done, graphs * unit + total

    return place


def of_run(steps: int) -> Place:
    """For a run: the steps of all stages in turn; the adapter ends it, as known pictures skip the encoders.

    Args:
        steps: of all stages together.
    """
    position, stage_before, done_before = 0, "", 0

    def place(stage: str, done: int, total: int) -> tuple[int, int]:
        nonlocal position, stage_before, done_before
        goes_on = stage == stage_before and done >= done_before
        position += done - done_before if goes_on else done
        if stage == "adapter":
            position = steps - total + done
        stage_before, done_before = stage, done
        return position, steps

    return place


def total_steps(manifest: Manifest, images: int) -> int:
    """The steps of a run: the encoders once per group of images that share a pass, the adapter once."""
    from ..runtime.passes import IMAGES_PER_PASS  # noqa: PLC0415 - onnxruntime: starting ComfyUI must not pay for it

    steps = {family: sum(len(chunk.steps) for chunk in model.chunks) for family, model in manifest.models.items()}
    passes = math.ceil(images / IMAGES_PER_PASS)
    return passes * (steps["siglip2"] + steps["dinov3"]) + steps["adapter"]
