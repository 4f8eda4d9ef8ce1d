"""The command line: thin commands over the library, one file each in ``commands/``.

Heavy imports stay inside the commands, so that ``--help`` answers at once.
"""

import _thread
import io
import logging
import os
import signal
import sys
import threading
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from types import FrameType
from typing import Any, TextIO

import click

from . import __version__
from .commands.batch import batch
from .commands.build_engines import build_engines
from .commands.convert import convert
from .commands.embed import embed
from .commands.looking.doctor import doctor
from .commands.looking.inspect import inspect
from .commands.looking.plan import plan
from .commands.looking.plot import plot
from .commands.looking.plot_trace import plot_trace
from .commands.looking.prove import prove
from .commands.looking.verify import verify
from .commands.make_checkpoints import make_checkpoints
from .commands.merge import merge
from .commands.options import DEBUG
from .commands.run import run
from .commands.serve import serve
from .commands.telling import AFTER_CTRL_C
from .machine.errors import I2LError, StandardOutputUnwritable, SystemRefused
from .machine.wording import command_path

LOOKING = frozenset({"plan", "inspect", "verify", "doctor", "--help", "-h", "--version"})
"""Commands and options whose work is what they print."""
INTERRUPTED = 128 + signal.SIGINT
"""What a shell makes of a program that Ctrl-C has ended."""
AGAIN_SECONDS = 0.01


class Lenient(io.FileIO):
    """A standard stream on a full disk or a closed pipe: what cannot be written is noted, and stops no work."""

    failure: OSError | None = None

    def write(self, data: Any, /) -> int:
        if self.failure is None:
            try:
                return super().write(data)
            except OSError as error:
                self.failure = error
        return len(data)


def lenient_streams() -> Lenient | None:
    """Make standard streams that always take what is written; return the one of standard output.

    One that is closed becomes the null device: else the first file that is opened would take its number, and whatever
    writes to standard error would write into a LoRA. Streams that somebody else has put there stay.
    """
    if os.name == "nt" or sys.stdout is not sys.__stdout__ or sys.stderr is not sys.__stderr__:
        return None  # Windows' console is no file descriptor
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # gets the lowest number that is free
    sys.stderr = _text(Lenient(2, "w", closefd=False), sys.stderr, by_line=True)  # a log is read while it grows
    output = Lenient(1, "w", closefd=False)
    sys.stdout = _text(output, sys.stdout, by_line=sys.stdout is None or sys.stdout.isatty())
    return output


def _text(raw: Lenient, before: TextIO | None, *, by_line: bool) -> TextIO:
    encoding, errors = (before.encoding, before.errors) if before else ("utf-8", "backslashreplace")
    return io.TextIOWrapper(io.BufferedWriter(raw), encoding, errors, line_buffering=by_line)


@contextmanager
def ctrl_c_raises() -> Iterator[None]:
    """Ctrl-C raises ``KeyboardInterrupt`` while a command works; before and after, it ends the program, as it did.

    So there is no line of click's or of Python's own ending where it would show a traceback or another exit code.
    """
    if signal.getsignal(signal.SIGINT) is not signal.SIG_DFL:
        yield  # a shell's background job ignores it; in a program of somebody else's it is not ours to decide
        return
    try:
        sys.unraisablehook = raise_later
        signal.signal(signal.SIGINT, on_ctrl_c)
        yield
    finally:
        signal.signal(signal.SIGINT, signal.SIG_DFL)


def on_ctrl_c(_: int, frame: FrameType | None) -> None:
    """Raise ``KeyboardInterrupt``, but not inside an import: libraries in C print it there, and raise another error."""
    while frame is not None:
        if frame.f_globals.get("__name__") == "importlib._bootstrap":
            come_again()
            return
        frame = frame.f_back
    raise KeyboardInterrupt


