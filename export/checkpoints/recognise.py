"""Checkpoints: recognised by their tensors.

Upstream calls all three files ``model.safetensors`` and users rename them, so a name says nothing. A published file is
recognised by its shape hash; a synthetic one carries its spec in the header. A file that shares tensors with a known
model but differs is reported tensor by tensor, as that is nearly always a part of it or a broken conversion.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from safetensors import SafetensorError

from ...engines.directory.tensorfile import TensorInfo, parse_header, read_header
from ...specs import PUBLISHED, AdapterSpec, EncoderSpec, Family, Spec, spec_from_dict, spec_to_dict
from .errors import CheckpointForeign, CheckpointLocked, CheckpointMismatch, CheckpointUnreadable
from .shapes import Shapes, shape_hash, shapes_of, tensor_shapes
from .strangers import name_stranger
from .tensor_names import (
    BUFFERS,
    FLOAT8_DTYPES,
    FLOAT_DTYPES,
    Found,
    find_tensors,
    likeness,
    prefixes_of,
    scale_fits,
)

SPEC_KEY = "i2l_spec"
"""Header entry of a synthetic checkpoint that holds its spec as JSON."""
LIKENESS = 0.1
"""Share of a model's tensors, by name and shape, that makes a file look like it. Low enough for a file that is one of
several parts; other models, and other sizes of the same architecture, share next to nothing."""


@dataclass(frozen=True)
class Checkpoint:
    """A recognised file. No tensor has been read yet."""

    path: Path
    spec: Spec
    tensors: Mapping[str, TensorInfo]
    """By their published names, whatever the file calls them."""
    files: Mapping[str, Path] = field(default_factory=dict)
    """Of tensors that are not in ``path``: the other shards."""
    scales: Mapping[str, tuple[Path, TensorInfo]] = field(default_factory=dict)
    """What FP8 values are multiplied by, by the published name of their weight."""

    def file_of(self, name: str) -> Path:
        """Where a tensor is."""
        return self.files.get(name, self.path)

    @property
    def paths(self) -> list[Path]:
        """All files, the first one first."""
        return [self.path, *sorted({path for path in self.files.values() if path != self.path})]

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


def recognise(path: Path, *shards: Path) -> Checkpoint:
    """Open a file, or the shards of one checkpoint, and say which model it is.

    Raises:
        CheckpointUnreadable: not a whole safetensors file.
        CheckpointForeign: another model.
        CheckpointMismatch: nearly one of ours; names the differences.
    """
    tensors: dict[str, TensorInfo] = {}
    homes: dict[str, Path] = {}
    metadata: dict[str, str] = {}
    for part in (path, *shards):
        try:
            own, marks = read_header(part)
        except FileNotFoundError as error:
            raise CheckpointUnreadable(part, error.strerror or str(error)) from error
        except OSError as error:
            raise CheckpointLocked(part, error.strerror or str(error)) from error
        except (SafetensorError, ValueError) as error:
            reason = str(error).removeprefix("Error while deserializing header: ")
            raise CheckpointUnreadable(part, reason, _family_by_header(part)) from error
        tensors |= own
        homes |= dict.fromkeys(own, part)
        metadata = marks | metadata
    shapes = shapes_of(tensors)
    spec = _carried_spec(path, metadata, len(tensors)) or _published_spec(shapes) or _nearest_spec(shapes)
    if spec is None:
        raise CheckpointForeign(path, len(tensors), *name_stranger(tensors))
    wanted = tensor_shapes(spec)
    found = find_tensors(tensors, wanted)
    _require_right(path, spec, tensors, found)
    return Checkpoint(
        path,
        spec,
        {name: tensors[own] for name, own in found.names.items()},
        {name: homes[own] for name, own in found.names.items() if homes[own] != path},
        {name: (homes[own], tensors[own]) for name, own in found.scales.items()},
    )


def _require_right(path: Path, spec: Spec, tensors: Mapping[str, TensorInfo], found: Found) -> None:
    """Raise :class:`CheckpointMismatch` unless all is there, of the right shape and dtype, with all scales."""
    wanted = tensor_shapes(spec)
    missing = sorted(wanted.keys() - found.names.keys())
    own = {name: tensors[key] for name, key in found.names.items()}
    misshapen = {name: (info.shape, wanted[name]) for name, info in own.items() if info.shape != wanted[name]}
    wrong = {name: info.dtype for name, info in own.items() if info.dtype not in FLOAT_DTYPES | FLOAT8_DTYPES}
    unexpected = list(found.unexpected)
    for name, scale in found.scales.items():
        info = tensors[scale]
        fits = own[name].dtype in FLOAT8_DTYPES and info.dtype in FLOAT_DTYPES
        if not fits or not scale_fits(info.shape, own[name].shape):
            unexpected.append(scale)
    scaled = bool(found.scales) or any(name.endswith("scaled_fp8") for name in tensors)
    unscaled = [name for name, info in own.items() if info.dtype in FLOAT8_DTYPES and name not in found.scales]
    missing += [f"the scale of {name}" for name in unscaled if scaled]
    if missing or unexpected or misshapen or wrong:
        beside = [name for name in found.beside if "." not in name or not BUFFERS.fullmatch(name)]
        extras = sorted({*unexpected, *(beside if missing or misshapen else ())})
        raise CheckpointMismatch(path, spec.family, missing, extras, misshapen, wrong)


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

    def share(spec: Spec) -> float:
        wanted = tensor_shapes(spec)
        return max(likeness(shapes, wanted, prefix) for prefix in prefixes_of(shapes, wanted))

    best: Spec = max(PUBLISHED, key=share)
    return best if share(best) >= LIKENESS else None


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
    facts |= {"files": len(checkpoint.paths)} if len(checkpoint.paths) > 1 else {}
    facts |= {"scales": len(checkpoint.scales)} if checkpoint.scales else {}
    facts |= {"dtype": checkpoint.dtype, "tensors": len(checkpoint.tensors), "nbytes": checkpoint.nbytes}
    return facts | {"shape_hash": checkpoint.shape_hash}
