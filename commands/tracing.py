"""``--trace``: a file of what a run did, or a picture of it."""

import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import click

from ..machine.files import require_writable
from ..machine.outputs import DRAWN_TRACE, require_output
from .options import PATH, needs_extra

if TYPE_CHECKING:
    from ..runtime.trace import Trace


def trace_option(command: Callable[..., None]) -> Callable[..., None]:
    """Add ``--trace``."""
    return click.option(
        "--trace",
        type=PATH,
        metavar="FILE",
        help="Write what was copied and computed when: .json for Perfetto, or a .png picture.",
    )(command)


@contextmanager
def traced(path: Path | None, inputs: Sequence[Path]) -> "Iterator[Trace | None]":
    """Yield a trace that is written to ``path`` at the end, or None if there is no path; never over an input."""
    if path is None:
        yield None
        return
    if path.suffix not in {".json", ".png"}:
        raise click.UsageError(f"--trace writes .json or .png files, not {path.suffix or path.name!r}")
    from ..runtime.trace import TRACE, Trace  # noqa: PLC0415

    require_writable(path)
    require_output(path, TRACE if path.suffix == ".json" else DRAWN_TRACE, inputs=inputs)
    if path.suffix == ".png":
        with needs_extra("plot", "--trace with a picture"):
            from ..look.trace_picture import draw_trace  # noqa: PLC0415

    trace = Trace()
    yield trace
    if path.suffix == ".json":
        trace.save(path)
    else:
        with tempfile.TemporaryDirectory() as folder:
            trace.save(Path(folder) / "trace.json")
            draw_trace(Path(folder) / "trace.json", path)
