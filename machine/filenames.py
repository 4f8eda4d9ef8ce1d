"""Names of files."""

from itertools import chain, count
from pathlib import Path


def unused(stem: Path, ending: str) -> Path:
    """``STEM`` and ``ending``, or the first of ``STEM-2``, ``STEM-3`` that is not there: a default replaces nothing."""
    numbered = (f"{stem.name}-{number}{ending}" for number in count(2))
    paths = (stem.with_name(name) for name in chain([f"{stem.name}{ending}"], numbered))
    return next(path for path in paths if not path.exists())
