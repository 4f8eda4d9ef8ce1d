"""LoRA files of every form, described and read.

What a LoRA changes is ``B @ A`` times ``alpha / rank``. The alpha may stand beside the factors, in the header of a file
of diffusers, or in the ``adapter_config.json`` that PEFT writes beside its file; without any the scale is 1.
"""

import json
import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from safetensors import SafetensorError

from ..engines.base import Array
from ..engines.directory.tensorfile import TensorInfo, read_header
from ..machine.files import read_small
from .errors import LoraMissing, LoraNotASum, LoraUnreadable
from .keys import ParsedKeys, parse_keys
from .lora import Dtype, Lora
from .names import diffusion_model
from .values import FLOATS, tensor_values

OWN_DTYPES: Mapping[str, Dtype] = {"F32": "fp32", "F16": "fp16", "BF16": "bf16", "F8_E4M3": "bf16", "F8_E5M2": "bf16"}
"""What holds the values of a file exactly."""
PEFT_FILE, PEFT_CONFIG = "adapter_model.safetensors", "adapter_config.json"
HEADER_CONFIG = "lora_adapter_metadata"
"""The header entry of diffusers that holds PEFT's config as JSON, every name behind ``transformer.``."""


@dataclass(frozen=True)
class LoraFile:
    """A LoRA with the form that it had on disk."""

    path: Path
    lora: Lora
    dtype: Dtype
    key_format: str
    left_out: int = 0
    """Modules of a text encoder, which are not the diffusion model's."""
    kinds: tuple[str, ...] = ()
    """What it is besides a plain LoRA."""
    norms: Mapping[str, float] = field(default_factory=dict)
    """How much each module changes, where that is no product of two thin factors (:mod:`.other_kinds`)."""

    @property
    def modules(self) -> list[str]:
        """What is changed, with factors or without."""
        return [*self.lora.factors, *self.norms]


@dataclass(frozen=True)
class Scales:
    """PEFT's config: alphas for modules whose file has none beside the factors."""

    alpha: float | None = None
    patterns: Mapping[str, float] = field(default_factory=dict)
    root: bool = False
    """Divided by the root of the rank."""
    dora: bool = False

    def of(self, module: str, rank: int) -> float:
        matching = (value for name, value in self.patterns.items() if re.fullmatch(rf"(?:.*\.)?(?:{name})", module))
        alpha = next(matching, self.alpha)
        return 1.0 if alpha is None else alpha / (math.sqrt(rank) if self.root else rank)


def describe_lora(path: Path) -> dict[str, object]:
    """The facts of a LoRA file for ``i2l inspect``.

    Raises:
        LoraUnreadable: not a safetensors file, or its keys are of no known form.
    """
    tensors, metadata, parsed = parsed_file(path)
    whole = {module: parts for module, parts in parsed.modules.items() if parts.down and parts.up}
    kinds = sorted(parsed.variants)
    if not whole and not parsed.variants and not parsed.text_encoder:
        raise LoraUnreadable(path, "its keys are of no known form")
    downs = [tensors[parts.down] for parts in whole.values() if parts.down]
    if any(len(info.shape) != 2 for info in downs):
        raise LoraUnreadable(path, "its factors are not matrices")
    ranks = sorted({info.shape[0] for info in downs})
    first = downs[0] if downs else next(info for name, info in tensors.items() if name not in parsed.foreign)
    facts: dict[str, object] = {
        "path": str(path),
        "tensors": len(tensors),
        "modules": len(parsed.modules) if kinds else len(whole),
        "rank": ranks[0] if len(ranks) == 1 else ranks,
        "dtype": first.dtype,
        "key_format": parsed.key_format,
        "nbytes": path.stat().st_size,
        "metadata": metadata,
    }
    if kinds:
        facts["variant"] = ", ".join(kinds)
    facts |= _scale_facts(path, tensors, metadata, parsed)
    shapes = {m: (tensors[p.up].shape[0], tensors[p.down].shape[-1]) for m, p in whole.items() if p.up and p.down}
    if model := diffusion_model(shapes):
        facts["model"] = model
    if parsed.text_encoder:
        facts["text_encoder_modules"] = parsed.text_modules
    if parsed.foreign:
        facts["other_tensors"] = sorted(parsed.foreign)
    return facts


def read_lora(path: Path) -> LoraFile:
    """Read a LoRA of any form; its factors become float32, scaled, and all of one rank, filled up with zeros.

    Raises:
        LoraUnreadable: not a LoRA file, of another dtype, or with tensors that are no pair of factors.
        LoraNotASum: it is a DoRA, LoKr, LoHa or the like.
    """
    return read_factors(path, allow=frozenset())


def read_factors(path: Path, *, allow: frozenset[str]) -> LoraFile:
    """:func:`read_lora`, which leaves the rest of the kinds in ``allow`` out."""
    tensors, metadata, parsed = parsed_file(path)
    if not parsed.modules and not parsed.text_encoder:
        raise LoraUnreadable(path, "its keys are of no known form")
    scales = _scales(path, metadata)
    kinds = parsed.variants | ({"DoRA"} if scales.dora else set())
    if kinds - allow:
        raise LoraNotASum(path, sorted(kinds))
    infos = {name: info for name, info in tensors.items() if name not in parsed.text_encoder}
    if wrong := sorted({info.dtype for info in infos.values()} - FLOATS.keys()):
        raise LoraUnreadable(path, f"its dtype is {wrong[0]}, not one of {', '.join(FLOATS)}")
    data = path.read_bytes()
    factors = factors_of(parsed, lambda name: tensor_values(data, tensors[name]), path, scales)
    lora = Lora(one_rank(factors), dict(metadata))
    kinds_of = {info.dtype for name, info in infos.items() if ".alpha" not in name}
    dtype = OWN_DTYPES[kinds_of.pop()] if len(kinds_of) == 1 else "fp32"
    return LoraFile(path, lora, dtype, parsed.key_format, parsed.text_modules, tuple(sorted(kinds)))


