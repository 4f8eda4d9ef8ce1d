"""The jobs' folder: what was accepted is known there, so that a service that was killed can say what became of it.

A job has a folder of its own, ``ID/``. While its request is received and read it holds the pictures; ``job.json`` is
written, whole, when the job is accepted and again when it has ended; ``NAME.safetensors`` appears whole. So whatever
moment the service is killed at, each folder says one of these when it starts again:

* no ``job.json``: the job was never accepted, and nobody was told that it was; it is removed;
* ``accepted`` and no LoRA: the job is lost, and said to be;
* ``accepted`` and a LoRA: it is done, the service only had no time to write so;
* another state: that is what became of it.

Nothing is flushed to the disk: this is for programs that are killed, not for power that fails.
"""

import json
import logging
import re
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from math import isqrt
from pathlib import Path
from typing import Any

from PIL import Image

from ..machine.files import atomic_path, explained_os_errors, read_small
from ..machine.locks import exclusive
from ..machine.wording import format_path
from .errors import JobsFolderForeign, JobsFolderTaken
from .wishes import NOT_IN_NAMES

log = logging.getLogger(__name__)
RECORD = "job.json"
LOCK = "lock"
JOB = re.compile(r"[0-9a-f]{32}")
"""How jobs are called, and so their folders."""


@dataclass(frozen=True)
class Record:
    """What ``job.json`` says."""

    id: str
    name: str
    state: str
    """``accepted``, or how it ended."""
    at: float
    """Seconds since 1970, of that state."""
    facts: dict[str, Any] = field(default_factory=dict)
    """What the job's report says beside."""


class Spool:
    """The jobs' folder, which one service has for itself until :meth:`close`.

    Raises:
        JobsFolderForeign: something else lies there. JobsFolderTaken: another service has it.
        OutputUnwritable, DiskFull: it cannot be made or written.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._held = ExitStack()

        def taken() -> None:
            raise JobsFolderTaken(folder)

        with explained_os_errors(folder):
            folder.mkdir(parents=True, exist_ok=True)
            for entry in sorted(folder.iterdir()):
                if not (entry.name == LOCK or entry.name.startswith(".") or JOB.fullmatch(entry.name)):
                    raise JobsFolderForeign(folder, entry)
            folder.chmod(0o700)
            self._held.enter_context(exclusive(folder / LOCK, waiting=taken))

    def close(self) -> None:
        """Let another service have it."""
        self._held.close()

    def make(self, job_id: str) -> Path:
        """The folder of a new job."""
        folder = self.folder / job_id
        with explained_os_errors(folder):
            folder.mkdir()
        return folder

    def write(self, record: Record) -> None:
        """Write ``job.json``; raises :class:`DiskFull` or :class:`OutputUnwritable`."""
        with atomic_path(self.folder / record.id / RECORD) as temporary:
            facts = {"name": record.name, "state": record.state, "at": record.at, "facts": record.facts}
            temporary.write_text(json.dumps(facts), encoding="utf-8")

    def remove(self, job_id: str) -> None:
        """Everything of a job; what cannot be removed is said, and stays."""
        shutil.rmtree(self.folder / job_id, ignore_errors=True)
        if (self.folder / job_id).exists():
            log.warning("%s cannot be removed", format_path(self.folder / job_id))

    def lora(self, job_id: str, name: str) -> Path:
        """Where a job's LoRA lies or would lie."""
        return self.folder / job_id / f"{name}.safetensors"

    def recover(self) -> Iterator[Record]:
        """What an earlier service left, each with the state that it is in now; leftovers are removed."""
        for folder in sorted(path for path in self.folder.iterdir() if JOB.fullmatch(path.name)):
            record = self._read(folder)
            if record is None:
                self.remove(folder.name)
                continue
            for path in folder.iterdir():
                if path.name.startswith((".", "picture-", "square-")):
                    path.unlink()
            if record.state == "accepted":
                state = "done" if self.lora(record.id, record.name).is_file() else "lost"
                record = Record(record.id, record.name, state, record.at, record.facts)
                self.write(record)
            elif record.state == "done" and not self.lora(record.id, record.name).is_file():  # fetched, and going
                self.remove(folder.name)
                continue
            yield record

    def _read(self, folder: Path) -> Record | None:
        try:
            return _record(folder.name, json.loads(read_small(folder / RECORD)))
        except FileNotFoundError:
            return None
        except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
            log.warning("%s cannot be understood (%s): removed", format_path(folder / RECORD), error)
            return None


def _record(job_id: str, values: Mapping[str, Any]) -> Record:
    if NOT_IN_NAMES & set(values["name"]):
        raise ValueError("its name would be a path")
    return Record(job_id, values["name"], str(values["state"]), float(values["at"]), dict(values["facts"]))


def keep_squares(folder: Path, squares: Sequence[Image.Image]) -> None:
    """Keep the pictures of a waiting job as pixels, 3 MiB each: on the disk, as a long queue of them is gigabytes."""
    for index, square in enumerate(squares):
        path = folder / f"square-{index}.rgb"
        with explained_os_errors(path):
            path.write_bytes(square.tobytes())


def kept_squares(folder: Path, pictures: int) -> list[Image.Image]:
    """What :func:`keep_squares` kept."""
    pixels = [(folder / f"square-{index}.rgb").read_bytes() for index in range(pictures)]
    return [Image.frombytes("RGB", (isqrt(len(each) // 3),) * 2, each) for each in pixels]


def forget_pictures(folder: Path) -> None:
    """Remove a job's pictures, which are private and large; its LoRA stays."""
    for path in (*folder.glob("picture-*"), *folder.glob("square-*")):
        try:
            path.unlink(missing_ok=True)
        except OSError as error:
            log.warning("%s cannot be removed: %s", format_path(path), error.strerror)
