"""An engines directory opened on a backend, and what becomes of it when memory runs out.

The backend is chosen once. Short of memory it makes a smaller plan; where the user left the choice to us, the CPU goes
on at last, with the engines that were opened, even if the directory was rebuilt meanwhile.
"""

import logging
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import TypedDict, TypeVar

from ..engines.backends import offer_of
from ..engines.base import Backend, Limits, Opened
from ..engines.directory.integrity import check_files
from ..engines.directory.manifest import Manifest, read_manifest
from ..engines.errors import BackendUnavailable, BudgetTooSmall, DeviceFailed, EnginesError, OutOfDeviceMemory
from ..machine.errors import I2LError, OutputUnwritable
from ..machine.wording import format_bytes
from .cache import default_cache_folder
from .errors import EnginesReplaced, PipelineClosed
from .proof.choice import Chosen
from .proof.deciding import Decider

log = logging.getLogger(__name__)
T = TypeVar("T")
REBUILDS = 20
"""So many in a row may take a build away before it is opened."""


class PipelineOptions(TypedDict):
    """What a batch's own pipeline and those of its workers are both opened with; see :class:`.pipeline.Pipeline`."""

    backend: str
    threads: int | None
    ram_budget_bytes: int | None
    vram_budget_bytes: int | None
    vram_margin_bytes: int
    prove: bool


class OpenEngines:
    """An engines directory on a backend.

    Args:
        path: the directory.
        backend: ``auto``, or a backend's name.
        limits: what it may take.
        prove: let a card that ``auto`` meets for the first time prove itself; it is passed over otherwise.

    Raises:
        EnginesError, DiskFull, BackendUnavailable: see :class:`.pipeline.Pipeline`.
    """

    def __init__(self, path: Path, *, backend: str, limits: Limits, prove: bool = True) -> None:
        self.path = path
        self._limits = limits
        self._backend: Backend | None = None
        self._standby: Opened | None = None
        for tries_left in reversed(range(REBUILDS)):
            self._for_cpu: Manifest = read_manifest(path)
            try:
                self._open_build(backend, limits, prove=prove)
                break
            except (EnginesError, OutputUnwritable, FileNotFoundError):
                self.close()
                if not tries_left or read_manifest(path).build == self._for_cpu.build:
                    raise

    def _open_build(self, backend: str, limits: Limits, *, prove: bool) -> None:
        """Open the build that was the directory's a moment ago.

        The manifest changes in one move, so each look at it finds a whole build; but a rebuild may take it away.
        """
        check_files(self.path, self._for_cpu)
        chosen = choose_backend(self.path, self._for_cpu, backend, limits, prove=prove)
        self.name, self.reason, self.computes = chosen.name, chosen.reason, chosen.computes
        self.alone = chosen.alone
        """Pictures do not share a pass: on this card a bit would differ."""
        self._limits = replace(limits, form=limits.form or chosen.form)
        self._may_fall_back = backend == "auto" and self.name != "cpu"
        if self._may_fall_back and self._for_cpu.precision != "fp8":  # files opened, no session made: 0.2 ms
            self._standby = self._open("cpu")
        if self.name == "cpu" and limits.vram.budget_bytes is not None:
            budget = format_bytes(limits.vram.budget_bytes)
            log.warning("a VRAM budget of %s has no effect: the backend is cpu (%s)", budget, self.reason)
        if chosen.card is not None:
            limits.before_card(chosen.card)
        try:
            self._enter(self._open(self.name))
        except (OutOfDeviceMemory, DeviceFailed, BackendUnavailable) as error:
            if not self._may_fall_back:
                raise
            self._fall_back(error)
        except BudgetTooSmall as error:
            if not self._may_fall_back or limits.vram.budget_bytes is not None:  # nobody asked for so little
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
        """``work``, again with a smaller plan each time memory runs out, at last on the CPU if that is allowed.

        On the CPU at once if the device fails.
        """
        while True:
            try:
                return work()
            except DeviceFailed as error:
                if not self._may_fall_back:
                    raise
                self.backend.close()
                self._fall_back(error)
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

    def _fall_back(self, cause: I2LError) -> None:
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
        why = "ran out of memory" if isinstance(cause, MemoryError) else "failed"
        self.name, self.reason, self.computes = "cpu", f"{self.name} {why}", "cpu"
        self.alone = False
        self._may_fall_back = False


def choose_backend(path: Path, manifest: Manifest, backend: str, limits: Limits, *, prove: bool) -> Chosen:
    """Where to compute.

    Raises:
        BackendUnavailable: the named backend cannot run here.
    """
    return decider(path, manifest, limits).decide(backend, prove=prove)


def decider(path: Path, manifest: Manifest, limits: Limits) -> Decider:
    """What chooses a backend; records go beside the engines, or where the user's cache is."""
    return Decider(path, manifest, limits, default_cache_folder().parent / "proofs")
