"""``i2l batch``."""

import json
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import click

from ..machine.progress import show_progress
from ..machine.wording import format_path, printable
from .options import (
    PATH,
    backend_option,
    cache_folder,
    debug_option,
    device_option,
    dtype_option,
    engines_option,
    ignore_icc_option,
    json_option,
    key_format_option,
    no_cache_option,
    no_prove_option,
    ram_budget_option,
    recursive_option,
    require_gpu_for_budget,
    strength_option,
    threads_option,
    vram_budget_option,
    vram_margin_option,
)
from .telling import AFTER_CTRL_C, counted, is_quiet, quiet_option, tell

if TYPE_CHECKING:
    from ..runtime.jobs import BatchResult, Plan
    from ..runtime.opening import PipelineOptions

HERE = "here"
"""Stands for no address: Ray is started on this machine."""


@click.command()
@click.argument("folder", type=PATH)
@engines_option
@click.option("--output-dir", type=PATH, required=True, metavar="DIR",
              help="Where the LoRA files go; made if it is not there.")  # fmt: skip
@click.option("--per", type=click.Choice(["image", "folder"]), default="image", show_default=True,
              help="One LoRA for each image in FOLDER, or for each folder in it.")  # fmt: skip
@recursive_option
@click.option("--dry-run", is_flag=True, help="Only say what would be made, how long it takes and how much disk.")
@backend_option
@threads_option
@ram_budget_option
@vram_budget_option
@vram_margin_option
@no_prove_option
@device_option
@click.option("--ray", "ray_address", is_flag=False, flag_value=HERE, metavar="[ADDRESS]",
              help="Let Ray's workers make them: of the cluster at ADDRESS (or auto), or without one of this machine, "
              "one for each card, or for each --threads CPUs.")  # fmt: skip
@strength_option
@dtype_option
@key_format_option
@ignore_icc_option
@no_cache_option
@json_option
@quiet_option
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
    device: str | None,
    ray_address: str | None,
    strength: float,
    dtype: Literal["bf16", "fp16", "fp32"],
    key_format: Literal["comfyui", "diffsynth"],
    *,
    no_prove: bool,
    recursive: bool,
    dry_run: bool,
    ignore_icc: bool,
    no_cache: bool,
    as_json: bool,
) -> None:
    """Make many LoRAs, one per picture or per folder.

    It can be stopped and started again: what is finished is skipped, a changed image is done anew. What cannot be made
    is listed at the end, with exit code 1.
    """
    require_gpu_for_budget(backend, vram_budget_bytes, device)
    if ray_address is not None and device is not None:
        raise click.UsageError("--device has no effect with --ray, which gives each worker a card: leave one out")
    from ..machine.files import explained_os_errors, remove_leftovers  # noqa: PLC0415
    from ..runtime.jobs import BatchProgress, BatchResult, plan_jobs  # noqa: PLC0415
    from ..runtime.making import Form, run_jobs  # noqa: PLC0415
    from ..runtime.pictures.listing import skipped_beside_folders, skipped_line  # noqa: PLC0415
    from ..runtime.pipeline import Pipeline  # noqa: PLC0415

    start = time.perf_counter()
    plan = plan_jobs(folder, output_dir, per, recursive=recursive)
    if plan.skipped:
        tell(skipped_line(plan.skipped) if per == "image" else skipped_beside_folders(plan.skipped), err=True)
    if dry_run:
        forecast(plan, engines, output_dir, dtype, as_json=as_json)
        return
    with explained_os_errors(output_dir):
        output_dir.mkdir(parents=True, exist_ok=True)
    remove_leftovers(output_dir)
    click.get_current_context().meta[AFTER_CTRL_C] = ": the same command goes on with the LoRAs that are not there yet"
    form, result = Form(strength, dtype, key_format, ignore_icc), BatchResult()
    more: dict[str, Any] = {}
    with show_progress("steps", quiet=as_json or is_quiet()) as report:
        progress = BatchProgress(report)
        options: PipelineOptions = {
            "backend": backend,
            "threads": threads,
            "ram_budget_bytes": ram_budget_bytes,
            "vram_budget_bytes": vram_budget_bytes,
            "vram_margin_bytes": vram_margin_bytes,
            "prove": not no_prove,
        }
        if ray_address is None:
            cache = cache_folder(no_cache=no_cache)
            with Pipeline(engines, **options, device=device, report=progress, cache=cache) as pipeline:
                if device is None:
                    tell_of_idle_cards(pipeline.backend_name)
                with told_as_json(result, start) if as_json else nullcontext():
                    run_jobs(pipeline, plan.jobs, form, progress, result)
                if pipeline.vram:
                    more["vram"] = pipeline.vram
        else:
            from ..cluster.batch_worker import WorkerSettings  # noqa: PLC0415
            from ..cluster.driving import run_on_ray  # noqa: PLC0415

            settings = WorkerSettings(engines.absolute(), options, use_cache=not no_cache)
            address = None if ray_address == HERE else ray_address
            with told_as_json(result, start) if as_json else nullcontext():
                shares = run_on_ray(address, settings, plan.jobs, form, progress, result)
            more["workers"] = [asdict(share) for share in shares]
    seconds = time.perf_counter() - start
    if as_json:
        click.echo(json.dumps(result.to_dict() | {"seconds": round(seconds, 3)} | more))
    else:
        tell(
            f"{counted(len(result.written), 'LoRA')} written to {format_path(output_dir)} in {seconds:.1f} s, "
            f"{len(result.finished_before)} finished before, {counted(result.from_cache, 'embedding')} from the cache"
        )
    for output, error in result.failed:
        click.echo(f"failed: {printable(output.name)}: {error}", err=True)
    if result.failed:
        click.echo(f"error: {len(result.failed)} of {len(plan.jobs)} LoRAs were not made", err=True)
        raise click.exceptions.Exit(1)


