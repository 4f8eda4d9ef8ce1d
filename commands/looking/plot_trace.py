"""``i2l plot-trace``."""

from pathlib import Path

import click

from ...machine.filenames import unused
from ...machine.wording import format_path
from ..options import PATH, debug_option, needs_extra


@click.command()
@click.argument("trace", type=PATH)
@click.argument("picture", type=PATH, required=False)
@debug_option
def plot_trace(trace: Path, picture: Path | None) -> None:
    """Draw what a run did and when.

    TRACE is a .json file of `i2l run --trace`, PICTURE the .png file to write, by default beside TRACE.
    """
    picture = picture or unused(trace.with_suffix(""), ".trace.png")  # never TRACE.png: that may be a photo
    with needs_extra("plot", "i2l plot-trace"):
        from ...look.trace_picture import draw_trace  # noqa: PLC0415

    draw_trace(trace, picture)
    click.echo(format_path(picture))
