"""The LoRAs of a batch: grouped into passes, resumed where it was left, made by one pipeline or by many.

A finished output is known by what stands in its own header (the contents of its images, strength, weights, engines,
dtype and keys), so there is no state beside the files: deleting one makes it again, and so does changing its image.

A fast card would wait for pictures to be read and files to be written: both are done by a thread each, one group ahead
and one behind.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from ..engines.base import Array
from ..lora.errors import LoraNotFinite, LoraUnreadable
from ..lora.keys import KeyFormat
from ..lora.lora import DTYPES, Dtype, Lora, Origin
from ..lora.reading import describe_lora
from ..lora.replacing import LORA
from ..machine.errors import OutputTaken, OutputUnwritable
from ..machine.files import remove_leftovers
from ..machine.outputs import output_path
from .jobs import BatchProgress, BatchResult, Job
from .passes import IMAGES_PER_PASS
from .pictures.errors import ImageError
from .pictures.sources import ICC_KEY, colours_mark, images_mark, load_squares
from .pipeline import Pipeline

T = TypeVar("T")


@dataclass(frozen=True)
class Form:
    """What the LoRAs of a batch have in common."""

    strength: float = 1.0
    dtype: Dtype = "bf16"
    key_format: KeyFormat = "comfyui"
    ignore_icc: bool = False


@dataclass(frozen=True)
class Loaded:
    """A job whose images were read."""

    job: Job
    squares: Sequence[Image.Image]
    marks: Mapping[str, str]
    """What the header of its output says of the images; of the engines it says what made it in the end."""


def run_jobs(
    pipeline: Pipeline,
    jobs: Sequence[Job],
    form: Form = Form(),
    progress: BatchProgress | None = None,
    result: BatchResult | None = None,
) -> BatchResult:
    """Make the output of every job that is not finished yet, see :func:`unfinished_groups`.

    Args:
        pipeline: makes them.
        jobs: as :func:`plan_jobs` planned them.
        form: of the LoRAs.
        progress: told how far all of them are.
        result: what is made is noted there at once, so it is known even if an error ends the batch.

    Raises:
        StrengthInvalid, DiskFull, EnginesError: nothing further can be done; every file that is there is whole.
    """
    progress, result = progress or BatchProgress(), result or BatchResult()
    groups = unfinished_groups(jobs, lambda: pipeline.origin, form, progress, result)
    saves: list[tuple[Path, Future[None]]] = []
    with ThreadPoolExecutor(1, thread_name_prefix="i2l-save") as saving:  # what is made is saved, whatever fails then
        try:
            for group in one_ahead(groups):
                squares = [loaded.squares for loaded in group]
                loras, from_cache = make_loras(pipeline, squares, form.strength, progress)
                result.from_cache += from_cache
                made = list(zip(group, loras, strict=True))
                _note(saves, result)
                saves = [(loaded.job.output, saving.submit(_save, loaded, lora, form, result)) for loaded, lora in made]
            _note(saves, result)
        except KeyboardInterrupt:  # the file that is being written becomes whole; the next run makes the others
            for _, save in saves:
                save.cancel()
            raise
    return result


def one_ahead(items: Iterator[T]) -> Iterator[T]:
    """The items, each of which a thread takes while the one before is in use."""
    with ThreadPoolExecutor(1, thread_name_prefix="i2l-ahead") as thread:
        coming = thread.submit(next, items, None)
        while (item := coming.result()) is not None:
            coming = thread.submit(next, items, None)
            yield item


def _save(loaded: Loaded, lora: Lora, form: Form, result: BatchResult) -> None:
    lora.metadata |= loaded.marks
    result.written.append(lora.save(loaded.job.output, dtype=form.dtype, key_format=form.key_format))


def _note(saves: Sequence[tuple[Path, Future[None]]], result: BatchResult) -> None:
    """Wait for files that are being written, and note those that cannot be."""
    for output, save in saves:
        try:
            save.result()
        except (LoraNotFinite, OutputUnwritable) as error:
            result.failed.append((output, str(error)))


def unfinished_groups(
    jobs: Sequence[Job], origin: Callable[[], Origin], form: Form, progress: BatchProgress, result: BatchResult
) -> Iterator[list[Loaded]]:
    """Jobs whose outputs are still to be made, those that share passes together: at most so many images.

    Images of several jobs share passes over the weights, at most :data:`IMAGES_PER_PASS` each. What is wrong with one
    job is noted in ``result`` and does not stop the others, and what is finished is noted there too. ``origin`` is
    asked for each job: a card may have failed meanwhile.
    """
    progress.begin(sum(len(job.images) for job in jobs))
    group: list[Loaded] = []
    for job in jobs:
        try:
            squares, hashes = load_squares(job.images, ignore_icc=form.ignore_icc)
            marks = images_mark(hashes) | colours_mark(ignore_icc=form.ignore_icc)
            expected = origin().marks(len(squares), form.strength, None) | marks
            finished = _is_finished(job.output, expected, form)
        except (ImageError, OutputUnwritable) as error:
            result.failed.append((job.output, str(error)))
            progress.leave_out(len(job.images))
            continue
        if finished:
            result.finished_before.append(job.output)
            progress.leave_out(len(job.images))
            continue
        loaded = Loaded(job, squares, marks)
        if group and images_of(group) + len(squares) > IMAGES_PER_PASS:
            yield group
            group = []
        group.append(loaded)
    if group:
        yield group


def images_of(group: Sequence[Loaded]) -> int:
    """How many images a group has."""
    return sum(len(loaded.squares) for loaded in group)


def make_loras(
    pipeline: Pipeline, several: Sequence[Sequence[Image.Image]], strength: float, progress: BatchProgress
) -> tuple[Iterator[Lora], int]:
    """Embed the images of several LoRAs and run the adapter once for all of them.

    Returns:
        The LoRAs, joined one at a time as they are asked for, and how many embeddings came from the cache.
    """
    squares = [square for one in several for square in one]
    embeddings: list[Array] = []
    from_cache = 0
    for start in range(0, len(squares), IMAGES_PER_PASS):
        piece = squares[start : start + IMAGES_PER_PASS]
        progress.begin_pass(len(piece))
        embeddings.append(pipeline.embed(piece))
        from_cache += sum(pipeline.from_cache)
        progress.end_pass()
    factors = pipeline.factors(np.concatenate(embeddings))
    return _joined(pipeline, factors, [len(one) for one in several], strength), from_cache


def _joined(
    pipeline: Pipeline, factors: Mapping[str, tuple[Array, Array]], counts: Sequence[int], strength: float
) -> Iterator[Lora]:
    start = 0
    for count in counts:
        own = {module: (a[start : start + count], b[start : start + count]) for module, (a, b) in factors.items()}
        yield pipeline.lora_from_factors(own, strength=strength)
        start += count


def write_made(file: NDArray[np.uint8], output: Path) -> None:
    """A LoRA that was made elsewhere gets its name here, whole or not at all, as :meth:`Lora.save` would."""
    remove_leftovers(output.parent)
    with output_path(output, LORA) as temporary:
        file.tofile(temporary)


def _is_finished(path: Path, marks: Mapping[str, str], form: Form) -> bool:
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
    same_form = (facts["dtype"], facts["key_format"]) == (DTYPES[form.dtype], form.key_format)
    return same_form and marks.items() <= metadata.items()