def raise_later(lost: "sys.UnraisableHookArgs", /) -> None:
    """Where Python lets no error out, as in a weakref's callback, Ctrl-C comes again; others are shown as ever."""
    if issubclass(lost.exc_type, KeyboardInterrupt):
        come_again()
    else:
        sys.__unraisablehook__(lost)


def come_again() -> None:
    """Ctrl-C, a moment later, whatever this thread, the main one, waits for then."""
    if sys.platform == "win32":
        again: Callable[[], None] = _thread.interrupt_main
    else:
        again = partial(signal.pthread_kill, threading.get_ident(), signal.SIGINT)
    threading.Timer(AGAIN_SECONDS, again).start()


class Commands(click.Group):
    """Commands whose explained errors become one ``error:`` line and exit code 1, listed as they were added."""

    def list_commands(self, ctx: click.Context) -> list[str]:  # noqa: ARG002 - click's signature
        return list(self.commands)

    def main(self, *args: Any, **options: Any) -> Any:
        """As click's, with streams that stop no work; a full disk behind standard output is explained at the end."""
        if (output := lenient_streams()) is None:
            return super().main(*args, **options)
        if signal.getsignal(signal.SIGINT) is not signal.SIG_IGN:
            signal.signal(signal.SIGINT, signal.SIG_DFL)
        try:
            return super().main(*args, **options)
        except SystemExit as ending:
            sys.stdout.flush()
            if (failure := output.failure) is None:
                raise
            quiet = isinstance(failure, BrokenPipeError)
            if not quiet:
                click.echo(f"error: {StandardOutputUnwritable(failure.strerror or str(failure))}", err=True)
            sys.exit(ending.code or not LOOKING.isdisjoint(sys.argv[1:2] + sys.argv[-1:]))

    def invoke(self, ctx: click.Context) -> Any:
        words = list(ctx.args)
        try:
            with ctrl_c_raises():
                return super().invoke(ctx)
        except click.NoSuchOption as error:
            if files := [word for word in words if word[:1] == "-" and os.path.exists(word)]:  # noqa: PTH110 - never raises
                hint = f"{error.format_message()} To name the file, write {command_path(Path(files[0]).absolute())}"
                raise click.UsageError(hint, error.ctx) from error
            raise
        except BrokenPipeError:
            raise  # click ends quietly
        except KeyboardInterrupt:
            click.echo(f"interrupted{ctx.meta.get(AFTER_CTRL_C, '')}", err=True)
            return ctx.exit(INTERRUPTED)
        except (I2LError, OSError, MemoryError, ImportError) as error:
            failure = explained(error)
        if ctx.meta.get(DEBUG):
            traceback.print_exception(failure)
        click.echo(f"error: {failure}", err=True)
        return ctx.exit(1)


def explained(error: Exception) -> I2LError:
    """An error with a sentence of ours; what came while a library was imported is what the library made of it."""
    if isinstance(error, I2LError):
        return error
    cause: BaseException | None = error
    if isinstance(error, ImportError):
        cause = error.__cause__ or error.__context__
        if not isinstance(cause, OSError):
            raise error
    refused = SystemRefused(cause)
    refused.__cause__ = error
    return refused


@click.group(cls=Commands, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__)
def main() -> None:
    """Turn pictures into LoRAs for the Z-Image diffusion model.

    First `i2l build-engines` once, then `i2l run` for every picture. `i2l COMMAND --help` says more of a command.
    """
    log = logging.getLogger("i2l")
    if not log.handlers:
        handler = logging.StreamHandler()
        handler.setFormatter(logging.Formatter("%(message)s"))
        log.addHandler(handler)
    log.setLevel(logging.INFO)


COMMANDS = (
    build_engines,
    run,
    batch,
    serve,
    embed,
    merge,
    convert,
    plan,
    plot,
    plot_trace,
    inspect,
    verify,
    prove,
    doctor,
    make_checkpoints,
)
for command in COMMANDS:
    main.add_command(command)


if __name__ == "__main__":
    main()
