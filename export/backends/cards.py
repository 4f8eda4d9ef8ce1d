"""In which precisions a generation of NVIDIA GPUs computes."""

import torch

from ...engines.directory.architectures import BFLOAT16_FROM, FLOAT8_FROM
from .errors import PrecisionUnsupported


def require_precision(sm: int, precision: str) -> None:
    """Raise :class:`PrecisionUnsupported` if a generation cannot compute with packs of this precision."""
    least = {"fp8": FLOAT8_FROM, "bf16": BFLOAT16_FROM, "int8": 75}.get(precision)
    if least is None or sm < least:
        raise PrecisionUnsupported(sm, precision, "fp8" if sm >= FLOAT8_FROM else "int8")


def compute_dtype(sm: int) -> torch.dtype:
    """In what a generation multiplies what has not eight bits."""
    return torch.bfloat16 if sm >= BFLOAT16_FROM else torch.float16
