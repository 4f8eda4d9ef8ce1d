"""What a build or a batch will take, said before it begins: by its size, from what one machine needed.

The rates were measured on machines of two cores (benchmarks/RESULTS.md), so times are rough: another machine may be
several times faster or slower. Sizes are exact.
"""

from collections.abc import Mapping, Sequence
from typing import Literal

from ..engines.device.predict import matrix_values, step_operations
from ..engines.directory.manifest import Model
from ..lora.lora import DTYPES
from ..machine.wording import format_bytes
from ..specs import AdapterSpec, Family

OPERATIONS_PER_SECOND = 4.15e12 / 10.0
"""Full-size int8 engines took 40.02 s for four images of 4.15e12 operations each: two Zen 4 cores, commit 68d20d2."""
EXPORT_SECONDS = 20.0
"""Writing the graphs, whatever the size: the tiny preset's whole build took 23 s on two busy Zen 4 cores."""
BUILD_SECONDS_PER_BYTE = (61.1 - EXPORT_SECONDS) / (8.92 * 2**30)
"""Full-size int8 engines took 61.1 s, from cold checkpoints: two Xeon cores, commit d4087f5."""
VALUE_BYTES = {"F32": 4, "F16": 2, "BF16": 2}


def seconds_per_image(models: Mapping[Family, Model], precision: str) -> float | None:
    """Of one picture that shares its pass with others; None for precisions whose rate was not measured."""
    if precision not in {"int8", "fp8"}:  # the CPU runs fp8 as int8
        return None
    operations = 0.0
    for model in models.values():
        values = matrix_values(model)
        steps = (step for chunk in model.chunks for step in chunk.steps)
        operations += sum(step_operations(model, step.graph, values[step.name], 1) for step in steps)
    return operations / OPERATIONS_PER_SECOND


def lora_bytes(adapter: AdapterSpec, images: Sequence[int], dtype: Literal["bf16", "fp16", "fp32"]) -> int:
    """Of LoRAs of so many images each, without their headers, which take some ten thousand bytes."""
    values = sum(rows + columns for _, targets in adapter.kinds for _, rows, columns in targets)
    return sum(images) * adapter.rank * adapter.blocks * values * VALUE_BYTES[DTYPES[dtype]]


def build_seconds(nbytes: int) -> float:
    """Of building packs of so many bytes."""
    return EXPORT_SECONDS + nbytes * BUILD_SECONDS_PER_BYTE


def roughly(seconds: float | None) -> str:
    """A predicted time for people, which says what it is worth."""
    if seconds is None:
        return "how long is not predicted: of the CPU's precisions only int8's rate was measured"
    amount = (
        f"{max(seconds, 1):.0f} s"
        if seconds < 120
        else f"{seconds / 60:.0f} min"
        if seconds < 7200
        else f"{seconds / 3600:.1f} h"
    )
    return f"about {amount} on two cores of a server (predicted, not measured here)"


def room(needed_bytes: int, free_bytes: int) -> str:
    """Whether the disk has room, for people."""
    return f"{format_bytes(needed_bytes)} of disk, {format_bytes(free_bytes)} are free"
