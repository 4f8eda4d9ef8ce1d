"""What a pack stores of a matrix in each precision: names, dtypes and shapes, known without torch.

A precision's class begins with the one here that lays its packs out; so `i2l plan` computes sizes where nothing else of
a build is installed.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol, TypeAlias

from ...engines.cpu.rotation import balanced_size, block_size
from ...specs import Spec
from ..checkpoints.weights import Matrix, Weight

Stored: TypeAlias = tuple[str, str, tuple[int, ...]]
"""``(suffix, safetensors dtype, shape)``."""
PANEL = 128
"""Output channels side by side in memory; the adapter's input channels of one scale, at most. onnxruntime packs the
encoders' weights at every call, as they are inputs; narrow panels take half the time of whole rows with AMX, four
fifths without (docs/adr/0001)."""
WIDEST_ROW = 4096
"""Output channels of the adapter side by side in memory, at most: a page, the sums of a row stay in a core's nearest
cache, and the weights in the next one until their second use (docs/adr/0010)."""


class Storing(Protocol):
    """How a precision lays out packs."""

    def stored(self, out_features: int, in_features: int, group: int | None = None) -> list[Stored]:
        """The pack's tensors for a matrix, in file order; ``group``: rows that stay together, all by default."""
        ...


def panel_width(group: int) -> int:
    """The largest divisor of ``group``, the rows that stay together, up to :data:`PANEL`."""
    return largest_divisor(group, PANEL)


def largest_divisor(count: int, most: int) -> int:
    """The largest divisor of ``count`` up to ``most``."""
    return next(divisor for divisor in range(min(count, most), 0, -1) if count % divisor == 0)


@dataclass(frozen=True)
class StoredFloat:
    """The values as they are, ``[out, in]``."""

    dtype: str

    def stored(self, out_features: int, in_features: int, group: int | None = None) -> list[Stored]:  # noqa: ARG002
        return [("weight", self.dtype, (out_features, in_features))]


class StoredFloat8:
    """FP8 ``[out, in]``, one scale per output channel."""

    def stored(self, out_features: int, in_features: int, group: int | None = None) -> list[Stored]:  # noqa: ARG002
        return [("weight", "F8_E4M3", (out_features, in_features)), ("scale", "F32", (out_features,))]


class StoredBalancedInt8:
    """int8 in panels of input and output channels, each block of inputs brought to some more.

    The dimension of one is there for the graph: an input that is reshaped might be copied.
    """

    def stored(self, out_features: int, in_features: int, group: int | None = None) -> list[Stored]:  # noqa: ARG002
        size = block_size(in_features)
        blocks = in_features // size
        each = largest_divisor(blocks, max(1, PANEL // size))
        row = largest_divisor(out_features, WIDEST_ROW)
        panels = (blocks // each, out_features // row)
        return [("weight", "I8", (*panels, 1, each * balanced_size(size), row)), ("scale", "F32", (*panels, 1, 1, row))]


class StoredRotatedInt8:
    """int8 in panels of output channels, one scale for each of these."""

    def stored(self, out_features: int, in_features: int, group: int | None = None) -> list[Stored]:
        width = panel_width(group or out_features)
        panels = out_features // width
        return [("weight", "I8", (panels, in_features, width)), ("scale", "F32", (panels, 1, width))]


def storing_for(name: str, spec: Spec) -> Storing:
    """How the precision ``name`` lays out a model's packs; int8 differs for products of few rows."""
    if name == "int8":
        return StoredBalancedInt8() if spec.family == "adapter" else StoredRotatedInt8()
    kept: dict[str, Storing] = {"fp8": StoredFloat8(), "bf16": StoredFloat("BF16"), "fp32": StoredFloat("F32")}
    return kept[name]


def stored_tensors(weights: Sequence[Weight], storing: Storing) -> list[Stored]:
    """``(name, safetensors dtype, shape)`` of a graph's weights as the pack stores them, in file order."""
    stored: list[Stored] = []
    for weight in weights:
        if isinstance(weight, Matrix):
            parts = storing.stored(weight.out_features, weight.in_features, weight.group)
            stored += [(f"{weight.name}.{suffix}", dtype, shape) for suffix, dtype, shape in parts]
        else:
            stored.append((weight.name, "F32", weight.shape))
    return stored
