"""An engines directory opened on a backend, and what becomes of it when memory runs out.

The backend is chosen once. Short of memory it makes a smaller plan; where the user left the choice to us, the CPU goes
on at last, with the engines that were opened, even if the directory was rebuilt meanwhile.
"""

import logging
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

from ..engines.backends import choose_backend, offer_of
from ..engines.base import Backend, Limits, Opened
from ..engines.directory.integrity import check_files
from ..engines.directory.manifest import Manifest, read_manifest
from ..engines.errors import EnginesError, OutOfDeviceMemory
from ..machine.errors import OutputUnwritable
from ..machine.wording import format_bytes
from .errors import EnginesReplaced, PipelineClosed

log = logging.getLogger(__name__)
T = TypeVar("T")
REBUILDS = 20
"""So many in a row may take a build away before it is opened."""


class OpenEngines:
    """An engines directory on a backend.

    Args:
        path: the directory.
        backend: ``auto``, or a backend's name.
        limits: what it may take.

    Raises:
        EnginesError, DiskFull, BackendUnavailable: see :class:`.pipeline.Pipeline`.
    """

    def __init__(self, path: Path, *, backend: str, limits: Limits) -> None:
        self.path = path
        self._limits = limits
        self._backend: Backend | None = None
        self._standby: Opened | None = None
        self.name, self.reason = choose_backend(backend)
        for tries_left in reversed(range(REBUILDS)):
            self._for_cpu: Manifest = read_manifest(path)
            try:
                self._open_build(backend)
                break
            except (EnginesError, OutputUnwritable, FileNotFoundError):
                self.close()
                if not tries_left or read_manifest(path).build == self._for_cpu.build:
                    raise

    def _open_build(self, backend: str) -> None:
        """Open the build that was the directory's a moment ago.

        The manifest changes in one move, so each look at it finds a whole build; but a rebuild may take it away.
        """
        limits = self._limits
        check_files(self.path, self._for_cpu)
        self._may_fall_back = backend == "auto" and self.name != "cpu"
        if self._may_fall_back and self._for_cpu.precision != "fp8":  # files opened, no session made: 0.2 ms
            self._standby = self._open("cpu")
        if self.name == "cpu" and limits.vram.budget_bytes is not None:
            budget = format_bytes(limits.vram.budget_bytes)
            log.warning("a VRAM budget of %s has no effect: the backend is cpu (%s)", budget, self.reason)
        try:
            self._enter(self._open(self.name))
        except OutOfDeviceMemory as error:
            if not self._may_fall_back:
                raise
            self._fall_back(error)

    @property
    def backend(self) -> Backend:
        """The backend in use.

        Raises:
            PipelineClosed: none, after :meth:`close`.
        """
        if self._backend is None:
            raise PipelineClosed(self.path)
        return self._backend

    def in_memory(self, work: Callable[[], T]) -> T:
        """``work``, again with a smaller plan each time memory runs out, at last on the CPU if that is allowed."""
        while True:
            try:
                return work()
            except OutOfDeviceMemory as error:
                try:
                    self.backend.shrink(error)
                except OutOfDeviceMemory:
                    if not self._may_fall_back:
                        raise
                    self.backend.close()
                    self._fall_back(error)

    def close(self) -> None:
        """Give sessions, memory and mapped packs back."""
        if self._backend is not None:
            self._backend.close()
        if self._standby is not None:
            self._standby.backend.close()
        self._backend = self._standby = None

    def _open(self, name: str) -> Opened:
        return offer_of(name).open(self.path, self._for_cpu, self._limits)

    def _enter(self, opened: Opened) -> None:
        """Compute there from now on."""
        self._backend = opened.backend
        self.manifest: Manifest = opened.manifest
        """Of the engines that were opened; those for a GPU may lie in an engines directory inside the other."""
        self.running: Manifest = opened.running
        """Of the packs that are read: the same, except that the cpu backend reads the int8 form of fp8 engines."""

    def _fall_back(self, cause: OutOfDeviceMemory) -> None:
        """Go on with the CPU, on the build that was opened.

        Raises:
            EnginesReplaced: it must first be converted from fp8, and a rebuild has removed it. Nothing is open then.
        """
        log.warning("%s: going on with the CPU", cause)
        self._backend = None
        standby, self._standby = self._standby, None
        if standby is None and not (self.path / self._for_cpu.build).is_dir():
            raise EnginesReplaced(self.path, self.name) from cause
        self._enter(standby or self._open("cpu"))
        self.name, self.reason = "cpu", f"{self.name} ran out of memory"
        self._may_fall_back = False
