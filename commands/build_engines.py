"""``i2l build-engines``."""

from pathlib import Path

import click

from ..errors import format_bytes, format_path
from ..progress import show_progress
from ..specs import DIFFUSION_MODELS, DiffusionModel
from .options import PATH, debug_option, needs_extra


@click.command()
@click.option("--models", type=PATH, required=True, help="Folder with the three checkpoints, under any names.")
@click.option("--engines", type=PATH, required=True, help="The engines directory to make or renew.")
@click.option(
    "--precision", type=click.Choice(["auto", "fp8", "int8", "bf16", "fp32"]), default="auto", show_default=True
)
@click.option("--adapter", type=click.Choice(DIFFUSION_MODELS),
              help="What the LoRAs are for, if adapters for several diffusion models are under --models.")  # fmt: skip
@click.option("--blocks-per-chunk", type=click.IntRange(min=1), default=1, show_default=True,
              help="Transformer blocks that move as one copy.")  # fmt: skip
@click.option("--force", is_flag=True, help="Build even if nothing changed.")
@debug_option
def build_engines(
    models: Path, engines: Path, precision: str, adapter: DiffusionModel | None, blocks_per_chunk: int, *, force: bool
) -> None:
    """Build an engines directory from the checkpoints: once per machine."""
    with needs_extra("export", "i2l build-engines"):
        from ..export.build import build_engines as build  # noqa: PLC0415
        from ..export.parallel import keep_freed_memory  # noqa: PLC0415

    keep_freed_memory()
    with show_progress("bytes") as report:
        result = build(
            models,
            engines,
            precision=precision,
            blocks_per_chunk=blocks_per_chunk,
            adapter=adapter,
            force=force,
            report=report,
        )
    manifest = result.manifest
    size = format_bytes(sum(facts.nbytes for facts in manifest.files.values()))
    if result.rebuilt:
        click.echo(
            f"built {format_path(engines)}: {size}, precision {manifest.precision} ({manifest.precision_reason})"
        )
    else:
        click.echo(f"nothing to do: {format_path(engines)} is up to date ({size}, precision {manifest.precision})")
