"""How things are said to people: bytes, paths, long lists."""

import os
import re
import shlex
from collections.abc import Sequence
from pathlib import Path

GIB = 1 << 30
PLAIN = re.compile(r"[\w@%+=:,./\\-]+" if os.name == "nt" else r"[\w@%+=:,./-]+")
"""Paths that no shell takes apart."""


def format_bytes(count: int) -> str:
    """Bytes as people read them: ``512 B``, ``3.1 MiB``, ``6.7 GiB``."""
    if count < 1 << 10:
        return f"{count} B"
    for unit, size in (("KiB", 1 << 10), ("MiB", 1 << 20)):
        if count < size << 10:
            return f"{count / size:.1f} {unit}"
    return f"{count / GIB:.2f} GiB"


def format_path(path: Path) -> str:
    """A path with the home directory written as ``~``, where shells know that."""
    if os.name == "nt":
        return str(path)
    try:
        return printable(f"~/{path.relative_to(Path.home())}")
    except (ValueError, RuntimeError):
        return printable(str(path))


def printable(text: str) -> str:
    """Text that does nothing to a terminal: control characters, and bytes that are no text, as escapes."""
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in text)


def command_path(path: Path) -> str:
    """A path in a command that a person copies: whole, as only some shells know ``~``, and quoted if it must be.

    Double quotes serve sh, PowerShell and cmd.exe alike; what sh reads inside them gets its own quoting.
    """
    text = str(path)
    if PLAIN.fullmatch(text):
        return text
    return shlex.quote(text) if os.name == "posix" and set(text) & set('"$`\\!') else f'"{text}"'


def some(items: Sequence[str], shown: int = 8) -> str:
    """The first few of many things, and how many there are besides."""
    more = f" and {len(items) - shown} more" if len(items) > shown else ""
    return f"{', '.join(items[:shown])}{more}"
