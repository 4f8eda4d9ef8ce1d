"""How far a right card may be from float32: the proof's tolerances, from the numpy reference with rounded operands.

One block, head and embedding of each encoder and each kind of adapter layer at their published widths, seeded weights,
the proof's own activations, and its own error: that of the worst token's change. What a card rounds is played: operands
of products and what leaves them to bfloat16, the attention's scores and shares too; for FP8 the activations row by row
to e4m3, as its weights are that already. Queries and keys are made larger by a gain, as models attend more sharply than
random weights do.

Usage: python benchmarks/tolerances.py [--preset full] [--gains 1 2 4]
"""

import argparse
import dataclasses
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np

from i2l.engines.base import Array
from i2l.engines.cpu import plain
from i2l.engines.cpu.plain import HeldWeights, plain_step
from i2l.engines.directory.tensorfile import TensorInfo
from i2l.export.checkpoints.weights import graph_weights
from i2l.export.precisions.choosing import precision_for
from i2l.export.precisions.storing import stored_tensors
from i2l.runtime.proof.activations import seeded_activation
from i2l.runtime.proof.judging import worst_error
from i2l.specs import PRESETS, EncoderSpec, Spec

LARGEST = 448.0
"""Of e4m3."""
Rounding = Callable[[Array], Array]
LARGEST_E4M3 = 448.0
PLAYED: Any = plain
"""Whose attention is replaced."""
ATTENTION = plain._attended  # noqa: SLF001 - what is played is inside


def main() -> None:
    """Print a line for each kind of graph and gain."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--preset", choices=sorted(PRESETS), default="full")
    parser.add_argument("--gains", type=float, nargs="+", default=[1.0, 2.0, 4.0], help="of queries and keys")
    arguments = parser.parse_args()
    print("graph, gain: " + ", ".join(ROUNDINGS))
    for spec in PRESETS[arguments.preset]:
        for gain in arguments.gains if isinstance(spec, EncoderSpec) else [1.0]:
            for graph, errors in errors_of(spec, gain):
                print(f"{graph}, {gain:g}: " + ", ".join(f"{error:.2%}" for error in errors), flush=True)


def errors_of(spec: Spec, gain: float) -> Iterator[tuple[str, list[float]]]:
    """``(graph, the worst token's error by each rounding)``."""
    for graph, weights in graph_weights(spec).items():
        held = seeded_weights(spec, stored_tensors(weights, precision_for("fp32", spec)), gain)
        activation = seeded_activation(spec, graph, images=2)
        wanted = plain_step(spec, graph, activation, held)
        errors = []
        for leaves, operands in ROUNDINGS.values():
            PLAYED._attended = rounded_attention(leaves)  # noqa: SLF001
            found = plain_step(spec, graph, activation, Rounded(held.infos, held.arrays, leaves, operands))
            PLAYED._attended = ATTENTION  # noqa: SLF001
            errors.append(worst_error(spec, activation, found, wanted))
        yield graph, errors


def seeded_weights(spec: Spec, stored: list[tuple[str, str, tuple[int, ...]]], gain: float) -> HeldWeights:
    """Matrices that keep a row's norm, norms and scales around one, small biases; float32."""
    random = np.random.default_rng(0)
    arrays: dict[str, Array] = {}
    for name, _, shape in stored:
        values = random.standard_normal(shape, np.float32)
        if len(shape) == 2 and name.endswith(".weight"):
            arrays[name] = values / np.float32(np.sqrt(shape[1]))
            if name == "attention.qkv.weight" and isinstance(spec, EncoderSpec):
                arrays[name][: 2 * spec.hidden] *= gain
        else:
            one = name.endswith("weight") or name.startswith("scale")
            arrays[name] = np.float32(one) + np.float32(0.1) * values
    infos = {name: TensorInfo("F32", shape, 0) for name, _, shape in stored}
    return HeldWeights(infos, arrays)


@dataclasses.dataclass(frozen=True)
class Rounded(HeldWeights):
    """Products as a card makes them."""

    leaves: Rounding
    """What leaves a product, and weights."""
    operands: Rounding
    """The activations that go in."""

    def product(self, x: Array, name: str) -> Array:
        matrix = self.leaves(self.arrays[f"{name}.weight"])
        y: Array = self.operands(x) @ matrix.T
        return self.leaves(y + self.vector(f"{name}.bias") if f"{name}.bias" in self.infos else y)


def rounded_attention(rounding: Rounding) -> Callable[[Array, Array, Array], Array]:
    """The attention, all of whose values are rounded."""

    def attended(q: Array, k: Array, v: Array) -> Array:
        q, k, v = (rounding(x) for x in (q, k, v))
        scores = rounding(q @ k.swapaxes(-1, -2) / np.float32(np.sqrt(q.shape[-1])))
        shares = np.exp(scores - scores.max(axis=-1, keepdims=True))
        mixed = rounding(rounding(shares / shares.sum(axis=-1, keepdims=True)) @ v)
        return np.asarray(mixed.transpose(0, 2, 1, 3).reshape(-1, q.shape[1] * q.shape[3]), np.float32)

    return attended


def bfloat16(x: Array) -> Array:
    """To the nearest, ties to even."""
    bits = np.ascontiguousarray(x, np.float32).view(np.uint32)
    return ((bits + 0x7FFF + ((bits >> 16) & 1)) & np.uint32(0xFFFF0000)).view(np.float32)


def e4m3_rows(x: Array) -> Array:
    """Each row by a scale of its own to e4m3: three bits behind the leading one, down to 2**-9."""
    scale = np.maximum(np.abs(x).max(axis=-1, keepdims=True), np.float32(1e-30)) / np.float32(LARGEST_E4M3)
    scaled = x / scale
    step = np.exp2(np.maximum(np.floor(np.log2(np.maximum(np.abs(scaled), 2.0**-20))), -6) - 3)
    return np.asarray(np.rint(scaled / step) * step * scale, np.float32)


ROUNDINGS: Mapping[str, tuple[Rounding, Rounding]] = {
    "bfloat16": (bfloat16, bfloat16),
    "float8": (bfloat16, e4m3_rows),
}


if __name__ == "__main__":
    main()
