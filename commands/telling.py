"""What commands say on the way: nothing with ``--quiet`` but errors, warnings, and what ``--json`` prints."""

import logging
from collections.abc import Callable
from typing import Any

import click
from click.core import ParameterSource

QUIET = "i2l.quiet"
"""Where a command's context keeps ``--quiet``."""
AFTER_CTRL_C = "i2l.after_ctrl_c"
"""Where it keeps what is said behind ``interrupted``: how to go on."""


def quiet_option(command: Callable[..., None]) -> Callable[..., None]:
    """Add ``--quiet``, which :func:`tell` and :func:`is_quiet` look for."""

    def remember(ctx: click.Context, _: click.Parameter, value: bool) -> None:
        ctx.meta[QUIET] = value
        if value:
            logging.getLogger("i2l").setLevel(logging.WARNING)

    return click.option(
        "-q", "--quiet", is_flag=True, expose_value=False, is_eager=True, callback=remember,
        help="Say nothing but errors and warnings.",
    )(command)  # fmt: skip


def is_quiet() -> bool:
    """Whether the command that runs was asked to be quiet."""
    return bool(click.get_current_context().meta.get(QUIET))


def tell(text: object, *, err: bool = False) -> None:
    """Say something unless ``--quiet``: a result on standard output, a remark (``err``) on standard error."""
    if not is_quiet():
        click.echo(text, err=err)


def tell_environment(ctx: click.Context, option: click.Parameter, value: Any) -> Any:
    """Say once that an option's value came from its environment variable, on standard error."""
    if option.name and ctx.get_parameter_source(option.name) is ParameterSource.ENVIRONMENT:
        assert isinstance(option, click.Option)
        tell(f"{option.opts[0]} {value} (${option.envvar})", err=True)
    return value


def counted(number: int, noun: str) -> str:
    """``1 LoRA``, ``2 LoRAs``."""
    return f"{number} {noun}{'s' * (number != 1)}"


def backend_words(name: str, asked: str) -> str:
    """What computed, in short; why it was that one takes a paragraph, which `i2l doctor` and ``--json`` have."""
    return f"backend {name}{' (auto: see i2l doctor)' if asked == 'auto' else ''}"
