"""``i2l plot-trace``."""

from pathlib import Path

import click

from ..errors import format_path
from .options import PATH, debug_option, needs_extra


@click.command()
@click.argument("trace", type=PATH)
@click.argument("picture", type=PATH)
@debug_option
def plot_trace(trace: Path, picture: Path) -> None:
    """Draw a TRACE.json of `i2l run --trace` as PICTURE.png."""
    with needs_extra("plot", "i2l plot-trace"):
        from ..trace_picture import draw_trace  # noqa: PLC0415

    draw_trace(trace, picture)
    click.echo(format_path(picture))
