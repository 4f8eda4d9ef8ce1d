"""``i2l make-checkpoints``."""

from pathlib import Path

import click

from ..machine.progress import show_progress
from ..machine.wording import format_bytes, format_path
from ..specs import DIFFUSION_MODELS, DiffusionModel
from .options import PATH, debug_option, needs_extra
from .telling import is_quiet, quiet_option, tell


@click.command()
@click.argument("directory", type=PATH, metavar="DIR")
@click.option("--preset", type=click.Choice(["tiny", "small", "full"]), default="tiny", show_default=True,
              help="full has the published keys and shapes: 21 GB.")  # fmt: skip
@click.option("--seed", type=int, metavar="N", default=0, show_default=True, help="Changes every value.")
@click.option("--dtype", type=click.Choice(["bf16", "f16", "f32"]), help="Of all values.",
              show_default="as published: SigLIP2 f32, the others bf16")  # fmt: skip
@click.option("--adapter", type=click.Choice(DIFFUSION_MODELS), default="z-image", show_default=True,
              help="Which of the adapters to write.")  # fmt: skip
@click.option("--outliers", is_flag=True, help="Plant massive activations, as real vision transformers have.")
@quiet_option
@debug_option
def make_checkpoints(
    directory: Path, preset: str, seed: int, dtype: str | None, adapter: DiffusionModel, *, outliers: bool
) -> None:
    """Write synthetic checkpoints, to try things out.

    DIR gets three files with random values in the published form: for tests and benchmarks, not for pictures.
    """
    with needs_extra("export", "i2l make-checkpoints"):
        from ..export.checkpoints.synthetic import make_checkpoints as make  # noqa: PLC0415

    with show_progress("bytes", quiet=is_quiet()) as report:
        kind = dtype.upper() if dtype else None
        paths = make(directory, preset, seed=seed, dtype=kind, outliers=outliers, adapter=adapter, report=report)
    for path in paths:
        tell(f"{format_path(path)}  {format_bytes(path.stat().st_size)}")
