"""Sizes as people type them: ``8GiB``, ``2 GB``, ``1.5g``, ``auto``."""

import re
from collections.abc import Mapping

UNITS: Mapping[str, int] = {"": 0, "k": 1, "m": 2, "g": 3, "t": 4}
SIZE = re.compile(r"(\d+(?:\.\d*)?|\.\d+)\s*([kmgt]?)(i?)(b?)", re.IGNORECASE | re.ASCII)
LARGEST = 1 << 60


def parse_size(text: str) -> int:
    """Bytes of a size. ``GiB`` and a bare ``G`` are powers of 1024, ``GB`` of 1000; a bare number is bytes.

    Raises:
        ValueError: it is no size.
    """
    match = SIZE.fullmatch(text.strip())
    if match is None or (match[3] and not match[2]):
        raise ValueError(f"{text!r} is no size: write it like 8GiB, 500MB or 2 GB")
    number, unit, binary, byte = match.groups()
    base = 1000 if byte and not binary else 1024
    nbytes = round(float(number) * float(base ** UNITS[unit.lower()]))
    if not 0 < nbytes <= LARGEST:
        raise ValueError(f"{text!r} is not between 1 byte and 1 EiB")
    return nbytes


def parse_budget(text: str) -> int | None:
    """:func:`parse_size`, or None for ``auto``."""
    return None if text.strip().lower() == "auto" else parse_size(text)
