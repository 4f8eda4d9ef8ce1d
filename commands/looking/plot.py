"""``i2l plot``."""

from collections.abc import Sequence
from pathlib import Path

import click

from ...machine.filenames import unused
from ...machine.wording import format_path, some
from ..options import PATH, debug_option, needs_extra


@click.command()
@click.argument("loras", nargs=-1, type=PATH, metavar="LORA...")
@click.option("--output", type=PATH, metavar="FILE", show_default="LORA.plot.png beside the first LORA",
              help="A .png, .svg or .pdf file.")  # fmt: skip
@click.option("--contact-sheet", "pictures", type=PATH, metavar="FOLDER",
              help="Draw beside each LORA what it was made from, as far as that lies in this folder.")  # fmt: skip
@debug_option
def plot(loras: Sequence[Path], output: Path | None, pictures: Path | None) -> None:
    """Draw where LoRAs act and how alike they are.

    For each LORA the norm of B @ A per block and target; for several also their similarities.
    """
    if not loras:
        raise click.UsageError("plotting takes one LoRA file or more")
    # never LORA.png: that may be the photo it was made from
    output = output or unused(loras[0].with_suffix(""), ".plot.png")
    if output.suffix.lower() not in (".png", ".svg", ".pdf"):
        raise click.UsageError(f"{format_path(output)}: the name must end in .png, .svg or .pdf")
    with needs_extra("plot", "i2l plot"):
        from ...look.plotting import plot_loras  # noqa: PLC0415
    from ...lora.other_kinds import read_changes  # noqa: PLC0415

    files = [read_changes(path) for path in loras]
    sheet = None
    if pictures:
        from ...look.contact_sheet import pictures_of  # noqa: PLC0415
        from ...runtime.pictures.listing import list_images  # noqa: PLC0415

        sheet = pictures_of(files, list_images([pictures], recursive=True).images)
        if without := [path.name for path in loras if not sheet[path]]:
            click.echo(f"no picture in {format_path(pictures)} is what made {some(without)}", err=True)
    plot_loras(files, output, sheet)
    click.echo(f"drawn: {format_path(output)}")
