"""Ctrl-C between any two lines of a function that writes a file, one line after another.

Run as ``python interrupter.py FOLDER atomic_path|require_writable``; prints how many lines there were. In a process of
its own, as an error that is raised in CPython's trace function stays the one that is handled, for good.
"""

import linecache
import sys
from collections.abc import Iterator
from pathlib import Path
from types import FrameType
from typing import Any

from i2l.machine import files


def main(folder: Path, function: str) -> None:
    """Interrupt at the first line, then at the second, until none is left."""
    write = {"atomic_path": write_whole, "require_writable": files.require_writable}[function]
    lines = 0

    def trace(frame: FrameType, event: str, _: object) -> Any:
        nonlocal lines
        if event == "line" and not any("unlink" in text for text in stack_lines(frame)):
            lines += 1
            if lines == last:
                raise KeyboardInterrupt
        return trace

    last = interrupted = 0
    while lines == last:  # as long as there was a line to be interrupted at
        lines, last = 0, last + 1
        sys.settrace(trace)
        try:
            write(folder / "x")
        except KeyboardInterrupt:
            interrupted += 1
        finally:
            sys.settrace(None)
        left = [path.name for path in folder.iterdir()]
        assert left in ([], ["x"]), f"interrupted at line {last}: {left}"
    sys.stdout.write(str(interrupted))


def write_whole(path: Path) -> None:
    with files.atomic_path(path) as temporary:
        temporary.write_text("whole")


def stack_lines(frame: FrameType | None) -> Iterator[str]:
    """The line in which each function on the stack is."""
    while frame is not None:
        yield linecache.getline(frame.f_code.co_filename, frame.f_lineno)
        frame = frame.f_back


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2])
