"""An engines directory opened on a backend, and what becomes of it when memory runs out.

The backend is chosen once. Short of memory it makes a smaller plan; where the user left the choice to us, the CPU goes
on at last, with the engines that were opened, even if the directory was rebuilt meanwhile.
"""

import logging
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

from ..engines.base import Backend
from ..engines.cpu.backend import CpuBackend
from ..engines.cpu.converted import cpu_engines
from ..engines.cuda.backend import open_cuda
from ..engines.detect import choose_backend
from ..engines.device.backend import VramBudget
from ..engines.device.residency import resident_chunks
from ..engines.directory.generations import engines_for
from ..engines.directory.integrity import check_files
from ..engines.directory.manifest import Chunk, Manifest, read_manifest
from ..engines.errors import OutOfDeviceMemory
from ..engines.tensorrt.backend import open_tensorrt
from ..engines.tensorrt.library import current_sm
from ..machine.progress import Report
from ..machine.wording import format_bytes
from ..specs import Family
from .errors import EnginesReplaced, PipelineClosed

log = logging.getLogger(__name__)
T = TypeVar("T")


class OpenEngines:
    """An engines directory on a backend.

    Args:
        path: the directory.
        backend: ``auto``, ``cpu``, ``cuda`` or ``tensorrt``.
        images: the most that share a pass.
        threads: of the cpu backend.
        ram_budget_bytes: for weights that the cpu backend keeps.
        vram: for everything on a GPU.
        report: told the MiB converted, if fp8 engines are converted for the cpu backend.

    Raises:
        EnginesError, DiskFull, BackendUnavailable: see :class:`.pipeline.Pipeline`.
    """

    def __init__(
        self,
        path: Path,
        *,
        backend: str,
        images: int,
        threads: int | None,
        ram_budget_bytes: int | None,
        vram: VramBudget,
        report: Report,
    ) -> None:
        self.path = path
        self.manifest: Manifest = read_manifest(path)
        """Of the engines that were opened; those for a GPU may lie in an engines directory inside the other."""
        self.running: Manifest = self.manifest
        """Of the packs that are read: the same, except that the cpu backend reads the int8 form of fp8 engines."""
        self._for_cpu = self.manifest
        self._images, self._threads, self._ram_budget_bytes, self._report = images, threads, ram_budget_bytes, report
        self.name, self.reason = choose_backend(backend)
        check_files(path, self.manifest)
        self._may_fall_back = backend == "auto" and self.name != "cpu"
        self._standby: Backend | None = None
        self._backend: Backend | None = None
        if self._may_fall_back and self.manifest.precision != "fp8":  # files opened, no session made: 0.2 ms
            self._standby = CpuBackend(path, self.manifest, threads, self._kept(self.manifest))
        if self.name == "cpu":
            if vram.budget_bytes is not None:
                budget = format_bytes(vram.budget_bytes)
                log.warning("a VRAM budget of %s has no effect: the backend is cpu (%s)", budget, self.reason)
            self._open_cpu()
            return
        try:
            self._open_gpu(vram)
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
        for backend in (self._backend, self._standby):
            if backend is not None:
                backend.close()
        self._backend = self._standby = None

    def _fall_back(self, cause: OutOfDeviceMemory) -> None:
        """Go on with the CPU, on the build that was opened.

        Raises:
            EnginesReplaced: it must first be converted from fp8, and a rebuild has removed it. Nothing is open then.
        """
        log.warning("%s: going on with the CPU", cause)
        self._backend, self._standby = self._standby, None
        if self._backend:
            self.manifest = self.running = self._for_cpu
        elif (self.path / self._for_cpu.build).is_dir():
            self._open_cpu()
        else:
            raise EnginesReplaced(self.path, self.name) from cause
        self.name, self.reason = "cpu", f"{self.name} ran out of memory"
        self._may_fall_back = False

    def _open_gpu(self, vram: VramBudget) -> None:
        """The backend on the first card."""
        if self.name == "cuda":
            self._backend = open_cuda(self.path, self.manifest, self._images, vram)
            return
        directory = engines_for(self.path, current_sm())
        if directory != self.path:
            self.manifest = self.running = read_manifest(directory)
            check_files(directory, self.manifest)
        self._backend = open_tensorrt(directory, self.manifest, self._images, vram)

    def _open_cpu(self) -> None:
        """The cpu backend, over the int8 form of fp8 engines."""
        self.manifest = self._for_cpu
        directory, self.running = cpu_engines(self.path, self.manifest, threads=self._threads, report=self._report)
        self._backend = CpuBackend(directory, self.running, self._threads, self._kept(self.running))

    def _kept(self, manifest: Manifest) -> dict[Family, frozenset[Chunk]]:
        """The chunks that the CPU keeps between images."""
        if self._ram_budget_bytes is None:
            return {}
        chunks = {family: model.chunks for family, model in manifest.models.items()}
        return resident_chunks(chunks, self._ram_budget_bytes)