@contextmanager
def told_as_json(result: "BatchResult", start: float) -> Iterator[None]:
    """Print what there is of a batch, and why it ended, if an error ends it."""
    from ..machine.errors import I2LError  # noqa: PLC0415

    try:
        yield
    except I2LError as error:
        facts = {"seconds": round(time.perf_counter() - start, 3), "error": str(error)}
        click.echo(json.dumps(result.to_dict() | facts))
        raise


def tell_of_idle_cards(backend: str) -> None:
    """A pipeline uses one card; with Ray each has a worker."""
    from ..engines.backends import offer_of  # noqa: PLC0415

    cards = [card for card in offer_of(backend).find().cards if not card.software]
    if len(cards) > 1:
        tell(f"one of the {len(cards)} cards of this machine works; all of them do with --ray", err=True)


def forecast(
    plan: "Plan", engines: Path, output_dir: Path, dtype: Literal["bf16", "fp16", "fp32"], *, as_json: bool
) -> None:
    """Say what the batch will take. A LoRA that is there counts as finished: whether it still is, shows the batch."""
    from ..engines.directory.manifest import read_manifest  # noqa: PLC0415
    from ..look.forecast import lora_bytes, room, roughly, seconds_per_image  # noqa: PLC0415
    from ..machine.errors import DiskFull  # noqa: PLC0415
    from ..machine.files import free_bytes  # noqa: PLC0415
    from ..specs import AdapterSpec  # noqa: PLC0415

    manifest = read_manifest(engines)
    adapter = manifest.models["adapter"].spec
    assert isinstance(adapter, AdapterSpec)
    missing = [job for job in plan.jobs if not job.output.exists()]
    images = [len(job.images) for job in missing]
    per_image = seconds_per_image(manifest.models, manifest.precision)
    seconds = None if per_image is None else per_image * sum(images)
    needed, free = lora_bytes(adapter, images, dtype), free_bytes(output_dir)
    there = len(plan.jobs) - len(missing)
    if as_json:
        outputs = [str(job.output) for job in missing]
        facts = {
            "outputs": outputs,
            "there_already": there,
            "pictures": sum(images),
            "bytes": needed,
            "free_bytes": free,
        }
        click.echo(json.dumps({**facts, "predicted_seconds": seconds}))
    else:
        loras, pictures = counted(len(missing), "LoRA"), counted(sum(images), "picture")
        click.echo(f"{loras} from {pictures} to {format_path(output_dir)}, {there} there already")
        for job in missing:
            click.echo(f"  {format_path(job.output)}")
        click.echo(f"needs {room(needed, free)}; {roughly(seconds)}")
    if needed > free:
        raise DiskFull(output_dir, needed, free)
