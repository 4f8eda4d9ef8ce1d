"""Other people's implementations, made importable, for the tests to compare against."""

import importlib
import importlib.util
from pathlib import Path
from types import ModuleType

import torch

_SCHEMAS: list[torch.library.Library] = []
"""Kept alive: a library that is collected takes its operators along."""


def import_torchvision() -> ModuleType:
    """Imports torchvision, also where its compiled operators do not fit the installed torch.

    torchvision registers shape functions for two of its C++ operators while it is imported, which fails where the
    operators are absent (a CPU torch beside a CUDA torchvision). Declaring them is enough: images are processed by
    torch and Pillow alone. Call it before importing anything of transformers that wants torchvision.
    """
    if not _SCHEMAS and not _compiled_operators_load():
        library = torch.library.Library("torchvision", "DEF")
        for name in ("nms", "qnms"):
            library.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        _SCHEMAS.append(library)
    return importlib.import_module("torchvision")


def _compiled_operators_load() -> bool:
    spec = importlib.util.find_spec("torchvision")
    if spec is None or spec.origin is None:
        raise ModuleNotFoundError("No module named 'torchvision'", name="torchvision")
    try:
        for path in Path(spec.origin).parent.glob("_C*.so"):
            torch.ops.load_library(path)
    except OSError:
        return False
    return hasattr(torch.ops.torchvision, "nms")
