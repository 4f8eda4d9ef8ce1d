"""A worker: one opened pipeline, in a process of Ray's, on whatever machine. It knows nothing of Ray.

It is told pixels and gives back whole files, so that a machine needs engines, but none of the batch's folders.
"""

import os
import platform
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from .. import __version__
from ..lora.errors import LoraNotFinite
from ..lora.lora import Origin
from ..machine.errors import I2LError
from ..runtime.cache import default_cache_folder
from ..runtime.jobs import BatchProgress
from ..runtime.making import Form, make_loras
from ..runtime.opening import PipelineOptions
from ..runtime.pipeline import Pipeline


@dataclass(frozen=True)
class WorkerSettings:
    """What every worker is opened with."""

    engines: Path
    """On the worker's machine."""
    options: PipelineOptions
    use_cache: bool
    """The worker's own: each machine keeps embeddings for itself."""


@dataclass(frozen=True)
class Opened:
    """What a worker says of itself."""

    host: str
    version: str
    origin: Origin | None = None
    backend: str = ""
    reason: str = ""
    """Why there."""
    cards: str = ""
    """The GPUs that Ray leaves visible to it."""
    problem: str = ""
    """Why it cannot work; then there is no origin."""


@dataclass(frozen=True)
class Order:
    """One LoRA to make."""

    name: str
    """Of the file, which its header repeats."""
    squares: tuple[NDArray[np.uint8], ...]
    """``[1024, 1024, 3]`` each."""
    marks: dict[str, str]


@dataclass(frozen=True)
class Made:
    """What became of the orders of a group."""

    files: tuple[NDArray[np.uint8] | str, ...] = ()
    """Each LoRA's bytes, or why there are none."""
    from_cache: int = 0
    backend: str = ""
    problem: str = ""
    """Why the worker can do nothing further; then there are no files."""


class BatchWorker:
    """Opens its pipeline when it is told to, and makes one group at a time."""

    def __init__(self, settings: WorkerSettings, form: Form) -> None:
        self._settings = settings
        self._form = form
        self._pipeline: Pipeline | None = None
        self._share = 0.0
        self._progress = BatchProgress(self._tell)

    def open(self) -> Opened:
        """Open the engines of this machine."""
        own, host = self._settings, platform.node()
        try:
            self._pipeline = Pipeline(
                own.engines,
                **own.options,
                report=self._progress,
                cache=default_cache_folder() if own.use_cache else None,
            )
        except (I2LError, OSError, MemoryError, ImportError) as error:
            return Opened(host, __version__, problem=str(error) or type(error).__name__)
        pipeline, cards = self._pipeline, os.environ.get("CUDA_VISIBLE_DEVICES", "")
        return Opened(host, __version__, pipeline.origin, pipeline.backend_name, pipeline.backend_reason, cards)

    def make(self, orders: Sequence[Order]) -> Made:
        """Make a group's LoRAs, in one pass over the weights."""
        pipeline = self._pipeline
        assert pipeline is not None, "opened before"
        self._progress.begin(sum(len(order.squares) for order in orders))
        try:
            squares = [[Image.fromarray(square) for square in order.squares] for order in orders]
            loras, from_cache = make_loras(pipeline, squares, self._form.strength, self._progress)
            files: list[NDArray[np.uint8] | str] = []
            with tempfile.TemporaryDirectory(prefix="i2l-") as folder:
                for order, lora in zip(orders, loras, strict=True):
                    lora.metadata |= order.marks
                    path = Path(folder) / order.name
                    try:
                        lora.save(path, dtype=self._form.dtype, key_format=self._form.key_format)
                    except LoraNotFinite as error:
                        files.append(str(error))
                    else:
                        files.append(np.fromfile(path, np.uint8))
                        path.unlink()
        except (I2LError, OSError, MemoryError) as error:
            return Made(problem=str(error) or type(error).__name__)
        return Made(tuple(files), from_cache, pipeline.backend_name)

    def share(self) -> float:
        """How far the group is that it is at, 0 to 1; asked in another thread."""
        return self._share

    def _tell(self, stage: str, done: int, total: int) -> None:  # noqa: ARG002 - a Report's signature
        self._share = done / max(total, 1)
