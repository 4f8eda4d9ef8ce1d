"""``i2l embed``."""

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from ..machine.progress import show_progress
from ..machine.wording import format_path
from ..runtime.pictures.errors import NoImages
from .options import (
    PATH,
    backend_option,
    debug_option,
    device_option,
    engines_option,
    ignore_icc_option,
    json_option,
    no_prove_option,
    recursive_option,
    require_gpu_for_budget,
    threads_option,
    vram_budget_option,
    vram_margin_option,
)
from .telling import counted, is_quiet, quiet_option, tell

if TYPE_CHECKING:
    from PIL import Image

    from ..runtime.jobs import BatchProgress
    from ..runtime.pipeline import Pipeline


@click.command()
@click.argument("images", nargs=-1, type=PATH, metavar="IMAGE...")
@engines_option
@backend_option
@threads_option
@vram_budget_option
@vram_margin_option
@no_prove_option
@device_option
@recursive_option
@ignore_icc_option
@json_option
@quiet_option
@debug_option
def embed(
    images: Sequence[Path],
    engines: Path,
    backend: str,
    threads: int | None,
    vram_budget_bytes: int | None,
    vram_margin_bytes: int,
    device: str | None,
    *,
    no_prove: bool,
    recursive: bool,
    ignore_icc: bool,
    as_json: bool,
) -> None:
    """Compute embeddings into the cache, for later runs.

    After it, `i2l run` and `i2l batch` need only the adapter for these IMAGEs. A folder stands for the images in it.
    The cache is $I2L_CACHE_DIR, by default i2l in the system's cache folder. It can be stopped and started again; what
    cannot be read is listed at the end, with exit code 1.
    """
    if not images:
        raise click.UsageError(str(NoImages()))
    require_gpu_for_budget(backend, vram_budget_bytes, device)
    from ..runtime.cache import default_cache_folder  # noqa: PLC0415
    from ..runtime.jobs import BatchProgress  # noqa: PLC0415
    from ..runtime.pictures.listing import list_images, skipped_line  # noqa: PLC0415
    from ..runtime.pipeline import Pipeline  # noqa: PLC0415

    chosen = list_images(images, recursive=recursive)
    if chosen.skipped:
        tell(skipped_line(chosen.skipped), err=True)
    folder = default_cache_folder()
    with show_progress("steps", quiet=as_json or is_quiet()) as report:
        progress = BatchProgress(report)
        with Pipeline(
            engines,
            backend=backend,
            threads=threads,
            vram_budget_bytes=vram_budget_bytes,
            vram_margin_bytes=vram_margin_bytes,
            prove=not no_prove,
            device=device,
            report=progress,
            cache=folder,
        ) as pipeline:
            done = embed_in_passes(pipeline, chosen.images, progress, ignore_icc=ignore_icc)
    if as_json:
        click.echo(json.dumps({"cache": str(folder), "embeddings": done.kept, "failed": done.failed}))
    else:
        for facts in done.kept:
            tell(f"{format_path(Path(facts['image']))}: {'was there' if facts['from_cache'] else 'computed'}")
        tell(f"{counted(len(done.kept), 'embedding')} in {format_path(folder)}")
    if done.failed:
        for failure in done.failed:
            click.echo(f"failed: {failure['error']}", err=True)
        click.echo(f"error: {len(done.failed)} of {counted(len(chosen.images), 'image')} cannot be used", err=True)
        raise click.exceptions.Exit(1)


@dataclass
class Embedded:
    """What became of the images."""

    kept: list[dict[str, Any]] = field(default_factory=list)
    """``image``, ``embedding`` (the file) and ``from_cache`` of each."""
    failed: list[dict[str, str]] = field(default_factory=list)
    """``image`` and ``error`` of those that cannot be read."""


def embed_in_passes(
    pipeline: "Pipeline", images: Sequence[Path], progress: "BatchProgress", *, ignore_icc: bool
) -> Embedded:
    """Embed images, those of one pass in memory at a time: a folder may hold thousands, of 3 MiB each."""
    from ..runtime.passes import IMAGES_PER_PASS  # noqa: PLC0415
    from ..runtime.pictures.errors import ImageError  # noqa: PLC0415
    from ..runtime.pictures.sources import load_squares  # noqa: PLC0415

    done, cache = Embedded(), pipeline.cache
    assert cache is not None
    progress.begin(len(images))
    for start in range(0, len(images), IMAGES_PER_PASS):
        squares: list[Image.Image] = []
        read: list[Path] = []
        for image in images[start : start + IMAGES_PER_PASS]:
            try:
                squares += load_squares(image, ignore_icc=ignore_icc)[0]
                read.append(image)
            except ImageError as error:
                done.failed.append({"image": str(image), "error": str(error)})
                progress.leave_out(1)
        if not squares:
            continue
        progress.begin_pass(len(squares))
        pipeline.embed(squares)
        progress.end_pass()
        paths = [cache.path(square) for square in squares]
        cache.require_kept(paths)
        done.kept += [
            {"image": str(image), "embedding": str(path), "from_cache": known}
            for image, path, known in zip(read, paths, pipeline.from_cache, strict=True)
        ]
    return done
