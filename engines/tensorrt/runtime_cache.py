"""What TensorRT-RTX compiled on the card, kept for the next process.

A plan of TensorRT-RTX is half compiled: the card's own kernels are made when a context is opened and when a number of
images comes for the first time, seconds in all. This file keeps them, one for all graphs of a generation.

TensorRT checks a file before it loads it and refuses that of another version, driver or card, a card of the same
generation too. So the file's name says version and card: two cards that share an engines directory would otherwise
write over each other's.
"""

import logging
import re
from pathlib import Path
from typing import Any

from ...machine.errors import DiskFull, OutputUnwritable
from ...machine.files import atomic_path
from ...machine.wording import format_path
from .library import Flavour

log = logging.getLogger(__name__)


class RuntimeCache:
    """The compiled kernels of one card.

    Args:
        folder: where the plans of its generation lie.
        flavour: the TensorRT that compiles.
        card: its name.
    """

    def __init__(self, folder: Path, flavour: Flavour, card: str) -> None:
        self.path = folder / f"{flavour.name}-{flavour.version}-{re.sub(r'[^A-Za-z0-9]+', '-', card)}.jit"
        self.changed = False
        """Something may have been compiled since the last :meth:`save`."""
        self._cache: Any = None
        self._written = b""
        self._writable = True

    def enter(self, config: Any) -> None:
        """Let the contexts of an ``IRuntimeConfig`` take from the cache and add to it."""
        if self._cache is None:
            self._cache = config.create_runtime_cache()
            self._load()
        config.set_runtime_cache(self._cache)

    def save(self) -> None:
        """Write what was compiled since the last time; a folder that cannot be written is said once."""
        if not self.changed or self._cache is None or not self._writable:
            return
        self.changed = False
        data = bytes(self._cache.serialize())
        if data == self._written:
            return
        try:
            with atomic_path(self.path) as temporary:
                temporary.write_bytes(data)
        except (OutputUnwritable, DiskFull) as error:
            self._writable = False
            log.warning("compiled kernels are not kept, every start compiles them again: %s", error)
        else:
            self._written = data

    def _load(self) -> None:
        try:
            data = self.path.read_bytes()
        except FileNotFoundError:
            return
        except OSError as error:
            log.warning(
                "%s cannot be read (%s): its kernels are compiled again", format_path(self.path), error.strerror
            )
            return
        if self._cache.deserialize(data):
            self._written = data
        else:
            log.info("%s is of another driver or card: its kernels are compiled again", format_path(self.path))
