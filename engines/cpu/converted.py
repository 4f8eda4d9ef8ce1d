"""The CPU's form of an FP8 engines directory: an int8 one inside it, made at the first use.

    engines/
      manifest.json                    precision fp8
      build-<id>/cpu/manifest.json     the plan: a manifest of precision int8 whose packs are not there yet
      build-<id>/cpu/graphs/           its graphs
      cpu-int8/                        an engines directory made from the two
        manifest.json
        build-<id>/                    the name of the build that it came from

The manifest is the switch here too: it goes first when something is remade and is written last. The directory is up to
date while its manifest is the plan, file facts aside. A lock lets a second process wait instead of doing it again.
"""

import logging
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path

from ...machine.files import atomic_path, explained_os_errors, remove_folder, remove_leftovers, require_free, sync_tree
from ...machine.locks import exclusive
from ...machine.progress import Report, silent
from ...machine.threads import default_threads
from ...machine.wording import format_bytes, format_path
from ..directory.integrity import check_files, record_checked
from ..directory.manifest import MANIFEST, Chunk, Manifest, Model, manifest_to_json, read_manifest
from ..directory.tensorfile import PAD_PREFIX
from ..errors import EngineFileDamaged, EnginesError, ManifestInvalid
from .errors import CpuPacksUnwritable
from .transcode import layout_of, transcode_pack

log = logging.getLogger(__name__)
PLAN_FOLDER = "cpu"
"""In the build folder of an fp8 build."""
CPU_FOLDER = "cpu-int8"
"""In the engines directory."""
LOCK = "lock"
STAGE = "preparing the CPU's packs, once (MiB)"
MIB = 1 << 20


def cpu_engines(
    directory: Path, manifest: Manifest, *, threads: int | None = None, report: Report = silent
) -> tuple[Path, Manifest]:
    """The engines directory that the cpu backend runs: the given one, or for fp8 its int8 form, made if absent.

    Args:
        directory: an engines directory whose files have been checked.
        manifest: its manifest.
        threads: that convert; by default as many as compute.
        report: told the MiB of packs written, if any are.

    Raises:
        ManifestInvalid: the build has no plan for the CPU.
        CpuPacksUnwritable: the int8 form is not there and cannot be written.
        DiskFull: there is no room for it.
    """
    if manifest.precision != "fp8":
        return directory, manifest
    plan = _plan(directory, manifest)
    folder = directory / CPU_FOLDER
    current = _current(folder, plan)
    if current is None:
        with _locked(directory, folder):
            current = _current(folder, plan) or _convert(
                directory, manifest, plan, threads or default_threads(), report
            )
    return folder, current


def convert_part(
    directory: Path, manifest: Manifest, part: Callable[[tuple[Chunk, ...]], tuple[Chunk, ...]], folder: Path
) -> Manifest:
    """The int8 form of some chunks of fp8 engines in a folder of its own: enough to time them, and seconds to make.

    Args:
        directory: the engines directory.
        manifest: its manifest, of precision fp8.
        part: all chunks of a model to those that are wanted.
        folder: an empty one.

    Returns:
        A manifest of these chunks alone.

    Raises:
        ManifestInvalid: the build has no plan for the CPU.
        DiskFull: there is no room for them.
    """
    plan = _plan(directory, manifest)
    models = {family: _cut(model, part(model.chunks)) for family, model in plan.models.items()}
    require_free(folder, sum(layout_of(model).nbytes for model in models.values()))
    shutil.copytree(directory / manifest.build / PLAN_FOLDER, folder / plan.build)
    with explained_os_errors(folder):
        for family, wanted in models.items():
            pack, source = folder / plan.build / wanted.pack, manifest.models[family]
            pack.parent.mkdir(parents=True, exist_ok=True)
            old = directory / manifest.build / source.pack
            transcode_pack(old, source, pack, wanted, threads=default_threads(), advance=lambda _: None)
    return replace(plan, models=models)


def _cut(model: Model, chunks: tuple[Chunk, ...]) -> Model:
    """A model of some of its chunks, placed one behind the other."""
    names = [
        name
        for name, info in model.tensors.items()
        if any(chunk.offset <= info.offset < chunk.offset + chunk.nbytes for chunk in chunks)
    ]
    tensors = layout_of(replace(model, chunks=chunks, tensors={name: model.tensors[name] for name in names})).tensors
    at = {model.tensors[name].offset: tensors[name].offset for name in names if not name.startswith(PAD_PREFIX)}
    starts = [at[chunk.offset] for chunk in chunks]
    ends = [*starts[1:], max(info.offset + info.nbytes for info in tensors.values())]
    placed = zip(chunks, starts, ends, strict=True)
    return replace(
        model, tensors=tensors, chunks=tuple(replace(chunk, offset=at, nbytes=end - at) for chunk, at, end in placed)
    )


def bytes_to_convert(directory: Path, manifest: Manifest) -> int:
    """What :func:`cpu_engines` would write now: 0 where nothing is to convert, or all of it is done.

    Raises:
        ManifestInvalid: the build has no plan for the CPU.
    """
    if manifest.precision != "fp8":
        return 0
    plan = _plan(directory, manifest)
    return 0 if _current(directory / CPU_FOLDER, plan) else _packs_bytes(plan)


