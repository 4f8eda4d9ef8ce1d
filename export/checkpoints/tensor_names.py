"""The tensors of a known model, found under whatever names a program saved them.

transformers saves DINOv3's blocks as ``model.layer.N``, Google SigLIP2's tower behind ``vision_model.`` with a text
tower beside; scaled FP8 files keep a scale beside each weight, and some keep buffers. So a tensor is looked for behind
prefixes: one for all of a model, and ``model.`` behind it.
"""

import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from ...engines.directory.tensorfile import TensorInfo
from .shapes import Shapes

FLOAT_DTYPES = frozenset({"F32", "F16", "BF16"})
FLOAT8_DTYPES = frozenset({"F8_E4M3", "F8_E5M2"})
BUFFERS = re.compile(
    r"(?:.*\.)?(?:position_ids|inv_freq|periods|bias_mask|num_batches_tracked|scaled_fp8|comfy_quant|scale_input|input_scale"
    r"|input_activation_scale)"
)
"""Tensors that a model computes anew, and marks and scales of activations that quantisers leave."""
INNER_PREFIXES = ("", "model.")
"""What may stand between a model's prefix and the name: transformers 5 puts ``model.`` before the blocks alone."""


@dataclass(frozen=True)
class Found:
    """Where a model's tensors are in a file."""

    names: Mapping[str, str]
    """``published name -> the file's``, of tensors of the right shape or the only one of this name."""
    scales: Mapping[str, str]
    """``published name of a weight -> the file's name of its scale``."""
    unexpected: Sequence[str]
    """Weights within the model that it does not have: they make it another one."""
    beside: Sequence[str]
    """Everything else: buffers, and tensors of other models."""


def find_tensors(tensors: Mapping[str, TensorInfo], wanted: Shapes) -> Found:
    """Where the tensors of a model are, those of the prefix that gives the most."""
    shapes = {name: info.shape for name, info in tensors.items()}
    best = max(prefixes_of(shapes, wanted), key=lambda prefix: likeness(shapes, wanted, prefix), default="")
    names = resolved(shapes, wanted, best)
    scales = {name: scale for name, own in names.items() if (scale := _scale_of(own, shapes))}
    taken = {*names.values(), *scales.values()}
    rest = [name for name in tensors if name not in taken]
    tops = {name.split(".", 1)[0] for name in wanted}
    unexpected = [name for name in rest if _is_within(name, best, tops) and not BUFFERS.fullmatch(name)]
    return Found(names, scales, unexpected, [name for name in rest if name not in set(unexpected)])


def prefixes_of(shapes: Shapes, wanted: Shapes) -> list[str]:
    """Every prefix behind which a name of the model stands, shortest first."""
    prefixes = {""}
    for name in shapes:
        parts = name.split(".")
        for index in range(1, min(len(parts), 5)):
            if ".".join(parts[index:]) in wanted:
                prefixes.add(".".join(parts[:index]) + ".")
    return sorted(prefixes, key=lambda prefix: (len(prefix), prefix))


def likeness(shapes: Shapes, wanted: Shapes, prefix: str, *, by_shape: bool = True) -> float:
    """The share of a model's tensors that a file has behind a prefix, by name and, if asked for, shape."""
    names = resolved(shapes, wanted, prefix)
    return sum(not by_shape or shapes[own] == wanted[name] for name, own in names.items()) / len(wanted)


def resolved(shapes: Shapes, wanted: Shapes, prefix: str) -> dict[str, str]:
    """``published name -> the file's`` behind a prefix."""
    found = {}
    for name in wanted:
        own = next((key for inner in INNER_PREFIXES if (key := f"{prefix}{inner}{name}") in shapes), None)
        if own is not None:
            found[name] = own
    return found


def scale_fits(scale: tuple[int, ...], weight: tuple[int, ...]) -> bool:
    """Is a scale for the whole weight, for each of its rows, or for blocks of it?"""
    if math.prod(scale) == 1:
        return True
    if not weight:
        return False
    rows = scale in {(weight[0],), (weight[0], 1)}
    return rows or (len(weight) == 2 and scale == tuple(-(-side // 128) for side in weight))


def _scale_of(name: str, shapes: Shapes) -> str | None:
    return next((scale for scale in _scale_names(name) if scale in shapes), None)


def _scale_names(name: str) -> Iterator[str]:
    for ending in ("_scale", "_scale_inv"):
        yield f"{name}{ending}"
    head, _, last = name.rpartition(".")
    if last == "weight":
        yield f"{head}.scale_weight"
    elif last:
        yield f"{head}.scale_{last}"
        yield f"{head}.{last.replace('_weight', '')}.scale_weight"


def _is_within(name: str, prefix: str, tops: set[str]) -> bool:
    """Has a tensor a name of the model's own, so that it would change what the model computes?"""
    if not name.startswith(prefix):
        return False
    behind = name.removeprefix(prefix)
    return any(behind.removeprefix(inner).split(".", 1)[0] in tops for inner in INNER_PREFIXES)
