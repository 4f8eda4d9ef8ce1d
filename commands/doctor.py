"""``i2l doctor``."""

import json

import click

from .options import debug_option, json_option


@click.command()
@json_option
@debug_option
def doctor(*, as_json: bool) -> None:
    """Say what works on this machine, and what is missing.

    For each backend and each command that needs an optional package: does it work here, and if not, why and what to do?
    """
    from ..inspection import diagnose, diagnosis_lines  # noqa: PLC0415

    facts = diagnose()
    click.echo(json.dumps(facts) if as_json else "\n".join(diagnosis_lines(facts)))
