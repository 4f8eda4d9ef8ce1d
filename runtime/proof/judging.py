"""Is a result right? Pure: errors, tolerances with their reasons, and what a form of graphs has shown.

A block adds to what it is given, and beside a massive token its own work is small. So the error is that of the change,
and of the worst token. One in sixty-four wrong values of an attention is then seen, which a norm over all would hide.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TypeAlias

import numpy as np

from ...engines.base import Arithmetic, Array
from ...engines.directory.manifest import Chunk, Model, Step
from ...machine.wording import format_bytes
from ...specs import AdapterSpec, Spec
from .card_memory import Told

TOLERANCES: Mapping[Arithmetic, float] = {
    "float32": 1e-3,  # other orders of additions: 2e-5 seen at the preset tiny; real faults begin at percents
    # The next two by benchmarks/tolerances.py, the published widths in numpy with rounded operands: 4.7 % and 33 % for
    # a block that attends very sharply, 1.8 % and 12 % for one that attends as models do. More would hide faults of
    # FP8: a right card whose model attends that sharply is passed over rather than a wrong one taken.
    "bfloat16": 0.08,
    "float8": 0.3,
    "int8": 0.3,  # 63 levels on each side for a token that is not massive. Only the CPU has it, which is not proven
}
"""The largest relative error of a token, by what the operands of products are rounded to."""
LEAST_CHANGE = 1e-3
"""Of the result: a change that is smaller drowns in float32's own rounding, 6e-8 of the result."""
DRIVERS_BYTES = 512 << 20
"""That somebody else's count may be over the budget: what a driver and its libraries take for themselves differs from
card to card, and no card has been measured. A plan that is wrong is over by more, as models are gigabytes."""
UPLOAD_DOUBT = 3.0
"""Uploads are measured with chunks that wait for each other; a pass may hide that, and a machine's rate varies."""
SMALLEST = 1e-30
Interval: TypeAlias = tuple[float, float]
"""Beginning and end."""
NOT_FINITE = 1e9
"""The error of a value that is no number; records are JSON, which has none for it."""


@dataclass(frozen=True)
class FormOutcome:
    """What one form of a backend's graphs has shown."""

    form: str | None
    failure: str = ""
    """Why it is not right; empty if it passed."""
    refusal: str = ""
    """Why it could not even begin, such as engines that were not built for it: no fault of the card."""
    lasting: bool = True
    """False: a refusal for lack of memory, which may be over at the next try."""
    errors: Mapping[str, float] = field(default_factory=dict)
    """``graph -> the worst relative error``."""
    tolerance: float = 0.0
    alone: bool = False
    """In a batch a picture gets other bits, within the tolerance: so it is run alone. A LoRA is that of its picture."""
    peak_bytes: int | None = None
    """The most that the backend counted on the card; None where it counts nothing."""
    budget_bytes: int | None = None
    """What was allowed."""
    told_bytes: int | None = None
    """What the process held of the card by somebody else's count, after the passes; None where nobody can tell."""
    told_by: str = ""
    """Whose count: ``NVML``, ``the kernel``, or for a renderer in software ``the process``."""
    upload_bytes_per_second: float | None = None
    """With nothing computing."""
    busy_upload_bytes_per_second: float | None = None
    """While computing, with the smallest slots."""
    overlap: float | None = None
    """By the device's events where everything streams: see :func:`overlap`. None for a device that has no lanes."""
    mostly_copying: bool = False
    """Copying took longer than computing there, so the share is of computing."""
    pinned_bytes_per_second: float | None = None
    """Of plain copies from pinned memory, by the same events."""
    copying_share: float | None = None
    """Of that, what chunks came at, with what they waited for left out."""
    streaming_share: float | None = None
    """Of that, what chunks came at with nothing computing, from the first copy of a model to its last."""
    unpinned: bool = False
    """The system let no memory be pinned to compare with: so there are no shares."""
    ms_per_image: float | None = None
    """One image alone, by the plan in force."""
    estimated: bool = False
    """The time is of a part of the chunks, for all of them by their bytes."""
    seconds: float = 0.0
    """The proof took."""

    @property
    def passed(self) -> bool:
        return not self.failure and not self.refusal


def first_steps(model: Model) -> list[Step]:
    """The first step of each kind of graph."""
    firsts: dict[str, Step] = {}
    for step in _steps(model.chunks):
        firsts.setdefault(step.graph, step)
    return list(firsts.values())


def stretch(chunks: tuple[Chunk, ...], most: int) -> tuple[Chunk, ...]:
    """So many chunks of a model that all kinds of steps are there and slots are used again: the first, and the last."""
    return chunks if len(chunks) <= most else (*chunks[: most - 1], chunks[-1])


