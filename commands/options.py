"""Options that several commands share, and what they need around them."""

import errno
import math
import os
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click

from ..engines.backends import BACKENDS
from ..lora.errors import WeightsMismatch
from ..machine.errors import PackageMissing
from ..machine.sizes import parse_budget
from ..machine.wording import format_path
from .telling import tell, tell_environment

if TYPE_CHECKING:
    from ..lora.reading import LoraFile


class UserPath(click.Path):
    """A path in which ``~`` is the home directory even where the shell did not expand it."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Path:
        if WEB_ADDRESS.match(os.fsdecode(value)):  # a path would lose one of the two slashes
            self.fail(f"{value} is a web address: download it, and give the file", param, ctx)
        path = Path(os.fsdecode(super().convert(value, param, ctx)))
        with suppress(RuntimeError):  # there is no such user: the name just begins with ~
            path = path.expanduser()
        try:
            path.lstat()
        except OSError as error:
            if error.errno == errno.ENAMETOOLONG:  # the system refuses even to look
                self.fail(f"{format_path(path)}: {error.strerror}", param, ctx)
        return path


class Size(click.ParamType):  # type: ignore[type-arg]  # generic only since click 8.5
    """Bytes, typed like 8GiB."""

    name = "size"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int:
        try:
            budget = parse_budget(str(value))
        except ValueError as error:
            self.fail(str(error), param, ctx)
        if budget is None:
            self.fail("nothing is here to ask for its free memory: give a size, such as 4GiB", param, ctx)
        return budget


class Budget(click.ParamType):  # type: ignore[type-arg]  # generic only since click 8.5
    """Bytes, or None for ``auto``."""

    name = "size|auto"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int | None:
        try:
            return parse_budget(str(value))
        except ValueError as error:
            self.fail(str(error), param, ctx)


PATH = UserPath()
SIZE = Size()
WEB_ADDRESS = re.compile(r"[a-z]+://", re.IGNORECASE)
ENGINES_VARIABLE = "I2L_ENGINES"
LORA_DTYPES = click.Choice(["bf16", "fp16", "fp32"])
DEBUG = "i2l.debug"
"""Where a command's context keeps ``--debug``."""


@contextmanager
def needs_extra(extra: str, purpose: str) -> Iterator[None]:
    """Turn the import error of an optional package into the command that installs it."""
    try:
        yield
    except ModuleNotFoundError as error:
        raise PackageMissing(error.name or extra, purpose, extra) from error


def debug_option(command: Callable[..., None]) -> Callable[..., None]:
    """Add ``--debug``, which :class:`Commands` looks for."""

    def remember(ctx: click.Context, _: click.Parameter, value: bool) -> None:
        ctx.meta[DEBUG] = value

    return click.option(
        "--debug", is_flag=True, expose_value=False, callback=remember, help="Show the traceback of an error."
    )(command)


def json_option(command: Callable[..., None]) -> Callable[..., None]:
    """Add ``--json``."""
    return click.option("--json", "as_json", is_flag=True, help="Print one JSON object instead of text.")(command)


models_option = click.option(
    "--models", type=PATH, required=True, metavar="DIR", help="Folder with the three checkpoints, under any names."
)
engines_option = click.option(
    "--engines", type=PATH, required=True, metavar="DIR", envvar=ENGINES_VARIABLE, show_envvar=True,
    callback=tell_environment, help="The engines directory.",
)  # fmt: skip
lora_output_option = click.option(
    "--output", type=PATH, required=True, metavar="FILE", help="The LoRA file to write."
)  # fmt: skip
backend_option = click.option(
    "--backend", type=click.Choice(["auto", *BACKENDS]), default="auto", show_default=True,
    help="Where to compute; auto takes the fastest that is proven here (i2l prove).",
)  # fmt: skip
no_prove_option = click.option(
    "--no-prove", is_flag=True, help="Pass over a card that auto meets for the first time instead of proving it now."
)


Numbers = TypeVar("Numbers", float, tuple[float, ...])


def require_finite(_: click.Context, __: click.Parameter, value: Numbers) -> Numbers:
    """Refuse infinite numbers and NaN: they make every value of a LoRA useless."""
    for number in value if isinstance(value, tuple) else (value,):
        if not math.isfinite(number):
            raise click.BadParameter(f"{number} is not a finite number")
    return value


