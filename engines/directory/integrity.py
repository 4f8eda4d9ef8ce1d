"""Are the files what the build wrote? Hashed once, then watched; and a little of each pack is read again every time.

Hashing 8 GB takes seconds, starting a run must not. So a pack's hash is compared when it is first seen; its size, inode
and modification time then go to ``checked.json`` beside the manifest, and as long as these three stay the same it is
not read again (git's index works so). A disk that rots changes none of the three: so every opening reads two regions of
each pack, at random, and a rotten pack is found after some runs instead of never. Graphs, small, are hashed each time.

What was computed before damage was found may be wrong. So ``checked.json`` holds a word that changes when damage is
found; with the packs' marks it makes the fingerprint to which kept embeddings are bound.
"""

import hashlib
import json
import logging
import os
import random
import secrets
import stat
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from safetensors import SafetensorError

from ...machine.errors import I2LError
from ...machine.files import atomic_path, read_small, remove_leftovers
from ...machine.platforms.mapping import MappedFile
from ...machine.wording import format_bytes
from ..errors import EngineFileChanged, EngineFileDamaged, EngineFileUnreadable
from .hashing import REGION_BYTES, FileFacts, Hasher, region_mark
from .manifest import Manifest
from .tensorfile import PAD_PREFIX, parse_header

log = logging.getLogger(__name__)
CHECKED = "checked.json"
READ_BYTES = 1 << 22
SAMPLES = 2
"""Regions of each pack that are read at every opening: 12 MiB in all."""


@dataclass(frozen=True)
class Notes:
    """What ``checked.json`` remembers."""

    marks: Mapping[str, str]
    """Of the files whose hash was right."""
    word: str
    """Another one since damage was last found."""


def file_facts(path: Path) -> FileFacts:
    """Size and hash of a file."""
    hasher = Hasher()
    with path.open("rb", buffering=0) as file:
        while block := file.read(READ_BYTES):
            hasher.update(block)
    return hasher.facts()


def file_sha256(path: Path) -> str:
    """The plain SHA-256 of a file."""
    return hashlib.sha256(path.read_bytes()).hexdigest()


def check_files(directory: Path, manifest: Manifest, *, again: bool = False) -> int:
    """Compare every file with the manifest.

    Args:
        directory: the engines directory.
        manifest: its manifest.
        again: hash also what was checked before.

    Returns:
        The bytes that were hashed as whole files.

    Raises:
        EngineFileDamaged: a file is absent, differs, or is a link to another place.
        EngineFileUnreadable: this user may not read one.
    """
    notes = Notes({}, "") if again else _read_notes(directory)
    small = frozenset(manifest.graphs.values())
    marks, hashed = {}, 0
    _require_no_links(directory, manifest)
    for name, wanted in manifest.files.items():
        path = directory / manifest.build / name
        marks[name] = _mark(path, directory, wanted)
        known = notes.marks.get(name) == marks[name]
        try:
            if name in small or not known:
                if wanted.nbytes > READ_BYTES:
                    log.info("checking %s (%s), once", name, format_bytes(wanted.nbytes))
                hashed += wanted.nbytes
                _check_whole(path, directory, wanted)
            elif name.endswith(".safetensors"):
                _check_samples(path, directory, wanted)
        except EngineFileDamaged:
            _forget(directory, name)
            raise
        except OSError as error:
            raise EngineFileUnreadable(path, error.strerror or str(error)) from error
    _require_headers(directory, manifest)
    if marks != notes.marks or not notes.word:
        _write_notes(directory, Notes(marks, _read_notes(directory).word or secrets.token_hex(8)))
    return hashed


def record_checked(directory: Path, manifest: Manifest) -> None:
    """Note that all files are good: their hashes were taken while they were written."""
    marks = {name: _mark(directory / manifest.build / name, directory, f) for name, f in manifest.files.items()}
    _write_notes(directory, Notes(marks, secrets.token_hex(8)))


def fingerprint(directory: Path, packs: Sequence[os.stat_result]) -> str:
    """What opened packs are, beyond their hash: which files, and found damaged how recently."""
    facts = [[pack.st_size, pack.st_mtime_ns, pack.st_ino] for pack in packs]
    return hashlib.sha256(json.dumps([_read_notes(directory).word, facts]).encode()).hexdigest()


