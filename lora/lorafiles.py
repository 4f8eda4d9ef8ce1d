"""LoRA files read back, and joined.

Joining is exact: the weight goes on A, then the ranks are put side by side, so ``B @ A`` of the result is the weighted
sum of the inputs' ``B @ A`` up to the rounding of the file's dtype.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..engines.base import Array
from ..engines.directory.tensorfile import TensorInfo, read_header
from .errors import LorasDiffer, LoraUnreadable
from .lora import DTYPES, KEYS, MODEL_METADATA, Dtype, KeyFormat, Lora, describe_lora, joining_weights

NUMPY_DTYPES: Mapping[str, type[np.generic]] = {"BF16": np.uint16, "F16": np.float16, "F32": np.float32}


@dataclass(frozen=True)
class LoraFile:
    """A LoRA with the form that it had on disk."""

    path: Path
    lora: Lora
    dtype: Dtype
    key_format: KeyFormat


def read_lora(path: Path) -> LoraFile:
    """Read a LoRA of either key form; its factors become float32 and all of one rank, filled up with zeros.

    Raises:
        LoraUnreadable: not a LoRA file, of another key form or dtype, or with tensors that are no pair of factors, such
            as scales of its own (``alpha``).
    """
    facts = describe_lora(path)
    key_format: KeyFormat = "comfyui" if facts["key_format"] == "comfyui" else "diffsynth"
    tensors, metadata = read_header(path)
    if wrong := sorted({info.dtype for info in tensors.values()} - NUMPY_DTYPES.keys()):
        raise LoraUnreadable(path, f"its dtype is {wrong[0]}, not one of {', '.join(NUMPY_DTYPES)}")
    down, up = KEYS[key_format]
    prefix, suffix = down.split("{}")
    modules = [n[len(prefix) : -len(suffix)] for n in tensors if n.startswith(prefix) and n.endswith(suffix)]
    known = {key.format(module) for module in modules for key in (down, up)}
    if foreign := sorted(tensors.keys() ^ known):
        raise LoraUnreadable(path, f"{foreign[0]} is not one of a pair of factors")
    data = path.read_bytes()
    factors = {m: (_array(data, tensors[down.format(m)]), _array(data, tensors[up.format(m)])) for m in modules}
    for module, (a, b) in factors.items():
        if a.ndim != 2 or b.ndim != 2 or a.shape[0] != b.shape[1]:
            raise LoraUnreadable(path, f"the factors of {module} are {list(a.shape)} and {list(b.shape)}")
    dtype = next(name for name, stored in DTYPES.items() if stored == facts["dtype"])
    return LoraFile(path, Lora(_one_rank(factors), dict(metadata)), dtype, key_format)


def merge_loras(files: Sequence[LoraFile], weights: Sequence[float] | None = None) -> Lora:
    """The weighted sum of LoRAs; its rank is the sum of theirs.

    Args:
        files: two or more, of the same modules.
        weights: one per file, taken as they are; by default ``1 / files`` each.

    Raises:
        LorasDiffer: they are not for the same diffusion model.
        StrengthInvalid, WeightsMismatch: a number is not finite, or there is not one weight per file.
    """
    gains = joining_weights(weights, len(files), "LoRA")
    first = files[0]
    for other in files[1:]:
        require_alike(first, other)
    factors = {}
    for module in first.lora.factors:
        pairs = [file.lora.factors[module] for file in files]
        a = np.concatenate([np.float32(gain) * a for gain, (a, _) in zip(gains, pairs, strict=True)])
        factors[module] = (a, np.concatenate([b for _, b in pairs], axis=1))
    kept = {name: first.lora.metadata[name] for name in MODEL_METADATA["z-image"] if name in first.lora.metadata}
    return Lora(factors, kept | {"i2l.merge_weights": ",".join(f"{gain:.9g}" for gain in gains)})


def common_dtype(files: Sequence[LoraFile]) -> Dtype:
    """The files' dtype; float32 if they differ, as neither 16-bit form holds the other."""
    kinds = {file.dtype for file in files}
    return kinds.pop() if len(kinds) == 1 else "fp32"


def require_alike(first: LoraFile, second: LoraFile) -> None:
    """Raise :class:`LorasDiffer` unless both change the same modules of the same shapes."""
    left, right = _shapes(first), _shapes(second)
    misshapen = {name: (left[name], right[name]) for name in left if name in right and left[name] != right[name]}
    only_left, only_right = sorted(left.keys() - right.keys()), sorted(right.keys() - left.keys())
    if only_left or only_right or misshapen:
        raise LorasDiffer(first.path, second.path, only_left, only_right, misshapen)


def _shapes(file: LoraFile) -> dict[str, tuple[int, int]]:
    """``module -> [out, in]`` of the weight that it changes."""
    return {module: (b.shape[0], a.shape[1]) for module, (a, b) in file.lora.factors.items()}


def _array(data: bytes, info: TensorInfo) -> Array:
    kind = NUMPY_DTYPES[info.dtype]
    flat: NDArray[Any] = np.frombuffer(data, kind, info.nbytes // np.dtype(kind).itemsize, info.offset)
    if info.dtype == "BF16":  # the upper half of a float32
        flat = (flat.astype(np.uint32) << 16).view(np.float32)
    return flat.reshape(info.shape).astype(np.float32)


def _one_rank(factors: Mapping[str, tuple[Array, Array]]) -> dict[str, tuple[Array, Array]]:
    rank = max(a.shape[0] for a, _ in factors.values())
    padded = {}
    for module, (a, b) in factors.items():
        missing = rank - a.shape[0]
        padded[module] = (np.pad(a, ((0, missing), (0, 0))), np.pad(b, ((0, 0), (0, missing))))
    return padded
