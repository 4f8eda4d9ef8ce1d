"""ComfyUI's progress bar and interrupt behind i2l's :class:`Report`.

A report is called before every step, so an interrupt acts within one chunk. ComfyUI's exception passes through: nothing
here or in the pipeline catches it. While engines are built, reports come from the thread that writes the packs; the bar
finds its node through context variables, so the caller's context goes along.
"""

from collections.abc import Mapping
from contextvars import copy_context

from comfy.model_management import throw_exception_if_processing_interrupted
from comfy.utils import ProgressBar

from ..engines.manifest import Manifest
from ..files import Report
from ..specs import FAMILIES


def comfy_report(stage_totals: Mapping[str, int] | None = None) -> Report:
    """A :class:`Report` that moves the running node's bar and raises ComfyUI's interrupt.

    Args:
        stage_totals: the units of each stage in order, if the stages count one after the other towards one bar; without
            it every report's ``done`` and ``total`` are of the whole.
    """
    context = copy_context()
    bar = ProgressBar(sum(stage_totals.values()) if stage_totals else 1)
    starts, before = {}, 0
    for stage, count in (stage_totals or {}).items():
        starts[stage], before = before, before + count

    def move(stage: str, done: int, total: int) -> None:
        throw_exception_if_processing_interrupted()
        bar.update_absolute(starts.get(stage, 0) + done, before or total)

    return lambda stage, done, total: context.run(move, stage, done, total)


def step_totals(manifest: Manifest) -> dict[str, int]:
    """The steps of each model in the order in which a pipeline runs them."""
    return {family: sum(len(chunk.steps) for chunk in manifest.models[family].chunks) for family in FAMILIES}
