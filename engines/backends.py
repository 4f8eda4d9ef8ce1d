"""The registry of backends: which there are, which work here, and why the others do not."""

from importlib import import_module
from typing import TYPE_CHECKING

from .errors import BackendUnavailable

if TYPE_CHECKING:  # the command line lists the names, and must not pay for numpy
    from .base import BackendStatus, Offer

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
    offer: Offer = import_module(BACKENDS[name], __package__).OFFER
    return offer


def detect_backends() -> "tuple[BackendStatus, ...]":
    """The state of every backend, best last."""
    return tuple(offer_of(name).find() for name in BACKENDS)


def choose_backend(name: str) -> tuple[str, str]:
    """``(backend, reason)``: the named one, or the best that works for ``auto``.

    Raises:
        BackendUnavailable: the named backend cannot run here.
    """
    statuses = {status.name: status for status in detect_backends()}
    if name != "auto":
        if name not in statuses:
            raise BackendUnavailable(name, "i2l has no such backend", f"use one of auto, {', '.join(BACKENDS)}")
        status = statuses[name]
        if not status.works:
            raise BackendUnavailable(name, status.reason, status.remedy)
        return name, "asked for"
    best = [status for status in statuses.values() if status.works and status.proven][-1]
    passed = (status for status in statuses.values() if not (status.works and status.proven))
    others = "; ".join(f"{status.name}: {status.reason}" for status in passed)
    return best.name, f"auto: the best that works here ({others})"
