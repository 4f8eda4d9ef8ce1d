"""Are the files what the build wrote? Hashed once, then watched by size and modification time.

Hashing 8 GB takes seconds, starting a run must not. So a file's SHA-256 is compared when it is first seen; its size,
inode and modification time then go to ``checked.json`` beside the manifest, and as long as these three stay the same
the file is not read again (git's index works so). Graphs and manifest are small; the packs are what this is for.
"""

import hashlib
import json
import logging
from pathlib import Path

from ...machine.errors import I2LError
from ...machine.files import atomic_path
from ...machine.wording import format_bytes
from ..errors import EngineFileDamaged
from .manifest import FileFacts, Manifest

log = logging.getLogger(__name__)
CHECKED = "checked.json"
READ_BYTES = 1 << 22


def file_facts(path: Path) -> FileFacts:
    """Size and SHA-256 of a file."""
    digest = hashlib.sha256()
    with path.open("rb", buffering=0) as file:
        while block := file.read(READ_BYTES):
            digest.update(block)
    return FileFacts(path.stat().st_size, digest.hexdigest())


def check_files(directory: Path, manifest: Manifest, *, again: bool = False) -> None:
    """Compare every file with the manifest.

    Args:
        directory: the engines directory.
        manifest: its manifest.
        again: hash also what was checked before.

    Raises:
        EngineFileDamaged: a file is absent or differs.
    """
    known = {} if again else _read_checked(directory)
    marks = {}
    for name, wanted in manifest.files.items():
        path = directory / manifest.build / name
        if not path.is_file():
            raise EngineFileDamaged(path, directory, "it is gone")
        if path.stat().st_size != wanted.nbytes:
            raise EngineFileDamaged(path, directory, f"it has {path.stat().st_size} bytes, not {wanted.nbytes}")
        marks[name] = _mark(path, wanted)
        if known.get(name) != marks[name]:
            if wanted.nbytes > READ_BYTES:
                log.info("checking %s (%s), once", name, format_bytes(wanted.nbytes))
            if file_facts(path) != wanted:
                raise EngineFileDamaged(path, directory, "its content hash differs")
    if marks != known:
        _write_checked(directory, marks)


def record_checked(directory: Path, manifest: Manifest) -> None:
    """Note that all files are good: their hashes were taken while they were written."""
    _write_checked(directory, {name: _mark(directory / manifest.build / name, f) for name, f in manifest.files.items()})


def _mark(path: Path, facts: FileFacts) -> str:
    stat = path.stat()
    return f"{facts.sha256} {stat.st_size} {stat.st_mtime_ns} {stat.st_ino}"


def _read_checked(directory: Path) -> dict[str, str]:
    try:
        marks = json.loads((directory / CHECKED).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return marks if isinstance(marks, dict) else {}


def _write_checked(directory: Path, marks: dict[str, str]) -> None:
    try:
        with atomic_path(directory / CHECKED) as temporary:
            temporary.write_text(json.dumps(marks), encoding="utf-8")
    except I2LError as error:
        log.warning("the files will be hashed again at the next start, as the check cannot be noted: %s", error)
