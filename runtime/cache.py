"""The embedding cache: what the encoders said of a picture, so that another weight, strength or rank costs the adapter.

An embedding is 5632 values (22 KiB) and takes nearly all the time of a run. Its key is a hash of what it depends on:
the 1024 x 1024 square that both encoders look at, the contents of the encoders' packs and graphs, the precision and
the backend (on a card with its driver: one that was wrong leaves nothing to the next), and which files the packs were.
So a renamed picture is found again, an edited one is not; nothing expires.

The manifest says what a pack should hold, not what a disk gave. So an embedding counts for the very files that computed
it (size, time, inode), and for none once damage was found in them: a rebuild or a copy of the engines computes anew.

What a picture gives does not depend on the pictures that share its pass, to the bit (tests/test_company.py), so it does
not matter in which one a kept embedding was computed.
"""

import hashlib
import json
import logging
import os
import sys
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import numpy as np
from PIL import Image
from safetensors import SafetensorError
from safetensors.numpy import load, save

from ..engines.base import Array
from ..machine.errors import I2LError, OutputUnwritable
from ..machine.files import atomic_path, read_small, remove_leftovers
from ..machine.wording import format_path
from .pictures.pixels import content_sha256

log = logging.getLogger(__name__)
PIXELS_VERSION = 2
"""Raised whenever the same picture gives other pixels; 2: colour profiles are converted."""
FOLDER_VARIABLE = "I2L_CACHE_DIR"
Encode = Callable[[Sequence[Image.Image]], Array]
"""``squares -> embeddings [squares, 5632]``."""


def default_cache_folder() -> Path:
    """``$I2L_CACHE_DIR/embeddings``, or ``i2l/embeddings`` where this system keeps what programs may lose.

    That is ``$XDG_CACHE_HOME`` (if absolute, as its specification wants) or ``~/.cache`` on Linux, ``~/Library/Caches``
    on macOS, ``%LOCALAPPDATA%`` on Windows.
    """
    if chosen := os.environ.get(FOLDER_VARIABLE):
        return Path(chosen).expanduser() / "embeddings"
    if sys.platform == "darwin":
        base = Path.home() / "Library" / "Caches"
    elif sys.platform == "win32":
        base = Path(os.environ.get("LOCALAPPDATA") or Path.home() / "AppData" / "Local")
    else:
        base = Path(os.environ.get("XDG_CACHE_HOME", ""))
        base = base if base.is_absolute() else Path.home() / ".cache"
    return base / "i2l" / "embeddings"


class EmbeddingCache:
    """Embeddings in a folder, one small safetensors file each.

    A file that is damaged is computed again; a folder that cannot be written is said once and does without. Several
    processes may share a folder: files appear whole, and equal keys hold equal things.

    Args:
        folder: made at the first write.
        encoders: asked what makes the embeddings, see :func:`encoders_id`; again behind each computing, as the CPU may
            have taken over from a GPU meanwhile.
    """

    def __init__(self, folder: Path, encoders: Callable[[], str]) -> None:
        self.folder = folder
        self._encoders = encoders
        self._writable = True
        self._swept = False

    def embed(self, squares: Sequence[Image.Image], encode: Encode, together: int) -> tuple[Array, list[bool]]:
        """The embeddings of squares, only the unknown ones computed, each different square once.

        At most ``together`` are computed in a call and kept at once: whoever stops a long run loses one call.

        Returns:
            float32 ``[squares, 5632]``, and for each square whether it came from the cache.
        """
        contents = [content_sha256(square) for square in squares]
        kept = {content: self._read(path) for content, path in self._paths(contents).items()}
        known = {content: found for content, found in kept.items() if found is not None}
        missing = {content: square for content, square in zip(contents, squares, strict=True) if content not in known}
        computed: dict[str, Array] = {}
        for start in range(0, len(missing), together):
            piece = list(missing)[start : start + together]
            computed |= zip(piece, encode([missing[content] for content in piece]), strict=True)
            for content, path in self._paths(piece).items():
                self._write(path, computed[content])
        return np.stack([(known | computed)[content] for content in contents]), [c in known for c in contents]

    def path(self, square: Image.Image) -> Path:
        """Where the embedding of a square lies or would lie."""
        (path,) = self._paths([content_sha256(square)]).values()
        return path

    def require_kept(self, paths: Sequence[Path]) -> None:
        """Raise :class:`OutputUnwritable` if an embedding that was to be kept is not there."""
        for path in paths:
            if not path.is_file():
                raise OutputUnwritable(path, "see above")

    def _paths(self, contents: Iterable[str]) -> dict[str, Path]:
        encoders = self._encoders()
        keys = {content: hashlib.sha256(f"{encoders} {content}".encode()).hexdigest() for content in contents}
        return {content: self.folder / f"{key}.safetensors" for content, key in keys.items()}

    def _read(self, path: Path) -> Array | None:
        try:
            data = read_small(path)
        except FileNotFoundError:
            return None
        except OSError as error:
            log.warning("%s cannot be read (%s): computing it again", format_path(path), error.strerror)
            return None
        try:
            tensors = load(data)
            embedding: Array = tensors["embedding"]
            if tensors["sha256"].tobytes() == hashlib.sha256(embedding.tobytes()).digest():
                return embedding
        except (SafetensorError, KeyError, ValueError):
            pass
        log.warning("%s is damaged: computing it again", format_path(path))
        return None

    def _write(self, path: Path, embedding: Array) -> None:
        if not self._writable:
            return
        if not self._swept:
            self._swept = True
            remove_leftovers(self.folder)
        digest = np.frombuffer(hashlib.sha256(embedding.tobytes()).digest(), np.uint8)
        try:
            with atomic_path(path) as temporary:
                temporary.write_bytes(save({"embedding": embedding, "sha256": digest}))
        except I2LError as error:
            self._writable = False
            log.warning("embeddings are not kept: %s", error)


def encoders_id(contents: str, backend: str, packs: str) -> str:
    """What made an embedding: content id, backend (a card's with all that a proof is of) and the packs' fingerprint."""
    return hashlib.sha256(json.dumps([PIXELS_VERSION, contents, backend, packs]).encode()).hexdigest()
