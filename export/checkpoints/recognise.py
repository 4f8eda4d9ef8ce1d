"""Checkpoints: found and recognised by their tensors.

Upstream calls all three files ``model.safetensors`` and users rename them, so a name says nothing. A published file is
recognised by its shape hash; a synthetic one carries its spec in the header. A file that shares tensors with a known
model but differs is reported tensor by tensor, as that is nearly always a part of it or a broken conversion.
"""

import hashlib
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from safetensors import SafetensorError

from ...engines.directory.tensorfile import TensorInfo, parse_header, read_header
from ...specs import (
    FAMILIES,
    PUBLISHED,
    AdapterSpec,
    DiffusionModel,
    EncoderSpec,
    Family,
    Spec,
    spec_from_dict,
    spec_to_dict,
)
from .errors import (
    AdapterAmbiguous,
    CheckpointAmbiguous,
    CheckpointError,
    CheckpointForeign,
    CheckpointMismatch,
    CheckpointMissing,
    CheckpointPrefixed,
    CheckpointsUnfit,
    CheckpointUnreadable,
)

SPEC_KEY = "i2l_spec"
"""Header entry of a synthetic checkpoint that holds its spec as JSON."""
FLOAT_DTYPES = frozenset({"F32", "F16", "BF16"})
LIKENESS = 0.1
"""Share of a model's tensors, by name and shape, that makes a file look like it. Low enough for a file that is one of
several parts; other models, and other sizes of the same architecture, share next to nothing."""
Shapes = Mapping[str, tuple[int, ...]]


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


def find_checkpoints(
    models: Path, families: Sequence[Family] = FAMILIES, *, adapter: DiffusionModel | None = None
) -> dict[Family, Checkpoint]:
    """The checkpoint of each family anywhere under ``models``.

    Args:
        models: a folder, or a file.
        families: what is wanted.
        adapter: the diffusion model that the adapter must be for; by default whichever is there.

    Raises:
        CheckpointMissing: a family has no file; damaged files that may have been one are named.
        CheckpointMismatch, CheckpointPrefixed, CheckpointUnreadable: one family has no file, but this one that looks
            like it.
        CheckpointAmbiguous: a family has several files.
        AdapterAmbiguous: the adapters of several diffusion models are there, and none was chosen.
    """
    found: dict[Family, list[Checkpoint]] = {family: [] for family in families}
    errors: list[CheckpointError] = []
    for path in checkpoint_paths(models):
        try:
            checkpoint = recognise(path)
        except CheckpointForeign:
            continue
        except CheckpointError as error:
            errors.append(error)
        else:
            if adapter in (None, getattr(checkpoint.spec, "diffusion_model", adapter)):
                found.setdefault(checkpoint.spec.family, []).append(checkpoint)
    missing = [family for family in families if not found[family]]
    if missing:
        damaged = [error for error in errors if error.family is None or error.family in missing]
        if [error.family for error in damaged] == missing[:1] == missing:
            raise damaged[0]
        raise CheckpointMissing(missing, models, damaged)
    for family in families:
        for_models = {c.spec.diffusion_model: c.path for c in found[family] if isinstance(c.spec, AdapterSpec)}
        if len(for_models) > 1:
            raise AdapterAmbiguous(for_models)
        if len(found[family]) > 1:
            raise CheckpointAmbiguous(family, [checkpoint.path for checkpoint in found[family]])
    return {family: found[family][0] for family in families}


def checkpoint_paths(models: Path) -> Iterator[Path]:
    """Every safetensors file under ``models`` (or ``models`` itself), in a stable order, each once; follows links."""
    if models.is_file():
        yield models
        return
    seen: set[Path] = set()  # by their real places: links may go round in circles
    for name, folders, files in os.walk(models, followlinks=True):
        folder = Path(name)
        folders[:] = sorted(f for f in folders if (folder / f).resolve() not in seen)
        seen.update((folder / f).resolve() for f in folders)
        for path in (folder / f for f in sorted(files) if f.endswith(".safetensors") and not f.startswith(".")):
            if path.is_file() and path.resolve() not in seen:
                seen.add(path.resolve())
                yield path


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


def require_fitting(checkpoints: Mapping[Family, Checkpoint]) -> None:
    """Raise :class:`CheckpointsUnfit` if the adapter does not take what the encoders give."""
    adapter = checkpoints["adapter"].spec
    assert isinstance(adapter, AdapterSpec)
    siglip2, dinov3 = checkpoints["siglip2"].spec.hidden, checkpoints["dinov3"].spec.hidden
    if adapter.embedding != siglip2 + dinov3:
        raise CheckpointsUnfit(checkpoints["adapter"].path, adapter.embedding, siglip2, dinov3)


def shapes_of(tensors: Mapping[str, TensorInfo]) -> dict[str, tuple[int, ...]]:
    """``name -> shape``."""
    return {name: info.shape for name, info in tensors.items()}


