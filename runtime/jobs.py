"""Many LoRAs: what a folder asks for, how far it has come, what became of it. :mod:`.making` makes them."""

import hashlib
import os
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, TypeAlias

from ..machine.progress import Report, silent
from .passes import ENCODERS
from .pictures.errors import FolderEmpty
from .pictures.files.formats import SUFFIXES
from .pictures.listing import folders_of, images_in

Per: TypeAlias = Literal["image", "folder"]
SUFFIX = ".safetensors"
NAME_BYTES = 255 - len(SUFFIX)
"""What file systems allow for a name, without the suffix of a LoRA."""
STAGE = "making LoRAs"
UNITS = 100
"""Progress per image: a pass over a small group takes a minute on a slow machine, and must be seen to move."""


@dataclass(frozen=True)
class Job:
    """One LoRA to make."""

    images: tuple[Path, ...]
    output: Path


@dataclass(frozen=True)
class Plan:
    """What a folder asks for."""

    jobs: tuple[Job, ...]
    skipped: tuple[Path, ...]
    """What in the folder belongs to no job."""


@dataclass
class BatchResult:
    """What became of every job."""

    written: list[Path] = field(default_factory=list)
    finished_before: list[Path] = field(default_factory=list)
    failed: list[tuple[Path, str]] = field(default_factory=list)
    """``(output that was not made, why)``."""
    from_cache: int = 0

    def to_dict(self) -> dict[str, Any]:
        return {
            "written": [str(path) for path in self.written],
            "finished_before": [str(path) for path in self.finished_before],
            "failed": [{"output": str(path), "error": error} for path, error in self.failed],
            "from_cache": self.from_cache,
        }


def plan_jobs(folder: Path, output_dir: Path, per: Per, *, recursive: bool = False) -> Plan:
    """One job for each image in ``folder``, or for each folder in it that holds images.

    An output is called like its image or folder, see :func:`output_names`. ``recursive`` takes what lies deeper too,
    and the outputs lie in folders of the same names.

    Raises:
        FolderEmpty: there is nothing to do.
        FolderUnreadable: a folder may not be looked into.
    """
    jobs: list[Job] = []
    skipped: list[Path] = []
    images, others = images_in(folder)
    if per == "image":
        for place in folders_of(folder, recursive=recursive, without=output_dir):
            images, others = images_in(place)
            outputs = output_dir / place.relative_to(folder)
            jobs += [Job((image,), outputs / name) for image, name in zip(images, output_names(images), strict=True)]
            skipped += [path for path in others if not (recursive and path.is_dir())]
    else:
        skipped = [*images, *(path for path in others if not path.is_dir())]
        filled: dict[Path, tuple[Path, ...]] = {}
        for top in (path for path in others if path.is_dir()):
            found = {p: images_in(p)[0] for p in folders_of(top, recursive=recursive, without=output_dir)}
            skipped += [] if any(found.values()) else [top]
            filled |= {place: tuple(inside) for place, inside in found.items() if inside}
        for parent in dict.fromkeys(place.parent for place in filled):
            places = [place for place in filled if place.parent == parent]
            outputs = output_dir / parent.relative_to(folder)
            names = output_names(places, folders=True)
            jobs += [Job(filled[place], outputs / name) for place, name in zip(places, names, strict=True)]
    if not jobs:
        raise FolderEmpty(folder, SUFFIXES, per_folder=per == "folder")
    return Plan(tuple(jobs), tuple(skipped))


class BatchProgress:
    """Adds what the pipeline tells of each pass to the progress of all images: it is the pipeline's report."""

    def __init__(self, report: Report = silent) -> None:
        self._report = report
        self._done = self._total = self._images = 0

    def begin(self, images: int) -> None:
        """So many images are to come."""
        self._done, self._total = 0, images * UNITS

    def leave_out(self, images: int) -> None:
        """So many images need no pass after all."""
        self._total -= images * UNITS

    def begin_pass(self, images: int) -> None:
        """The next stages are of so many images."""
        self._images = images

    def end_pass(self) -> None:
        """The images of the pass are done."""
        self._done += self._images * UNITS
        self._images = 0
        self._report(STAGE, self._done, self._total)

    def under_way(self, images: float) -> None:
        """So much of passes that have not ended is done, by whoever is at them."""
        self._report(STAGE, self._done + int(images * UNITS), self._total)

    def __call__(self, stage: str, done: int, total: int) -> None:
        """A stage of the pass has come so far. The two encoders take about the same time, the adapter hardly any.

        Before there are images it is what opening takes, such as the conversion of fp8 engines: told as it is.
        """
        if not self._total:
            self._report(stage, done, total)
            return
        before = [str(family) for family in ENCODERS].index(stage) if stage in ENCODERS else len(ENCODERS)
        share = min(1.0, (before + done / max(total, 1)) / len(ENCODERS))
        self._report(STAGE, self._done + int(share * self._images * UNITS), self._total)


def output_names(paths: Sequence[Path], *, folders: bool = False) -> list[str]:
    """A name for the LoRA of each picture or folder, no two alike on any file system, the same at every run.

    A picture gives its name without the suffix; where that is another's too, its name; where that is taken as well, or
    too long for a file, a part of it and a hash of all of it.
    """
    forms = [[path.name if folders else path.stem, path.name, _hashed(path.name)] for path in paths]
    level = [0] * len(paths)
    while True:
        names = [form[step] for form, step in zip(forms, level, strict=True)]
        groups: dict[str, list[int]] = {}
        for index, name in enumerate(names):
            groups.setdefault(_folded(name), []).append(index)
        moved = {index for index, name in enumerate(names) if len(os.fsencode(name)) > NAME_BYTES}
        for members in groups.values():
            if len(members) > 1:
                least = min(level[index] for index in members)
                moved |= {index for index in members if level[index] == least}
        moved -= {index for index in moved if level[index] == 2}
        if not moved:
            return [f"{name}{SUFFIX}" for name in names]
        for index in moved:
            level[index] += 1


def _folded(name: str) -> str:
    """Equal for names that some file system takes for one."""
    return unicodedata.normalize("NFC", name).casefold()


def _hashed(name: str) -> str:
    digest, kept = hashlib.sha256(os.fsencode(name)).hexdigest()[:8], name
    while len(os.fsencode(kept)) > NAME_BYTES - len(digest) - 1:
        kept = kept[:-1]
    return f"{kept}-{digest}"
