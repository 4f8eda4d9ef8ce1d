"""Progress: how long work tells it; a bar where somebody watches, a line now and then in a log."""

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Literal, Protocol

LINE_SECONDS = 10
"""A log gets no line more often, so short work none at all."""


class Report(Protocol):
    """How long work tells its progress: ``done`` of ``total`` units of ``stage`` (units are whatever the stage has)."""

    def __call__(self, stage: str, done: int, total: int) -> None: ...


def silent(stage: str, done: int, total: int) -> None:
    """A :class:`Report` that tells nobody."""


@contextmanager
def show_progress(unit: Literal["bytes", "steps"], *, quiet: bool = False) -> Iterator[Report]:
    """Yield a :class:`Report` that draws on standard error; nothing is drawn if ``quiet``."""
    if quiet:
        yield silent
    elif sys.stderr is None or not sys.stderr.isatty():  # none: a program without a console, such as pythonw
        yield log_lines()
    else:
        from rich.console import Console  # noqa: PLC0415 - `i2l --help` must not pay for it
        from rich.progress import (  # noqa: PLC0415
            BarColumn,
            DownloadColumn,
            MofNCompleteColumn,
            Progress,
            TextColumn,
            TimeRemainingColumn,
        )

        amount = DownloadColumn(binary_units=True) if unit == "bytes" else MofNCompleteColumn()
        columns = (
            TextColumn("{task.description}"),
            BarColumn(),
            amount,
            TimeRemainingColumn(elapsed_when_finished=True),
        )
        with Progress(*columns, console=Console(stderr=True), transient=True) as bars:
            task = bars.add_task("", total=None)

            def report(stage: str, done: int, total: int) -> None:
                bars.update(task, description=stage, completed=done, total=total)

            yield report


def log_lines(clock: Callable[[], float] = time.monotonic) -> Report:
    """A :class:`Report` that prints where the work is, at most once in :data:`LINE_SECONDS`."""
    last = clock()

    def report(stage: str, done: int, total: int) -> None:
        nonlocal last
        if clock() - last >= LINE_SECONDS:
            last = clock()
            with suppress(OSError, ValueError, AttributeError):  # closed, full or none: the work goes on
                sys.stderr.write(f"{stage}: {100 * done // max(total, 1)} %\n")

    return report
