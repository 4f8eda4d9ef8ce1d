"""May this be written here? The one rule for every file that i2l writes where a user says.

The name ends as the format wants it, so that no slip of the command line turns a photograph into a LoRA. What is there
already is replaced only if i2l wrote it in the same format; what somebody else wrote in that format, only on request;
an input, or anything else, never.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from .errors import OutputMisnamed, OutputTaken
from .files import atomic_path, regular_file_problem


@dataclass(frozen=True)
class Found:
    """Something that is not ours."""

    what: str
    """Such as ``a checkpoint``."""
    forcible: bool = False
    """It is of the format, so its owner may want it replaced."""


@dataclass(frozen=True)
class Format:
    """What i2l writes as one kind of file."""

    noun: str
    """Such as ``a LoRA``."""
    suffixes: tuple[str, ...]
    find: Callable[[Path], Found | None]
    """Looks at a regular file: None if it is one that i2l wrote."""


def require_output(path: Path, form: Format, *, inputs: Sequence[Path] = (), force: bool = False) -> None:
    """Refuse a place that must not be written.

    Args:
        path: the place.
        form: what is to be written there.
        inputs: what is read for it.
        force: also replace a file of the format that somebody else wrote.

    Raises:
        OutputMisnamed: the name is that of another format.
        OutputTaken: what is there must stay.
    """
    if path.exists() and regular_file_problem(path):
        return  # a folder or a device: whoever writes there says it
    if path.suffix.lower() not in form.suffixes:
        raise OutputMisnamed(path, form.noun, form.suffixes)
    if not path.exists():
        return
    if any(other.exists() and other.samefile(path) for other in inputs):
        raise OutputTaken(path, "an input")
    found = form.find(path)
    if found is not None and not (force and found.forcible):
        raise OutputTaken(path, found.what, forcible=found.forcible)


@contextmanager
def output_path(path: Path, form: Format, *, force: bool = False) -> Iterator[Path]:
    """:func:`.files.atomic_path` where :func:`require_output` allows it."""
    require_output(path, form, force=force)
    with atomic_path(path) as temporary:
        yield temporary


DRAWN_BY = "drawn by i2l"
"""Stands in the metadata of every drawing, where its format keeps it uncompressed."""


def _find_drawing(path: Path) -> Found | None:
    return None if DRAWN_BY.encode() in path.read_bytes() else Found("there already, and no drawing of i2l")


DRAWING = Format("a drawing", (".png", ".svg", ".pdf"), _find_drawing)
DRAWN_TRACE = Format("a drawing of a trace", (".png",), _find_drawing)
