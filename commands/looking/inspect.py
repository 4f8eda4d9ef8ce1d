"""``i2l inspect``."""

import json
from pathlib import Path

import click

from ..options import PATH, debug_option, json_option


@click.command()
@click.argument("path", type=PATH)
@json_option
@debug_option
def inspect(path: Path, *, as_json: bool) -> None:
    """Say what a file or a folder is.

    PATH is a checkpoint or a folder of them, an engines directory or a LoRA file.
    """
    from ...look.inspection import inspect_path, text_lines  # noqa: PLC0415

    facts = inspect_path(path)
    click.echo(json.dumps(facts) if as_json else "\n".join(text_lines(facts)))
