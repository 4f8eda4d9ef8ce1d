"""Equalisation: channel sizes are moved between a matrix and what feeds it, before both become eight bits.

A network computes the same if channel k of a linear's input is multiplied by c[k] and column k of its matrix divided by
it. The multiplier folds into what makes the input: a norm's weight and bias, the rows that make v, the rows of the up
projection (Nagel et al. 2019, "Data-Free Quantization Through Weight Equalization and Bias Correction"). With m[k] the
size of the channel and n[k] the norm of the column, the error of a rotated eight-bit product grows with ``|m c| |n /
c|``, which is least at ``c = sqrt(n / m)``. Rotation alone spreads a channel that is 100 times the others as noise over
all of them, though its column may be 100 times smaller; equalised, it is like any other.

No data is needed, as m follows from the weights: a norm gives ``sqrt(weight^2 + bias^2)``, and row j of a matrix gives
``sqrt(sum_k (W[j, k] m[k])^2 + bias[j]^2)``. m and n only choose c, and every c is exact, so they are taken from
samples of the columns and rows.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from .stack import Stack, every

SAMPLES = 256
"""Rows or columns looked at: their norms are within about 5 % then."""
WIDEST = 1e4
"""Channels are equalised within this factor; beyond it a value is dead rather than small."""
DEAD = 1e-10
"""A median below this is taken as this, so that squares and quotients stay finite where most channels are dead."""


@dataclass(frozen=True)
class Feed:
    """What makes the input of a matrix, where a channel can be scaled without changing the function."""

    matrix: str
    norm: str = ""
    """The norm whose output it is, or else:"""
    rows_of: str = ""
    """the matrix whose rows ``[start, stop)``, as fractions, pass on linearly: v through attention, up beside gate."""
    start: float = 0.0
    stop: float = 1.0
    gated: bool = False
    """The rows before ``start`` multiply the input too, through SiLU."""


FEEDS: Mapping[str, tuple[Feed, ...]] = {
    "siglip2.block": (
        Feed("attention.qkv", norm="norm1"),
        Feed("attention.out", rows_of="attention.qkv", start=2 / 3),
        Feed("mlp.up", norm="norm2"),
    ),
    "siglip2.head": (
        Feed("attention.kv", norm="norm"),
        Feed("attention.out", rows_of="attention.kv", start=1 / 2),
        Feed("mlp.up", norm="norm2"),
    ),
    "dinov3.block": (
        Feed("attention.qkv", norm="norm1"),
        Feed("attention.out", rows_of="attention.qkv", start=2 / 3),
        Feed("mlp.gate_up", norm="norm2"),
        Feed("mlp.down", rows_of="mlp.gate_up", start=1 / 2, gated=True),
    ),
}


@dataclass
class Gains:
    """What to multiply a step's weights by."""

    rows: dict[str, Tensor] = field(default_factory=dict)
    """``name -> [out_features]``: rows of a matrix and values of its bias, or values of a norm's weight and bias."""
    columns: dict[str, Tensor] = field(default_factory=dict)
    """``matrix -> [in_features]``."""


def plan_gains(graph: str, matrices: Mapping[str, Stack], plain: Mapping[str, Tensor]) -> Gains:
    """Choose the multipliers of one step.

    Args:
        graph: such as ``dinov3.block``; graphs without an entry in :data:`FEEDS` get none.
        matrices: the step's matrices by name; others may be among them.
        plain: ``name -> values`` of norms and biases.
    """
    gains = Gains()
    sizes: dict[str, Tensor] = {}
    for feed in FEEDS.get(graph, ()):
        values = matrices[feed.matrix]
        if feed.norm:
            size = torch.hypot(plain[f"{feed.norm}.weight"], plain[f"{feed.norm}.bias"])
        else:
            first, last = (round(edge * len(sizes[feed.rows_of])) for edge in (feed.start, feed.stop))
            size = sizes[feed.rows_of][first:last]
            if feed.gated:
                size = size * sizes[feed.rows_of][:first]
        size = _within(size)
        sizes[feed.matrix] = _within(_row_sizes(values, size, plain.get(f"{feed.matrix}.bias")))
        gain = (_column_norms(values, sizes[feed.matrix]) / size).sqrt()
        gain = _within(gain) / gain.median()
        gains.columns[feed.matrix] = 1 / gain
        if feed.norm:
            gains.rows[feed.norm] = gain
        else:
            rows = gains.rows.setdefault(feed.rows_of, torch.ones(matrices[feed.rows_of].shape[0]))
            rows[first:last] = gain
    return gains


def _row_sizes(values: Stack, size: Tensor, bias: Tensor | None) -> Tensor:
    """The size of every output ``[out]`` for inputs of size ``size [in]``, from a sample of the columns."""
    step = max(1, values.shape[1] // SAMPLES)
    sampled = values.sampled_columns(step) * every(size, step)
    squares = sampled.square().sum(dim=1) * (values.shape[1] / sampled.shape[1])
    return (squares if bias is None else squares + bias.square()).sqrt()


def _column_norms(values: Stack, row_sizes: Tensor) -> Tensor:
    """The norm of every column ``[in]`` of the matrix with its rows brought to one size, from a sample of the rows."""
    step = max(1, values.shape[0] // SAMPLES)
    return _within((values.sampled_rows(step) / row_sizes[::step, None]).square().mean(dim=0).sqrt())


def _within(values: Tensor) -> Tensor:
    """Keep values within a wide band around their median, so that no channel is divided by zero."""
    middle = values.median().clamp_min(DEAD)
    return values.clamp(middle / WIDEST, middle * WIDEST)
