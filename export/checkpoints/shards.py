"""Checkpoints in several files: which belong together, and whether all are there."""

import json
import re
from collections.abc import Iterable, Mapping
from pathlib import Path

from ...machine.files import read_small
from .errors import CheckpointIncomplete

INDEX = ".safetensors.index.json"
PART = re.compile(r"(.+)-(\d{3,})-of-(\d{3,})\.safetensors")


def join_shards(paths: Iterable[Path]) -> list[tuple[Path, ...]]:
    """Files that are one checkpoint together, in the order of their first; a file by itself is a tuple of one.

    An index beside them says which; without one their names do, ``NAME-00001-of-00003.safetensors``.
    """
    paths = list(paths)
    groups: dict[Path | str, list[Path]] = {}
    for path in paths:
        groups.setdefault(_group_of(path), []).append(path)
    return [tuple(group) for group in groups.values()]


def require_all(shards: tuple[Path, ...]) -> None:
    """Raise :class:`CheckpointIncomplete` if some of the files of a checkpoint are not there."""
    first = shards[0]
    names = {path.name for path in shards}
    indexed = _indexed(first)
    if indexed is not None:
        wanted = set(indexed.values())
    elif match := PART.fullmatch(first.name):
        count = int(match[3])
        wanted = {f"{match[1]}-{n:0{len(match[2])}}-of-{match[3]}.safetensors" for n in range(1, min(count, 9999) + 1)}
    else:
        return
    if missing := sorted(wanted - names):
        raise CheckpointIncomplete(first.parent, missing, len(wanted))


def is_shard(path: Path) -> bool:
    """Is a file one of several by its name or by an index beside it?"""
    return _group_of(path) != path


def _group_of(path: Path) -> Path | str:
    if (indexed := _indexed(path)) is not None and len(set(indexed.values())) > 1:
        return f"{path.parent}/{min(indexed.values())}"
    match = PART.fullmatch(path.name)
    return f"{path.parent}/{match[1]}-of-{match[3]}" if match and int(match[3]) > 1 else path


def _indexed(path: Path) -> Mapping[str, str] | None:
    """The ``tensor -> file`` of an index that names this file."""
    for index in sorted(path.parent.glob(f"*{INDEX}")):
        try:
            names = json.loads(read_small(index))["weight_map"]
        except (OSError, ValueError, KeyError, TypeError, RecursionError):
            continue  # no index: the files' own names must say it
        if isinstance(names, dict) and path.name in names.values():
            return names
    return None