def shape_hash(shapes: Shapes) -> str:
    """MD5 over the sorted strings ``key:d0_d1`` and ``key`` joined by commas: how DiffSynth names a model's form."""
    words = [f"{name}:{'_'.join(map(str, shape))}" for name, shape in shapes.items()] + list(shapes)
    return hashlib.md5(",".join(sorted(words)).encode(), usedforsecurity=False).hexdigest()


def tensor_shapes(spec: Spec) -> dict[str, tuple[int, ...]]:
    """Every key of a checkpoint of this spec with its shape, in the published key style."""
    if isinstance(spec, AdapterSpec):
        return _adapter_shapes(spec)
    return _siglip2_shapes(spec) if spec.family == "siglip2" else _dinov3_shapes(spec)


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


def _linear(name: str, out_features: int, in_features: int, *, bias: bool = True) -> dict[str, tuple[int, ...]]:
    shapes: dict[str, tuple[int, ...]] = {f"{name}.weight": (out_features, in_features)}
    return shapes | {f"{name}.bias": (out_features,)} if bias else shapes


def _norm(name: str, width: int) -> dict[str, tuple[int, ...]]:
    return {f"{name}.weight": (width,), f"{name}.bias": (width,)}


def _siglip2_shapes(spec: EncoderSpec) -> dict[str, tuple[int, ...]]:
    width, inner = spec.hidden, spec.intermediate
    shapes: dict[str, tuple[int, ...]] = {
        "embeddings.patch_embedding.weight": (width, 3, spec.patch, spec.patch),
        "embeddings.patch_embedding.bias": (width,),
        "embeddings.position_embedding.weight": (spec.tokens, width),
    }
    for index in range(spec.depth):
        layer = f"encoder.layers.{index}"
        shapes |= _norm(f"{layer}.layer_norm1", width)
        for name in ("q_proj", "k_proj", "v_proj", "out_proj"):
            shapes |= _linear(f"{layer}.self_attn.{name}", width, width)
        shapes |= _norm(f"{layer}.layer_norm2", width)
        shapes |= _linear(f"{layer}.mlp.fc1", inner, width) | _linear(f"{layer}.mlp.fc2", width, inner)
    shapes |= _norm("post_layernorm", width)
    shapes |= {"head.probe": (1, 1, width), "head.attention.in_proj_weight": (3 * width, width)}
    shapes |= {"head.attention.in_proj_bias": (3 * width,)} | _linear("head.attention.out_proj", width, width)
    shapes |= _norm("head.layernorm", width)
    return shapes | _linear("head.mlp.fc1", inner, width) | _linear("head.mlp.fc2", width, inner)


def _dinov3_shapes(spec: EncoderSpec) -> dict[str, tuple[int, ...]]:
    width, inner = spec.hidden, spec.intermediate
    shapes: dict[str, tuple[int, ...]] = {
        "embeddings.cls_token": (1, 1, width),
        "embeddings.register_tokens": (1, spec.registers, width),
        "embeddings.mask_token": (1, 1, width),
        "embeddings.patch_embeddings.weight": (width, 3, spec.patch, spec.patch),
        "embeddings.patch_embeddings.bias": (width,),
    }
    for index in range(spec.depth):
        layer = f"layer.{index}"
        shapes |= _norm(f"{layer}.norm1", width) | _norm(f"{layer}.norm2", width)
        for name in ("q_proj", "k_proj", "v_proj"):
            shapes |= _linear(f"{layer}.attention.{name}", width, width, bias=False)
        shapes |= _linear(f"{layer}.attention.o_proj", width, width)
        shapes |= _linear(f"{layer}.mlp.gate_proj", inner, width) | _linear(f"{layer}.mlp.up_proj", inner, width)
        shapes |= _linear(f"{layer}.mlp.down_proj", width, inner)
        shapes |= {f"{layer}.layer_scale{n}.lambda1": (width,) for n in (1, 2)}
    return shapes | _norm("norm", width)


def _adapter_shapes(spec: AdapterSpec) -> dict[str, tuple[int, ...]]:
    shapes: dict[str, tuple[int, ...]] = {}
    for component, blocks in spec.components:
        for order, (_, targets) in enumerate(spec.kinds):
            for index in range(blocks):
                block = f"{spec.checkpoint_blocks(component)}.{order * blocks + index}"
                for target, (_, in_features, out_features) in enumerate(targets):
                    for factor, width in (("a", in_features), ("b", out_features)):
                        name = f"{block}.layers.{target}.proj_{factor}"
                        shapes |= _linear(f"{name}.proj_in", spec.compress, spec.embedding, bias=False)
                        shapes |= _linear(f"{name}.proj_out", width * spec.rank, spec.compress, bias=False)
    return shapes


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