def worst_error(spec: Spec, activation: Array, found: Mapping[str, Array], wanted: Mapping[str, Array]) -> float:
    """The largest relative error of a token's change (of a factor, for the adapter)."""
    errors = []
    for name, right in wanted.items():
        width = right[0].size if isinstance(spec, AdapterSpec) else right.shape[-1]
        change = right - activation if right.shape == activation.shape else right
        rows, changes, rights = (x.reshape(-1, width).astype(np.float64) for x in (found[name] - right, change, right))
        scale = np.maximum(np.linalg.norm(changes, axis=1), LEAST_CHANGE * np.linalg.norm(rights, axis=1))
        errors.append(float((np.linalg.norm(rows, axis=1) / np.maximum(scale, SMALLEST)).max()))
    return float(np.nan_to_num(np.max(errors), nan=NOT_FINITE, posinf=NOT_FINITE))  # unlike max(), NaN wins here


def error_failure(errors: Mapping[str, float], tolerance: float) -> str:
    """Which graphs are wrong; empty if none is."""
    wrong = [f"{graph} {_off(error)}" for graph, error in errors.items() if error > tolerance]
    return f"{', '.join(wrong)} (tolerance {_percent(tolerance)})" if wrong else ""


def difference(first: Iterable[Array], second: Iterable[Array]) -> float:
    """How far two results are apart, relative to the first, in the worst array; 0 if and only if no bit differs."""
    worst = 0.0
    for x, y in zip(first, second, strict=True):
        if not np.array_equal(x.view(np.uint32), y.view(np.uint32)):
            apart = np.linalg.norm(x - y) / max(float(np.linalg.norm(x)), SMALLEST)
            worst = max(worst, float(np.nan_to_num(apart, nan=NOT_FINITE, posinf=NOT_FINITE)), SMALLEST)
    return worst


def difference_failure(what: str, apart: float) -> str:
    """Say that two results are not the same; empty if they are."""
    return f"{what}: another result, {_percent(apart)} apart" if apart else ""


def memory_failure(peak_bytes: int | None, budget_bytes: int | None, told: Told | None = None) -> str:
    """Say that more was in use than was allowed; empty if not, or if nobody can tell.

    Args:
        peak_bytes: by the backend's count.
        budget_bytes: what was allowed.
        told: by somebody else's count.
    """
    if budget_bytes is None:
        return ""
    if peak_bytes is not None and peak_bytes > budget_bytes:
        return f"it took {format_bytes(peak_bytes)} of the card, {format_bytes(budget_bytes)} were allowed"
    if told and told.nbytes > budget_bytes + DRIVERS_BYTES:
        held, allowed = format_bytes(told.nbytes), format_bytes(budget_bytes)
        return f"it holds {held} of the card by the count of {told.by}, {allowed} were allowed"
    return ""


def time_failure(ms_per_image: float | None, streamed_bytes: int | None, upload_bytes_per_second: float | None) -> str:
    """Say that an image cannot have been computed in this time, as its weights were not there yet; empty if it can.

    A clock that stops before the card does would make any card the fastest.
    """
    if not (ms_per_image and streamed_bytes and upload_bytes_per_second):
        return ""
    least_ms = 1e3 * streamed_bytes / upload_bytes_per_second
    if ms_per_image >= least_ms / UPLOAD_DOUBT:
        return ""
    return f"its times cannot be true: an image in {ms_per_image:.3g} ms, whose uploads alone take {least_ms:.3g} ms"


def busy(lane: Iterable[Interval]) -> float:
    """How long a lane worked."""
    return sum(end - begin for begin, end in lane)


def overlap(first: Sequence[Interval], second: Sequence[Interval]) -> float | None:
    """The time in which both lanes worked, over that in which the less busy one did: 1 if it is wholly hidden.

    None where one did not work at all.

    Args:
        first: when a lane worked; as a lane does one thing after another, in order and apart.
        second: the same of another lane.
    """
    both, i, j = 0.0, 0, 0
    while i < len(first) and j < len(second):
        both += max(0.0, min(first[i][1], second[j][1]) - max(first[i][0], second[j][0]))
        if first[i][1] < second[j][1]:
            i += 1
        else:
            j += 1
    less = min(busy(first), busy(second))
    return both / less if less else None


def _steps(chunks: Iterable[Chunk]) -> Iterator[Step]:
    for chunk in chunks:
        yield from chunk.steps


def _off(error: float) -> str:
    return "gives no number" if error >= NOT_FINITE else f"{_percent(error)} off"


def _percent(error: float) -> str:
    return f"{100 * error:.2g} %"
