"""The registry of backends: which there are, which work here, and why the others do not."""

from importlib import import_module
from typing import TYPE_CHECKING

from ..machine.errors import PackageMissing
from .errors import BackendUnavailable

if TYPE_CHECKING:  # the command line lists the names, and must not pay for numpy
    from collections.abc import Callable
    from pathlib import Path

    from .base import Array, BackendStatus, Offer
    from .directory.manifest import Chunk, Manifest, Model, Step

BACKENDS: dict[str, str] = {
    "cpu": ".cpu.backend",
    "webgpu": ".plugin.webgpu",
    "cuda": ".cuda.backend",
    "tensorrt-rtx": ".plugin.tensorrt_rtx",
    "tensorrt": ".tensorrt.backend",
}
"""``name -> the module whose OFFER it is``, best last. Imported when it is asked for: names alone must cost nothing."""


def offer_of(name: str) -> "Offer":
    """What a backend's room offers."""
    try:
        offer: Offer = import_module(BACKENDS[name], __package__).OFFER
    except ModuleNotFoundError as error:
        if error.name != "onnxruntime":
            raise
        raise PackageMissing("onnxruntime", "computing", "cpu") from error
    return offer


def detect_backends() -> "tuple[BackendStatus, ...]":
    """The state of every backend, best last."""
    return tuple(map(_found, BACKENDS))


def _found(name: str) -> "BackendStatus":
    from .base import BackendStatus  # noqa: PLC0415 - numpy

    try:
        return offer_of(name).find()
    except PackageMissing:
        reason, remedy = "no onnxruntime is installed", 'pip install "i2l-engines[cpu]", or [cuda] for NVIDIA cards'
        return BackendStatus(name, works=False, reason=reason, remedy=remedy)


def working_backend(name: str) -> "BackendStatus":
    """The state of a backend that was named.

    Raises:
        BackendUnavailable: it cannot run here.
    """
    statuses = {status.name: status for status in detect_backends()}
    if name not in statuses:
        raise BackendUnavailable(name, "i2l has no such backend", f"use one of auto, {', '.join(BACKENDS)}")
    if not statuses[name].works:
        raise BackendUnavailable(name, statuses[name].reason, statuses[name].remedy)
    return statuses[name]


def cpu_part(
    engines: "Path", manifest: "Manifest", part: "Callable[[tuple[Chunk, ...]], tuple[Chunk, ...]]", folder: "Path"
) -> "tuple[Path, Manifest] | None":
    """Some chunks of fp8 engines as the cpu backend runs them, where it has not converted all of them yet.

    Args:
        engines: the engines directory.
        manifest: its manifest.
        part: all chunks of a model to those that are wanted.
        folder: an empty one, for their packs.
    """
    from .cpu.converted import bytes_to_convert, convert_part  # noqa: PLC0415 - numpy

    if not bytes_to_convert(engines, manifest):
        return None
    return folder, convert_part(engines, manifest, part, folder)


def right_outputs(pack: "Path", model: "Model", step: "Step", activation: "Array") -> "dict[str, Array]":
    """What a step must give, float32: what cards are held against, by arithmetic of its own and the pack's weights.

    Args:
        pack: the file.
        model: what is in it.
        step: one of the model's.
        activation: what its graph takes, float32 ``[images, ...]``.
    """
    from .cpu.plain import held_weights, plain_step  # noqa: PLC0415 - numpy

    return plain_step(model.spec, step.graph, activation, held_weights(pack, model, step))
