"""Many LoRAs from one opened pipeline: planned, grouped into passes, resumed where it was left.

A finished output is known by what stands in its own header (the contents of its images, strength, weights, engines,
dtype and keys), so there is no state beside the files: deleting one makes it again, and so does changing its image.
"""

import hashlib
import os
import unicodedata
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, TypeAlias

import numpy as np
from PIL import Image

from ..engines.base import Array
from ..lora.errors import LoraNotFinite, LoraUnreadable
from ..lora.keys import KeyFormat
from ..lora.lora import DTYPES, Dtype
from ..lora.reading import describe_lora
from ..machine.errors import OutputTaken, OutputUnwritable
from ..machine.progress import Report, silent
from .passes import ENCODERS, IMAGES_PER_PASS
from .pictures.errors import FolderEmpty, ImageError
from .pictures.files.formats import SUFFIXES
from .pictures.listing import folders_of, images_in
from .pictures.sources import ICC_KEY, colours_mark, images_mark, load_squares
from .pipeline import Pipeline

Per: TypeAlias = Literal["image", "folder"]
SUFFIX = ".safetensors"
NAME_BYTES = 255 - len(SUFFIX)
"""What file systems allow for a name, without the suffix of a LoRA."""
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


@dataclass(frozen=True)
class _Loaded:
    """A job whose images were read."""

    job: Job
    squares: Sequence[Image.Image]
    marks: Mapping[str, str]
    """What the header of its output must say."""


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

    def __call__(self, stage: str, done: int, total: int) -> None:
        """A stage of the pass has come so far. The two encoders take about the same time, the adapter hardly any."""
        before = [str(family) for family in ENCODERS].index(stage) if stage in ENCODERS else len(ENCODERS)
        share = min(1.0, (before + done / max(total, 1)) / len(ENCODERS))
        self._report("making LoRAs", self._done + int(share * self._images * UNITS), self._total)


def run_jobs(
    pipeline: Pipeline,
    jobs: Sequence[Job],
    *,
    strength: float = 1.0,
    dtype: Dtype = "bf16",
    key_format: KeyFormat = "comfyui",
    ignore_icc: bool = False,
    progress: BatchProgress | None = None,
) -> BatchResult:
    """Make the output of every job that is not finished yet.

    Images of several jobs share passes over the weights, at most :data:`IMAGES_PER_PASS` each. What is wrong with one
    job is noted and does not stop the others; a full disk or damaged engines stop all.

    Raises:
        StrengthInvalid, DiskFull, EnginesError: nothing further can be done; every file that is there is whole.
    """
    progress = progress or BatchProgress()
    progress.begin(sum(len(job.images) for job in jobs))
    result = BatchResult()
    group: list[_Loaded] = []
    for job in jobs:
        try:
            loaded = _load(pipeline, job, strength, ignore_icc=ignore_icc)
            finished = _is_finished(job.output, loaded.marks, dtype, key_format)
        except (ImageError, OutputUnwritable) as error:
            result.failed.append((job.output, str(error)))
            progress.leave_out(len(job.images))
            continue
        if finished:
            result.finished_before.append(job.output)
            progress.leave_out(len(job.images))
            continue
        if group and sum(len(waiting.squares) for waiting in group) + len(loaded.squares) > IMAGES_PER_PASS:
            _make(pipeline, group, strength, dtype, key_format, progress, result)
            group = []
        group.append(loaded)
    if group:
        _make(pipeline, group, strength, dtype, key_format, progress, result)
    return result


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


def _load(pipeline: Pipeline, job: Job, strength: float, *, ignore_icc: bool) -> _Loaded:
    squares, hashes = load_squares(job.images, ignore_icc=ignore_icc)
    marks = images_mark(hashes) | colours_mark(ignore_icc=ignore_icc)
    return _Loaded(job, squares, pipeline.origin(len(squares), strength, None) | marks)


def _is_finished(path: Path, marks: Mapping[str, str], dtype: Dtype, key_format: KeyFormat) -> bool:
    """Is ``path`` what the job would make? A file that i2l did not make is not ours to replace."""
    if not path.exists():
        return False
    try:
        facts = describe_lora(path)
    except LoraUnreadable as error:
        raise OutputTaken(path, "there already, and no LoRA") from error
    metadata = facts["metadata"]
    assert isinstance(metadata, dict)
    if not marks.keys() - {ICC_KEY} <= metadata.keys():  # 0.x files before profiles were read do not have that one
        raise OutputTaken(path, "there already, and not from `i2l batch` or `i2l run`")
    same_form = (facts["dtype"], facts["key_format"]) == (DTYPES[dtype], key_format)
    return same_form and marks.items() <= metadata.items()


def _make(
    pipeline: Pipeline,
    group: Sequence[_Loaded],
    strength: float,
    dtype: Dtype,
    key_format: KeyFormat,
    progress: BatchProgress,
    result: BatchResult,
) -> None:
    """Embed the images of a group, run the adapter once for all of them, write each LoRA."""
    squares = [square for loaded in group for square in loaded.squares]
    embeddings: list[Array] = []
    for start in range(0, len(squares), IMAGES_PER_PASS):
        piece = squares[start : start + IMAGES_PER_PASS]
        progress.begin_pass(len(piece))
        embeddings.append(pipeline.embed(piece))
        result.from_cache += sum(pipeline.from_cache)
        progress.end_pass()
    factors = pipeline.factors(np.concatenate(embeddings))
    start = 0
    for loaded in group:
        stop = start + len(loaded.squares)
        own = {module: (a[start:stop], b[start:stop]) for module, (a, b) in factors.items()}
        lora = pipeline.lora_from_factors(own, strength=strength)
        lora.metadata |= loaded.marks
        try:
            result.written.append(lora.save(loaded.job.output, dtype=dtype, key_format=key_format))
        except (LoraNotFinite, OutputUnwritable) as error:
            result.failed.append((loaded.job.output, str(error)))
        start = stop
