"""A plugin's library in this process: loaded while somebody uses it, and what it only says in its log.

Two things here are not obvious. Only unloading the library gives back what a provider keeps on the card (measured on
WebGPU: closing sessions and values gives nothing back). It is safe only when no session and no value is left, or the
process crashes; so all that was made is remembered weakly, and where something is left the library stays.

And a failed allocation on WebGPU raises nothing: an error is logged, and the values go on as if they were there. So the
log is listened to, through onnxruntime's one callback for the process; what is not ours goes on to Python's logging.
"""

import gc
import importlib
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from weakref import WeakSet

import onnxruntime as ort

from .providers import Provider

log = logging.getLogger(__name__)
LEVELS = (logging.DEBUG, logging.INFO, logging.WARNING, logging.ERROR, logging.CRITICAL)
"""Python's, by onnxruntime's severity."""
WARNING = 2


class Library:
    """One provider's library, for as many users as there are."""

    def __init__(self, provider: Provider) -> None:
        self.name = f"i2l.{provider.backend}"
        module = importlib.import_module(provider.module)
        self.provider_name = str(module.get_ep_name())
        self._path = module.get_library_path()
        self._users = 0
        self._loaded = False
        self.made: WeakSet[Any] = WeakSet()
        """Sessions, bindings and values that live in it."""

    def begin(self) -> None:
        """One user more."""
        self._users += 1
        if not self._loaded and not self.devices():  # else another part of the program has loaded it
            ort.register_execution_provider_library(self.name, self._path)
            self._loaded = True

    def end(self) -> None:
        """One user less; the last one unloads it, unless something of it is left."""
        self._users -= 1
        if self._users or not self._loaded:
            return
        if self.made:
            gc.collect()
        if self.made:
            log.warning("%s stays loaded, and keeps its memory: %d of its values are in use", self.name, len(self.made))
            return
        ort.unregister_execution_provider_library(self.name)
        self._loaded = False

    def devices(self) -> list[Any]:
        """Onnxruntime's devices of this provider."""
        return [device for device in ort.get_ep_devices() if device.ep_name == self.provider_name]


_libraries: dict[str, Library] = {}


def library_of(provider: Provider) -> Library:
    """The provider's library, not yet loaded.

    Raises:
        ImportError: its package is not installed.
    """
    if provider.module not in _libraries:
        _libraries[provider.module] = Library(provider)
    return _libraries[provider.module]


class ErrorLog:
    """The errors that a provider has logged; one who listens."""

    def __init__(self, beginning: str) -> None:
        self.beginning = beginning
        self.messages: list[str] = []


_listeners: list[ErrorLog] = []


@contextmanager
def listening(errors: ErrorLog) -> Iterator[None]:
    """Collect a provider's errors while the body runs."""
    _listeners.append(errors)
    ort.set_default_logger_callback(_hear, WARNING)
    try:
        yield
    finally:
        _listeners.remove(errors)
        if not _listeners:
            ort.set_default_logger_callback(None)


def _hear(severity: int, category: str, _: str, where: str, message: str) -> None:
    """Onnxruntime's callback."""
    ours = [errors for errors in _listeners if errors.beginning and errors.beginning in message]
    for errors in ours:
        errors.messages.append(message)
    if not ours:
        logging.getLogger("onnxruntime").log(LEVELS[min(severity, 4)], "%s %s: %s", category, where, message)