def require_unchanged(mapped: MappedFile) -> None:
    """Raise :class:`EngineFileChanged` if somebody has written a mapped pack since it was opened."""
    if not mapped.is_unchanged:
        raise EngineFileChanged(mapped.path)


def _check_whole(path: Path, directory: Path, wanted: FileFacts) -> None:
    if file_facts(path) != wanted:
        raise EngineFileDamaged(path, directory, "its content hash differs")


def _check_samples(path: Path, directory: Path, wanted: FileFacts) -> None:
    """Compare a few regions, other ones each time."""
    count = -(-wanted.nbytes // REGION_BYTES)
    chosen = random.Random(time.time_ns()).sample(range(count), min(SAMPLES, count))  # noqa: S311 - no secret
    with path.open("rb", buffering=0) as file:
        for index in chosen:
            file.seek(index * REGION_BYTES)
            data = b""
            while len(data) < REGION_BYTES and (more := file.read(REGION_BYTES - len(data))):
                data += more
            if region_mark(data) != (wanted.region_mark(index) or wanted.sha256[: len(region_mark(b""))]):
                raise EngineFileDamaged(path, directory, f"its content differs from byte {index * REGION_BYTES} on")


def _require_headers(directory: Path, manifest: Manifest) -> None:
    """The rows of the manifest must be those of each pack's own header."""
    for model in manifest.models.values():
        path = directory / manifest.build / model.pack
        try:
            found, _ = parse_header(path)
        except OSError as error:
            raise EngineFileUnreadable(path, error.strerror or str(error)) from error
        except SafetensorError as error:
            raise EngineFileDamaged(path, directory, str(error)) from error
        wanted = {name: info for name, info in model.tensors.items() if not name.startswith(PAD_PREFIX)}
        if found != wanted:
            odd = sorted(name for name in found.keys() | wanted.keys() if found.get(name) != wanted.get(name))
            raise EngineFileDamaged(path, directory, f"its header and the manifest differ in {odd[0]}")


def _require_no_links(directory: Path, manifest: Manifest) -> None:
    """The directory itself may be a link; what lies in it may not lead out."""
    build = directory / manifest.build
    for folder in sorted({build, *(build / Path(name).parent for name in manifest.files)}):
        if folder.is_symlink():
            raise EngineFileDamaged(folder, directory, "it is a link to another place")


def _mark(path: Path, directory: Path, wanted: FileFacts) -> str:
    try:
        found = path.lstat()
    except OSError as error:
        raise EngineFileDamaged(path, directory, "it is gone") from error
    if stat.S_ISLNK(found.st_mode):
        raise EngineFileDamaged(path, directory, "it is a link to another place")
    if not stat.S_ISREG(found.st_mode):
        raise EngineFileDamaged(path, directory, "it is gone")
    if found.st_size != wanted.nbytes:
        raise EngineFileDamaged(path, directory, f"it has {found.st_size} bytes, not {wanted.nbytes}")
    return f"{wanted.sha256} {found.st_size} {found.st_mtime_ns} {found.st_ino}"


def _read_notes(directory: Path) -> Notes:
    try:
        values = json.loads(read_small(directory / CHECKED))
        marks, word = values["files"], values["word"]
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return Notes({}, "")
    return Notes(marks, word) if isinstance(marks, dict) and isinstance(word, str) else Notes({}, "")


def _forget(directory: Path, name: str) -> None:
    """Damage was found: the file is hashed next time, and what was computed with these packs counts no longer."""
    marks = {other: mark for other, mark in _read_notes(directory).marks.items() if other != name}
    _write_notes(directory, Notes(marks, secrets.token_hex(8)))


def _write_notes(directory: Path, notes: Notes) -> None:
    remove_leftovers(directory)  # of runs that were killed while they noted this
    try:
        with atomic_path(directory / CHECKED) as temporary:
            temporary.write_text(json.dumps({"word": notes.word, "files": notes.marks}), encoding="utf-8")
    except I2LError as error:
        log.warning("the files will be hashed again at the next start, as the check cannot be noted: %s", error)
