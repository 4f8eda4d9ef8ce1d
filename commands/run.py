"""``i2l run``."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

import click

from ..machine.progress import show_progress
from ..machine.wording import format_bytes, format_path
from ..runtime.pictures.errors import NoImages
from .options import (
    PATH,
    backend_option,
    cache_folder,
    debug_option,
    device_option,
    dtype_option,
    engines_option,
    force_option,
    ignore_icc_option,
    json_option,
    key_format_option,
    lora_output_option,
    no_cache_option,
    no_prove_option,
    ram_budget_option,
    recursive_option,
    reduce_rank_option,
    require_gpu_for_budget,
    require_weights,
    strength_option,
    threads_option,
    vram_budget_option,
    vram_margin_option,
    weight_option,
)
from .telling import backend_words, is_quiet, quiet_option, tell
from .tracing import trace_option, traced


@click.command()
@click.argument("images", nargs=-1, type=PATH, metavar="IMAGE...")
@engines_option
@lora_output_option
@backend_option
@threads_option
@ram_budget_option
@vram_budget_option
@vram_margin_option
@no_prove_option
@device_option
@strength_option
@weight_option("image")
@reduce_rank_option
@dtype_option
@key_format_option
@recursive_option
@ignore_icc_option
@no_cache_option
@force_option
@trace_option
@json_option
@quiet_option
@debug_option
def run(
    images: Sequence[Path],
    engines: Path,
    output: Path,
    backend: str,
    threads: int | None,
    ram_budget_bytes: int | None,
    vram_budget_bytes: int | None,
    vram_margin_bytes: int,
    device: str | None,
    strength: float,
    weights: Sequence[float],
    reduce_rank: int | None,
    dtype: Literal["bf16", "fp16", "fp32"],
    key_format: Literal["comfyui", "diffsynth"],
    *,
    no_prove: bool,
    recursive: bool,
    ignore_icc: bool,
    no_cache: bool,
    force: bool,
    trace: Path | None,
    as_json: bool,
) -> None:
    """Turn one or more pictures into one LoRA.

    Its rank is four per IMAGE. A folder stands for the images in it, in natural order of their names.
    """
    if not images:
        raise click.UsageError(str(NoImages()))
    require_gpu_for_budget(backend, vram_budget_bytes, device)
    from ..lora.replacing import LORA  # noqa: PLC0415
    from ..machine.files import require_writable  # noqa: PLC0415
    from ..machine.memory import peak_resident_bytes  # noqa: PLC0415
    from ..machine.outputs import require_output  # noqa: PLC0415
    from ..runtime.pictures.listing import list_images, skipped_line  # noqa: PLC0415
    from ..runtime.pipeline import Pipeline  # noqa: PLC0415

    chosen = list_images(images, recursive=recursive)
    if chosen.skipped:
        tell(skipped_line(chosen.skipped), err=True)
    require_weights(weights, len(chosen.images), "image")
    images = chosen.images
    require_writable(output)
    require_output(output, LORA, inputs=images, force=force)
    cache = cache_folder(no_cache=no_cache)
    with (
        traced(trace, images) as tracing,
        show_progress("steps", quiet=as_json or is_quiet()) as report,
        Pipeline(
            engines,
            backend=backend,
            threads=threads,
            ram_budget_bytes=ram_budget_bytes,
            vram_budget_bytes=vram_budget_bytes,
            vram_margin_bytes=vram_margin_bytes,
            prove=not no_prove,
            device=device,
            report=report,
            cache=cache,
            trace=tracing,
        ) as pipeline,
    ):
        lora = pipeline.lora_from_images(images, strength=strength, weights=weights or None, ignore_icc=ignore_icc)
        reduction = None
        if reduce_rank:
            from ..lora.lowrank import reduce_lora  # noqa: PLC0415

            with pipeline.timings.stage("reduce rank"):
                lora, reduction = reduce_lora(lora, reduce_rank)
        with pipeline.timings.stage("save"):
            lora.save(output, dtype=dtype, key_format=key_format, force=force)
        vram = pipeline.vram
    seconds = pipeline.timings.seconds
    facts = {
        "output": str(output),
        "tensors": 2 * len(lora.factors),
        "rank": lora.rank,
        "from_cache": sum(pipeline.from_cache),
        "images": [str(image) for image in images],
        "seconds": {
            **{stage: round(value, 4) for stage, value in seconds.items()},
            "total": round(sum(seconds.values()), 4),
        },
        "peak_resident_bytes": peak_resident_bytes(),
        "backend": pipeline.backend_name,
        "backend_reason": pipeline.backend_reason,
        "precision": pipeline.manifest.precision,
        "runs_as": pipeline.runs_as,
    }
    if vram:
        facts["vram"] = vram
    if reduction:
        facts["rank_reduction"] = reduction.to_dict()
    if as_json:
        click.echo(json.dumps(facts))
        return
    if reduction:
        tell(reduction)
    if cache and any(pipeline.from_cache):
        tell(f"{sum(pipeline.from_cache)} of {len(images)} embeddings came from {format_path(cache)}")
    precision = pipeline.manifest.precision
    converted = "" if precision == pipeline.runs_as else f", {precision} run as {pipeline.runs_as}"
    stages = ", ".join(f"{stage} {value:.2f}" for stage, value in seconds.items())
    tell(
        f"{format_path(output)}: {2 * len(lora.factors)} tensors, rank {lora.rank}, "
        f"{format_bytes(output.stat().st_size)}\n"
        f"{sum(seconds.values()):.2f} s ({stages}), peak {format_bytes(peak_resident_bytes())} resident, "
        f"{backend_words(pipeline.backend_name, backend)}{converted}"
    )