def cpu_graphs(directory: Path, manifest: Manifest) -> tuple[list[tuple[str, bytes]], Manifest]:
    """The graphs that the CPU runs, and the manifest of what feeds them; nothing is converted.

    Raises:
        ManifestInvalid: the build has no plan for the CPU.
    """
    folder, running = directory / manifest.build, manifest
    if manifest.precision == "fp8":
        folder, running = folder / PLAN_FOLDER, _plan(directory, manifest)
    return [(graph, (folder / path).read_bytes()) for graph, path in running.graphs.items()], running


def remove_cpu_engines(directory: Path, *, but_of: str) -> None:
    """Remove the int8 form of an fp8 build that is no longer the directory's.

    Args:
        directory: the engines directory.
        but_of: the build folder whose form may stay.
    """
    folder = directory / CPU_FOLDER
    try:
        stale = read_manifest(folder).build != but_of
    except EnginesError:
        stale = (folder / LOCK).is_file()  # a conversion that died; without the lock it is somebody else's folder
    if stale and (reason := remove_folder(folder)):
        log.warning("%s stays until the next build: %s", format_path(folder), reason)


def _plan(directory: Path, manifest: Manifest) -> Manifest:
    try:
        plan = read_manifest(directory / manifest.build / PLAN_FOLDER, planned=True)
    except EnginesError as error:
        raise ManifestInvalid(directory / MANIFEST, "its fp8 build has no plan for the CPU") from error
    for family, wanted in plan.models.items():
        fits = layout_of(wanted).tensors == wanted.tensors and wanted.spec == manifest.models[family].spec
        if plan.build != manifest.build or not fits:
            raise ManifestInvalid(directory / MANIFEST, "the plan for the CPU is not of its fp8 build")
    return plan


def _packs_bytes(plan: Manifest) -> int:
    return sum(layout_of(model).nbytes for model in plan.models.values())


def _current(folder: Path, plan: Manifest) -> Manifest | None:
    """The manifest of the int8 form if it is whole and of this plan."""
    try:
        found = read_manifest(folder)
    except EnginesError:
        return None
    if replace(found, files=plan.files) != plan:
        return None
    try:
        check_files(folder, found)
    except EngineFileDamaged as error:
        log.warning("made again, as its source is still there: %s", error)
        return None
    return found


@contextmanager
def _locked(directory: Path, folder: Path) -> Iterator[None]:
    """Hold the lock of the int8 form, its folder made if it is not there."""
    with ExitStack() as stack:
        if folder.is_symlink():
            raise CpuPacksUnwritable(directory, f"{folder.name} is a link to another place")
        try:
            folder.mkdir(exist_ok=True)
            stack.enter_context(exclusive(folder / LOCK, waiting=_tell_waiting))
        except OSError as error:
            raise CpuPacksUnwritable(directory, os.strerror(error.errno or 0)) from error
        yield


def _tell_waiting() -> None:
    log.info("another process prepares the CPU's packs: waiting for it")


def _convert(directory: Path, manifest: Manifest, plan: Manifest, threads: int, report: Report) -> Manifest:
    """Make the int8 form; called with the lock held."""
    folder = directory / CPU_FOLDER
    total = _packs_bytes(plan)
    done = 0

    def advance(nbytes: int) -> None:
        nonlocal done
        done += nbytes
        report(STAGE, done // MIB, total // MIB)

    with explained_os_errors(folder), _build_folder(folder, plan.build) as build:
        require_free(folder, total)
        log.info(
            "%s holds fp8, for which the CPU has no product: converting it to int8 in %s (%s), once",
            format_path(directory), folder.name, format_bytes(total),
        )  # fmt: skip
        files = dict(plan.files)
        for name in plan.files:
            (build / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(directory / manifest.build / PLAN_FOLDER / name, build / name)
        for family, wanted in plan.models.items():
            model, pack = manifest.models[family], build / wanted.pack
            pack.parent.mkdir(parents=True, exist_ok=True)
            source = directory / manifest.build / model.pack
            files[wanted.pack] = transcode_pack(source, model, pack, wanted, threads=threads, advance=advance)
        made = replace(plan, files=files)
        sync_tree(build)
        record_checked(folder, made)
        with atomic_path(folder / MANIFEST) as temporary:
            temporary.write_text(manifest_to_json(made), encoding="utf-8")
    return made


@contextmanager
def _build_folder(folder: Path, name: str) -> Iterator[Path]:
    """A fresh build folder, whatever an earlier conversion left; removed again if the body fails."""
    for path in (folder / MANIFEST, *folder.glob("build-*")):
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)
    remove_leftovers(folder)
    build = folder / name
    try:
        build.mkdir()
        yield build
    finally:
        if not (folder / MANIFEST).exists():  # once it is there, the build stays whatever happens
            shutil.rmtree(build, ignore_errors=True)
