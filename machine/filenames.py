"""Names of files: what is free, and what Windows takes for something else."""

from itertools import chain, count
from pathlib import Path

PORTS = {f"{port}{number}" for port in ("COM", "LPT") for number in "123456789\u00b9\u00b2\u00b3"}
DEVICES = {"CON", "PRN", "AUX", "NUL"} | PORTS
FORBIDDEN = frozenset('<>:"/\\|?*') | frozenset(map(chr, range(32)))


def unused(stem: Path, ending: str) -> Path:
    """``STEM`` and ``ending``, or the first of ``STEM-2``, ``STEM-3`` that is not there: a default replaces nothing."""
    numbered = (f"{stem.name}-{number}{ending}" for number in count(2))
    paths = (stem.with_name(name) for name in chain([f"{stem.name}{ending}"], numbered))
    return next(path for path in paths if not path.exists())


def windows_problem(name: str) -> str:
    """Why Windows does not keep a file of this name; empty if it does, by its documentation of file names.

    A colon would name a stream that no folder shows, a device's name the device, and an end of dots or spaces is lost.
    """
    if bad := sorted(FORBIDDEN & set(name)):
        return f"Windows has no {' '.join(map(repr, bad))} in names"
    if name.rstrip(". ") != name:
        return "Windows loses the dot or the space at its end"
    if name.split(".", maxsplit=1)[0].rstrip(" ").upper() in DEVICES:
        return "on Windows that is the name of a device"
    return ""
