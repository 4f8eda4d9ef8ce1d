"""``i2l plot``."""

from collections.abc import Sequence
from pathlib import Path

import click

from ...machine.wording import format_path
from ..options import PATH, debug_option, needs_extra


@click.command()
@click.argument("loras", nargs=-1, type=PATH, metavar="LORA...")
@click.option("--output", type=PATH, metavar="FILE", show_default="LORA.plot.png beside the first LORA",
              help="A .png, .svg or .pdf file.")  # fmt: skip
@debug_option
def plot(loras: Sequence[Path], output: Path | None) -> None:
    """Draw where LoRAs act and how alike they are.

    For each LORA the norm of B @ A per block and target; for several also their similarities.
    """
    if not loras:
        raise click.UsageError("plotting takes one LoRA file or more")
    output = output or loras[0].with_suffix(".plot.png")  # never LORA.png: that may be the photo it was made from
    if output.suffix.lower() not in (".png", ".svg", ".pdf"):
        raise click.UsageError(f"{format_path(output)}: the name must end in .png, .svg or .pdf")
    with needs_extra("plot", "i2l plot"):
        from ...look.plotting import plot_loras  # noqa: PLC0415
    from ...lora.other_kinds import read_changes  # noqa: PLC0415

    plot_loras([read_changes(path) for path in loras], output)
    click.echo(f"drawn: {format_path(output)}")
