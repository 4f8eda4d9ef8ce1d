"""The command line: thin commands over the library, one file each in ``commands/``.

Heavy imports stay inside the commands, so that ``--help`` answers at once.
"""

import errno
import logging
import os
import sys
import traceback
from typing import Any

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
from .commands.looking.verify import verify
from .commands.make_checkpoints import make_checkpoints
from .commands.merge import merge
from .commands.options import DEBUG
from .commands.run import run
from .commands.serve import serve
from .machine.errors import I2LError, StandardOutputUnwritable

FULL = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EFBIG})


class Commands(click.Group):
    """Commands whose explained errors become one ``error:`` line and exit code 1, listed as they were added."""

    def list_commands(self, ctx: click.Context) -> list[str]:  # noqa: ARG002 - click's signature
        return list(self.commands)

    def main(self, *args: Any, **options: Any) -> Any:
        """As click's, which lets a closed pipe pass quietly; a full disk behind standard output is explained.

        Every other file is written where a full disk becomes :class:`DiskFull`, so nothing else can fail like this.
        """
        try:
            return super().main(*args, **options)
        except OSError as error:
            if error.errno not in FULL or error.filename is not None:
                raise
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # the interpreter writes the rest at its end
            click.echo(f"error: {StandardOutputUnwritable(os.strerror(error.errno))}", err=True)
            sys.exit(1)

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except I2LError as error:
            if ctx.meta.get(DEBUG):
                traceback.print_exc()
            click.echo(f"error: {error}", err=True)
            ctx.exit(1)


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
    doctor,
    make_checkpoints,
)
for command in COMMANDS:
    main.add_command(command)


if __name__ == "__main__":
    main()
