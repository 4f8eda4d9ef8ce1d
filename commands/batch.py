"""``i2l batch``."""

import json
import time
from pathlib import Path
from typing import Literal

import click

from ..machine.progress import show_progress
from ..machine.wording import format_path, printable
from .options import (
    PATH,
    backend_option,
    cache_folder,
    debug_option,
    dtype_option,
    engines_option,
    ignore_icc_option,
    json_option,
    key_format_option,
    no_cache_option,
    ram_budget_option,
    require_gpu_for_budget,
    strength_option,
    threads_option,
    vram_budget_option,
    vram_margin_option,
)


@click.command()
@click.argument("folder", type=PATH)
@engines_option
@click.option("--output-dir", type=PATH, required=True, metavar="DIR",
              help="Where the LoRA files go; made if it is not there.")  # fmt: skip
@click.option("--per", type=click.Choice(["image", "folder"]), default="image", show_default=True,
              help="One LoRA for each image in FOLDER, or for each folder in it.")  # fmt: skip
@backend_option
@threads_option
@ram_budget_option
@vram_budget_option
@vram_margin_option
@strength_option
@dtype_option
@key_format_option
@ignore_icc_option
@no_cache_option
@json_option
@debug_option
def batch(
    folder: Path,
    engines: Path,
    output_dir: Path,
    per: Literal["image", "folder"],
    backend: str,
    threads: int | None,
    ram_budget_bytes: int | None,
    vram_budget_bytes: int | None,
    vram_margin_bytes: int,
    strength: float,
    dtype: Literal["bf16", "fp16", "fp32"],
    key_format: Literal["comfyui", "diffsynth"],
    *,
    ignore_icc: bool,
    no_cache: bool,
    as_json: bool,
) -> None:
    """Make many LoRAs, one per picture or per folder.

    It can be stopped and started again: what is finished is skipped, a changed image is done anew. What cannot be made
    is listed at the end, with exit code 1.
    """
    require_gpu_for_budget(backend, vram_budget_bytes)
    from ..machine.files import explained_os_errors, remove_leftovers  # noqa: PLC0415
    from ..runtime.jobs import BatchProgress, plan_jobs, run_jobs  # noqa: PLC0415
    from ..runtime.pictures.listing import skipped_line  # noqa: PLC0415
    from ..runtime.pipeline import Pipeline  # noqa: PLC0415

    start = time.perf_counter()
    plan = plan_jobs(folder, output_dir, per)
    if plan.skipped:
        wanted = "a picture" if per == "image" else "a folder with images"
        click.echo(skipped_line(plan.skipped, wanted), err=True)
    with explained_os_errors(output_dir):
        output_dir.mkdir(parents=True, exist_ok=True)
    remove_leftovers(output_dir)
    with show_progress("steps", quiet=as_json) as report:
        progress = BatchProgress(report)
        cache = cache_folder(no_cache=no_cache)
        with Pipeline(
            engines,
            backend=backend,
            threads=threads,
            ram_budget_bytes=ram_budget_bytes,
            vram_budget_bytes=vram_budget_bytes,
            vram_margin_bytes=vram_margin_bytes,
            report=progress,
            cache=cache,
        ) as pipeline:
            result = run_jobs(
                pipeline,
                plan.jobs,
                strength=strength,
                dtype=dtype,
                key_format=key_format,
                ignore_icc=ignore_icc,
                progress=progress,
            )
            vram = pipeline.vram
    seconds = time.perf_counter() - start
    if as_json:
        facts = result.to_dict() | {"seconds": round(seconds, 3)}
        click.echo(json.dumps(facts | {"vram": vram} if vram else facts))
    else:
        click.echo(
            f"{len(result.written)} LoRAs written to {format_path(output_dir)} in {seconds:.1f} s, "
            f"{len(result.finished_before)} were finished before, {result.from_cache} embeddings came from the cache"
        )
    for output, error in result.failed:
        click.echo(f"failed: {printable(output.name)}: {error}", err=True)
    if result.failed:
        click.echo(f"error: {len(result.failed)} of {len(plan.jobs)} LoRAs were not made", err=True)
        raise click.exceptions.Exit(1)