threads_option = click.option(
    "--threads", type=click.IntRange(min=1), metavar="N", show_default="physical cores, within a container's quota",
    help="Threads of the CPU backend.",
)  # fmt: skip
ram_budget_option = click.option(
    "--ram-budget", "ram_budget_bytes", type=SIZE, metavar="SIZE", show_default="none stay",
    help="Memory for weights that stay between passes, CPU backend, such as 4GiB.",
)  # fmt: skip
vram_budget_option = click.option(
    "--vram-budget", "vram_budget_bytes", type=Budget(), default="auto", show_default=True,
    help="VRAM for everything, such as 8GiB; acts on GPU backends. auto: what is free, less --vram-margin.",
)  # fmt: skip
vram_margin_option = click.option(
    "--vram-margin", "vram_margin_bytes", type=SIZE, metavar="SIZE", default="2GiB", show_default=True,
    help="What --vram-budget auto leaves to other programs.",
)  # fmt: skip

device_option = click.option(
    "--device", metavar="CARD", show_default="the one with the most free memory, for webgpu the first",
    help="Which card of several: its number, a part of its name, or for webgpu high-performance or low-power.",
)  # fmt: skip


def require_gpu_for_budget(backend: str, vram_budget_bytes: int | None, device: str | None = None) -> None:
    """Refuse a VRAM budget, or the name of a card, beside a backend that uses none."""
    for option, value in (("--vram-budget", vram_budget_bytes), ("--device", device)):
        if backend == "cpu" and value is not None:
            raise click.UsageError(f"{option} has no effect on --backend cpu: leave one of the two out")


force_option = click.option(
    "--force", is_flag=True, help="Replace --output also if it is a LoRA that something else wrote."
)
no_cache_option = click.option(
    "--no-cache",
    is_flag=True,
    help="Neither use nor keep embeddings ($I2L_CACHE_DIR).",
)


def cache_folder(*, no_cache: bool) -> Path | None:
    """Where embeddings are kept, or None if the user wants none kept."""
    from ..runtime.cache import default_cache_folder  # noqa: PLC0415

    return None if no_cache else default_cache_folder()


recursive_option = click.option(
    "--recursive", is_flag=True, help="Look into the folders in a folder too, hidden ones aside."
)
ignore_icc_option = click.option(
    "--ignore-icc",
    is_flag=True,
    help="Take pixels for sRGB whatever colour profile a picture carries, as the original does.",
)


strength_option = click.option(
    "--strength", type=float, metavar="NUMBER", callback=require_finite, default=1.0, show_default=True,
    help="Multiplies the LoRA's effect; linear.",
)  # fmt: skip


dtype_option = click.option(
    "--dtype", type=LORA_DTYPES, default="bf16", show_default=True, help="Of the values in the LoRA file."
)
key_format_option = click.option(
    "--key-format", type=click.Choice(["comfyui", "diffsynth"]), default="comfyui", show_default=True,
    help="comfyui loads everywhere; diffsynth is what the original node saved.",
)  # fmt: skip


reduce_rank_option = click.option(
    "--reduce-rank", type=click.IntRange(min=1), metavar="R",
    show_default="the sum of the inputs' ranks",
    help="Give the LoRA at most this rank: the best approximation of B @ A; its error is printed.",
)  # fmt: skip


def weight_option(noun: str) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Add ``--weight``, once per ``noun``."""
    return click.option(
        "--weight", "weights", type=float, metavar="NUMBER", callback=require_finite, multiple=True,
        show_default="1/N each",
        help=f"How much one {noun} counts; once per {noun}, in their order. Weights need not add up to 1.",
    )  # fmt: skip


def require_weights(weights: Sequence[float], things: int, noun: str) -> None:
    """Refuse another number of weights than of things; none at all means equal ones."""
    if weights and len(weights) != things:
        raise click.UsageError(str(WeightsMismatch(len(weights), things, noun)))


def tell_left_out(file: "LoraFile") -> None:
    """Say that a LoRA's part for a text encoder stays behind."""
    if file.left_out:
        tell(f"{format_path(file.path)}: {file.left_out} modules of a text encoder are left out", err=True)
