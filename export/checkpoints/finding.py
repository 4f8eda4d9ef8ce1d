"""Checkpoints: found under a folder, whatever the files are called; the one of each family, or why there is none."""

import logging
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import BinaryIO

from ...engines.directory.tensorfile import TensorInfo
from ...machine.wording import format_path
from ...specs import FAMILIES, AdapterSpec, DiffusionModel, Family
from .errors import (
    AdapterAmbiguous,
    CheckpointAmbiguous,
    CheckpointError,
    CheckpointForeign,
    CheckpointMissing,
    CheckpointOfAnotherKind,
    CheckpointsUnfit,
)
from .recognise import Checkpoint, recognise
from .shards import is_shard, join_shards, require_all

log = logging.getLogger(__name__)
PIECE = 16 << 20
"""Bytes that are compared at once."""


def find_checkpoints(
    models: Path, families: Sequence[Family] = FAMILIES, *, adapter: DiffusionModel | None = None
) -> dict[Family, Checkpoint]:
    """The checkpoint of each family anywhere under ``models``.

    Args:
        models: a folder, or a file.
        families: what is wanted.
        adapter: the diffusion model that the adapter must be for; by default whichever is there.

    Raises:
        CheckpointMissing: a family has no file; damaged files that may have been one, and strangers, are named.
        CheckpointError: ``models`` is one file, and is something else.
        CheckpointMismatch, CheckpointForeign, CheckpointUnreadable: one family has no file, but this one that looks
            like it.
        CheckpointAmbiguous: a family has several files of different content.
        AdapterAmbiguous: the adapters of several diffusion models are there, and none was chosen.
    """
    found: dict[Family, list[Checkpoint]] = {family: [] for family in families}
    errors: list[CheckpointError] = []
    strangers: list[CheckpointForeign] = []
    for shards in join_shards(checkpoint_paths(models)):
        try:
            checkpoint = recognise_whole(shards)
        except CheckpointForeign as error:
            (errors if error.family else strangers).append(error)
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
        if models.is_file():
            others = [CheckpointOfAnotherKind(models, family, missing[0]) for family in FAMILIES if found.get(family)]
            raise [*errors, *strangers, *others, CheckpointMissing(missing, models)][0]
        empty = next(checkpoint_paths(models), None) is None
        raise CheckpointMissing(missing, models, damaged, strangers, empty=empty)
    for family in families:
        for_models = {c.spec.diffusion_model: c.path for c in found[family] if isinstance(c.spec, AdapterSpec)}
        if len(for_models) > 1:
            raise AdapterAmbiguous(for_models)
        found[family] = without_copies(found[family])
        if len(found[family]) > 1:
            raise CheckpointAmbiguous(family, [checkpoint.path for checkpoint in found[family]])
    return {family: found[family][0] for family in families}


def recognise_whole(shards: tuple[Path, ...]) -> Checkpoint:
    """The checkpoint in one file or in several.

    Raises:
        CheckpointError: some are missing, or it is none.
    """
    if is_shard(shards[0]):
        require_all(shards)
    return recognise(*shards)


def without_copies(checkpoints: Sequence[Checkpoint]) -> list[Checkpoint]:
    """Checkpoints of different content; of equal ones the first, which is said."""
    kept: list[Checkpoint] = []
    for checkpoint in checkpoints:
        twin = next((other for other in kept if same_content(other, checkpoint)), None)
        if twin is None:
            kept.append(checkpoint)
        else:
            family, taken, copy = checkpoint.spec.family, format_path(twin.path), format_path(checkpoint.path)
            log.info("%s is there twice with the same content: %s is taken, %s is not needed", family, taken, copy)
    return kept


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


def require_fitting(checkpoints: Mapping[Family, Checkpoint]) -> None:
    """Raise :class:`CheckpointsUnfit` if the adapter does not take what the encoders give."""
    adapter = checkpoints["adapter"].spec
    assert isinstance(adapter, AdapterSpec)
    siglip2, dinov3 = checkpoints["siglip2"].spec.hidden, checkpoints["dinov3"].spec.hidden
    if adapter.embedding != siglip2 + dinov3:
        raise CheckpointsUnfit(checkpoints["adapter"].path, adapter.embedding, siglip2, dinov3)


def same_content(first: Checkpoint, second: Checkpoint) -> bool:
    """Do two checkpoints hold the same values? Small tensors first: other weights differ there already."""
    if first.spec != second.spec or first.tensors.keys() != second.tensors.keys():
        return False
    if first.scales.keys() != second.scales.keys():
        return False
    pairs = [
        ((first.file_of(name), info), (second.file_of(name), second.tensors[name]))
        for name, info in first.tensors.items()
    ]
    pairs += [(scale, second.scales[name]) for name, scale in first.scales.items()]
    if any((a.dtype, a.shape) != (b.dtype, b.shape) for (_, a), (_, b) in pairs):
        return False
    if all(path.samefile(other) and a.offset == b.offset for (path, a), (other, b) in pairs):
        return True
    return all(_same_bytes(a, b) for a, b in sorted(pairs, key=lambda pair: pair[0][1].nbytes))


def _same_bytes(first: tuple[Path, TensorInfo], second: tuple[Path, TensorInfo]) -> bool:
    (path, info), (other_path, other) = first, second
    with path.open("rb") as file, other_path.open("rb") as other_file:
        file.seek(info.offset)
        other_file.seek(other.offset)
        return _same_pieces(file, other_file, info.nbytes)


def _same_pieces(file: BinaryIO, other: BinaryIO, nbytes: int) -> bool:
    while nbytes > 0:
        count = min(nbytes, PIECE)
        if file.read(count) != other.read(count):
            return False
        nbytes -= count
    return True
