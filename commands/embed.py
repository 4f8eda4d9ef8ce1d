"""``i2l embed``."""

import json
from collections.abc import Sequence
from pathlib import Path

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
    The cache is $I2L_CACHE_DIR, by default i2l in the system's cache folder.
    """
    if not images:
        raise click.UsageError(str(NoImages()))
    require_gpu_for_budget(backend, vram_budget_bytes, device)
    from ..runtime.cache import default_cache_folder  # noqa: PLC0415
    from ..runtime.pictures.listing import list_images, skipped_line  # noqa: PLC0415
    from ..runtime.pictures.sources import load_squares  # noqa: PLC0415
    from ..runtime.pipeline import Pipeline  # noqa: PLC0415

    chosen = list_images(images, recursive=recursive)
    if chosen.skipped:
        tell(skipped_line(chosen.skipped), err=True)
    folder = default_cache_folder()
    with (
        show_progress("steps", quiet=as_json or is_quiet()) as report,
        Pipeline(
            engines,
            backend=backend,
            threads=threads,
            vram_budget_bytes=vram_budget_bytes,
            vram_margin_bytes=vram_margin_bytes,
            prove=not no_prove,
            device=device,
            report=report,
            cache=folder,
        ) as pipeline,
    ):
        squares, _ = load_squares(chosen.images, ignore_icc=ignore_icc)
        pipeline.embed(squares)
        assert pipeline.cache is not None
        paths = [pipeline.cache.path(square) for square in squares]
        pipeline.cache.require_kept(paths)
    facts = [
        {"image": str(image), "embedding": str(path), "from_cache": known}
        for image, path, known in zip(chosen.images, paths, pipeline.from_cache, strict=True)
    ]
    if as_json:
        click.echo(json.dumps({"cache": str(folder), "embeddings": facts}))
        return
    for image, known in zip(chosen.images, pipeline.from_cache, strict=True):
        tell(f"{format_path(image)}: {'was there' if known else 'computed'}")
    tell(f"{counted(len(facts), 'embedding')} in {format_path(folder)}")
