"""``i2l doctor``."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import click

from ..options import ENGINES_VARIABLE, PATH, debug_option, json_option
from ..telling import tell_environment


@click.command()
@click.option("--engines", type=PATH, metavar="DIR", envvar=ENGINES_VARIABLE, show_envvar=True,
              callback=tell_environment, help="An engines directory to check for use on this machine.")  # fmt: skip
@click.option("--full", is_flag=True, help="With --engines: hash every file again, as fast as the disk reads.")
@json_option
@debug_option
def doctor(engines: Path | None, *, full: bool, as_json: bool) -> None:
    """Say what works on this machine, and what is missing.

    For each backend and all that needs an optional package: does it work here, and if not, why and what to do?
    With --engines also: may that directory be used here, and what does that take? Exit code 1 if it may not.
    """
    if full and engines is None:
        raise click.UsageError("--full is for --engines DIR")
    from ...look.diagnosis import diagnose, diagnosis_lines  # noqa: PLC0415

    facts = diagnose()
    lines = list(diagnosis_lines(facts))
    if engines:
        checked, more = engines_checked(engines, full=full)
        facts["engines"] = checked
        lines += more
    click.echo(json.dumps(facts) if as_json else "\n".join(lines))
    if engines and (problem := facts["engines"]["problem"]):
        click.echo(f"error: {problem}", err=True)
        raise click.exceptions.Exit(1)


def engines_checked(engines: Path, *, full: bool) -> tuple[Mapping[str, Any], list[str]]:
    """The facts of an engines directory, and their lines for people."""
    from ...look.checkup import check_engines, check_lines  # noqa: PLC0415

    checked = check_engines(engines, full=full)
    return checked, list(check_lines(checked))