def factors_of(
    parsed: ParsedKeys, values: Callable[[str], Array], source: Path, scales: Scales | None = None
) -> dict[str, tuple[Array, Array]]:
    """``module -> (A, B)`` with the scale on A.

    Args:
        parsed: the names of all tensors.
        values: gives one.
        source: for what is said.
        scales: for modules without an alpha of their own.

    Raises:
        LoraUnreadable: something is no pair of factors.
    """
    lonely = [module for module, parts in parsed.modules.items() if not (parts.down and parts.up)]
    if parsed.foreign or lonely or not parsed.modules:
        odd = (sorted(parsed.foreign) or sorted(lonely) or ["all of it is for a text encoder:"])[0]
        raise LoraUnreadable(source, f"{odd} is not one of a pair of factors")
    factors = {}
    for module, parts in parsed.modules.items():
        assert parts.down is not None
        assert parts.up is not None
        a, b = values(parts.down), values(parts.up)
        if a.ndim != 2 or b.ndim != 2 or a.shape[0] != b.shape[1]:
            raise LoraUnreadable(source, f"the factors of {module} are {list(a.shape)} and {list(b.shape)}")
        rank = max(len(a), 1)
        scale = (scales or Scales()).of(module, rank)
        if parts.alpha is not None:
            alpha = values(parts.alpha).reshape(-1)
            if len(alpha) != 1:
                raise LoraUnreadable(source, f"{parts.alpha} is {list(alpha.shape)}, not one number")
            scale = float(alpha[0]) / rank
        factors[module] = (a if scale == 1 else (a * np.float64(scale)).astype(np.float32), b)
    return factors


def one_rank(factors: Mapping[str, tuple[Array, Array]]) -> dict[str, tuple[Array, Array]]:
    """Factors filled up with zeros to the highest rank, as some loaders want one throughout."""
    rank = max(a.shape[0] for a, _ in factors.values())
    padded = {}
    for module, (a, b) in factors.items():
        missing = rank - a.shape[0]
        padded[module] = (np.pad(a, ((0, missing), (0, 0))), np.pad(b, ((0, 0), (0, missing))))
    return padded


def parsed_file(path: Path) -> tuple[dict[str, TensorInfo], dict[str, str], ParsedKeys]:
    """``(tensors, metadata, keys taken apart)`` of a file's header.

    Raises:
        LoraUnreadable: it cannot be read, or is no safetensors file.
    """
    try:
        tensors, metadata = read_header(path)
    except FileNotFoundError as error:
        raise LoraMissing(path) from error
    except OSError as error:
        raise LoraUnreadable(path, error.strerror or str(error)) from error
    except (SafetensorError, ValueError) as error:
        raise LoraUnreadable(path, str(error)) from error
    return tensors, metadata, parse_keys(tensors)


def _scale_facts(
    path: Path, tensors: Mapping[str, TensorInfo], metadata: Mapping[str, str], parsed: ParsedKeys
) -> dict[str, object]:
    """Alphas and the scales that they make, where there are any."""
    config = _scales(path, metadata)
    alphas: set[float] = set()
    scales: set[float] = set()
    with path.open("rb") as file:
        for module, parts in parsed.modules.items():
            rank = max(tensors[parts.down].shape[0], 1) if parts.down else 1
            if parts.alpha is None:
                scales.add(config.of(module, rank))
            elif (info := tensors[parts.alpha]).dtype in FLOATS and info.shape in {(), (1,)}:
                file.seek(info.offset)
                alpha = float(FLOATS[info.dtype](file.read(info.nbytes)).reshape(-1)[0])
                alphas.add(alpha)
                scales.add(alpha / rank)
    facts: dict[str, object] = {}
    if alphas:
        facts["alpha"] = _one_or_all(alphas)
    if scales - {1.0}:
        facts["scale"] = _one_or_all(scales)
    if config.dora:
        facts["variant"] = "DoRA"
    return facts


def _one_or_all(numbers: set[float]) -> object:
    ordered = sorted(numbers)
    return ordered[0] if len(ordered) == 1 else ordered


def _scales(path: Path, metadata: Mapping[str, str]) -> Scales:
    """PEFT's config of a file, from its header or from beside it."""
    try:
        if HEADER_CONFIG in metadata:
            values = json.loads(metadata[HEADER_CONFIG])
            config = {name.removeprefix("transformer."): value for name, value in values.items()}
        elif path.name == PEFT_FILE and (beside := path.parent / PEFT_CONFIG).is_file():
            config = json.loads(read_small(beside))
        else:
            return Scales()
        patterns = {str(name): float(value) for name, value in (config.get("alpha_pattern") or {}).items()}
        alpha = config.get("lora_alpha")
        rslora, dora = bool(config.get("use_rslora")), bool(config.get("use_dora"))
        return Scales(None if alpha is None else float(alpha), patterns, rslora, dora)
    except (OSError, ValueError, TypeError, AttributeError, RecursionError) as error:
        raise LoraUnreadable(path, f"its config does not parse: {error}") from error
