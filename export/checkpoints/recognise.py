"""Checkpoints: recognised by their tensors.

Upstream calls all three files ``model.safetensors`` and users rename them, so a name says nothing. A published file is
recognised by its shape hash; a synthetic one carries its spec in the header. A file that shares tensors with a known
model but differs is reported tensor by tensor, as that is nearly always a part of it or a broken conversion.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from safetensors import SafetensorError

from ...engines.directory.tensorfile import TensorInfo, parse_header, read_header
from ...specs import PUBLISHED, AdapterSpec, EncoderSpec, Family, Spec, spec_from_dict, spec_to_dict
from .errors import CheckpointForeign, CheckpointMismatch, CheckpointPrefixed, CheckpointUnreadable
from .shapes import Shapes, shape_hash, shapes_of, tensor_shapes

SPEC_KEY = "i2l_spec"
"""Header entry of a synthetic checkpoint that holds its spec as JSON."""
FLOAT_DTYPES = frozenset({"F32", "F16", "BF16"})
LIKENESS = 0.1
"""Share of a model's tensors, by name and shape, that makes a file look like it. Low enough for a file that is one of
several parts; other models, and other sizes of the same architecture, share next to nothing."""


@dataclass(frozen=True)
class Checkpoint:
    """A recognised file. No tensor has been read yet."""

    path: Path
    spec: Spec
    tensors: Mapping[str, TensorInfo]

    @property
    def dtype(self) -> str:
        """The dtype of most values, as safetensors names it."""
        values: dict[str, int] = {}
        for info in self.tensors.values():
            values[info.dtype] = values.get(info.dtype, 0) + info.nbytes
        return max(values, key=lambda name: values[name])

    @property
    def shape_hash(self) -> str:
        return shape_hash(shapes_of(self.tensors))

    @property
    def nbytes(self) -> int:
        return sum(info.nbytes for info in self.tensors.values())


def recognise(path: Path) -> Checkpoint:
    """Open one file and say which model it is.

    Raises:
        CheckpointUnreadable: not a whole safetensors file.
        CheckpointForeign: another model.
        CheckpointMismatch: nearly one of ours; names the differences.
        CheckpointPrefixed: one of ours, but for the beginning of its tensors' names.
    """
    try:
        tensors, metadata = read_header(path)
    except (SafetensorError, OSError, ValueError) as error:
        reason = str(error).removeprefix("Error while deserializing header: ")
        raise CheckpointUnreadable(path, reason, _family_by_header(path)) from error
    shapes = shapes_of(tensors)
    spec = _carried_spec(path, metadata, len(tensors)) or _published_spec(shapes) or _nearest_spec(shapes)
    if spec is None:
        if prefixed := _prefixed(shapes):
            raise CheckpointPrefixed(path, *prefixed)
        raise CheckpointForeign(path, len(tensors))
    wanted = tensor_shapes(spec)
    missing = sorted(wanted.keys() - shapes.keys())
    unexpected = sorted(shapes.keys() - wanted.keys())
    misshapen = {
        name: (shapes[name], wanted[name]) for name in shapes if name in wanted and shapes[name] != wanted[name]
    }
    wrong_dtype = {name: info.dtype for name, info in tensors.items() if info.dtype not in FLOAT_DTYPES}
    if missing or unexpected or misshapen or wrong_dtype:
        raise CheckpointMismatch(path, spec.family, missing, unexpected, misshapen, wrong_dtype)
    return Checkpoint(path, spec, tensors)


def _family_by_header(path: Path) -> Family | None:
    """What a file that ends early was going to be, if its header is whole."""
    try:
        tensors, metadata = parse_header(path)
        spec = _carried_spec(path, metadata, len(tensors)) or _nearest_spec(shapes_of(tensors))
    except (SafetensorError, OSError, CheckpointUnreadable):
        return None
    return spec.family if spec else None


def _carried_spec(path: Path, metadata: Mapping[str, str], tensors: int) -> Spec | None:
    """The spec in the header; one with more blocks than the file has tensors would take forever to compare."""
    if SPEC_KEY not in metadata:
        return None
    try:
        spec = spec_from_dict(json.loads(metadata[SPEC_KEY]))
    except (ValueError, AttributeError, RecursionError) as error:
        raise CheckpointUnreadable(path, f"the spec in its header is wrong: {error}") from error
    if spec.blocks > tensors:
        raise CheckpointUnreadable(path, f"the spec in its header is wrong: {spec.blocks} blocks in {tensors} tensors")
    return spec


def _published_spec(shapes: Shapes) -> Spec | None:
    digest = shape_hash(shapes)
    return next((spec for spec in PUBLISHED if shape_hash(tensor_shapes(spec)) == digest), None)


def _nearest_spec(shapes: Shapes) -> Spec | None:
    """The published spec of which the file has the largest share, if that is :data:`LIKENESS` at least."""

    def likeness(spec: Spec) -> float:
        wanted = tensor_shapes(spec)
        return sum(shapes.get(name) == shape for name, shape in wanted.items()) / len(wanted)

    best: Spec = max(PUBLISHED, key=likeness)
    return best if likeness(best) >= LIKENESS else None


def _prefixed(shapes: Shapes) -> tuple[Family, str] | None:
    """``(family, prefix)`` if names of the file are those of a published one behind a prefix, such as ``model.``."""
    firsts = [next(iter(tensor_shapes(spec))) for spec in PUBLISHED]
    prefixes = {name.removesuffix(first) for name in shapes for first in firsts if name.endswith(f".{first}")}
    for prefix in sorted(prefixes):
        behind = {name.removeprefix(prefix): shape for name, shape in shapes.items() if name.startswith(prefix)}
        if spec := _nearest_spec(behind):
            return spec.family, prefix
    return None


def describe(checkpoint: Checkpoint) -> dict[str, object]:
    """The facts of a checkpoint for ``i2l inspect --json``; what a family does not have is None."""
    spec = checkpoint.spec
    encoder = spec if isinstance(spec, EncoderSpec) else None
    facts: dict[str, object] = {"path": str(checkpoint.path), "family": spec.family, "hidden": spec.hidden}
    facts["intermediate"] = encoder.intermediate if encoder else None
    for name in ("depth", "heads", "patch", "image_size", "registers"):
        facts[name] = getattr(encoder, name, None)
    if isinstance(spec, AdapterSpec):
        facts |= {name: value for name, value in spec_to_dict(spec).items() if name not in facts}
    facts |= {"dtype": checkpoint.dtype, "tensors": len(checkpoint.tensors), "nbytes": checkpoint.nbytes}
    return facts | {"shape_hash": checkpoint.shape_hash}
