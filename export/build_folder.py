"""A build's own folder: made fresh, made the directory's build in one move, removed when it is dead.

A build that is killed leaves a folder of up to the size of all packs. The next build removes it, also one that finds
nothing to do.
"""

import logging
import shutil
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from ..engines.cpu.converted import PLAN_FOLDER, remove_cpu_engines
from ..engines.directory.generations import fp8_engines, remove_fp8_engines
from ..engines.directory.integrity import record_checked
from ..engines.directory.manifest import MANIFEST, Manifest, manifest_to_json, read_manifest
from ..engines.errors import EnginesError
from ..engines.plugin.graph_paths import PLUGIN_FOLDER
from ..machine.errors import OutputUnwritable
from ..machine.files import atomic_path, explained_os_errors, remove_folder, remove_leftovers, require_free, sync_tree
from ..machine.wording import format_bytes, format_path
from ..specs import FAMILIES
from .backends.build_lock import only_build

log = logging.getLogger(__name__)
BUILD_PREFIX = "build-"


def up_to_date(engines: Path, key: str) -> Manifest | None:
    """The manifest of engines that this build would only make again, or None."""
    current = current_manifest(engines)
    return current if current and current.build_key == key else None


def current_manifest(engines: Path) -> Manifest | None:
    """The manifest of an existing directory whose files are all there, or None if it must be built."""
    try:
        manifest = read_manifest(engines)
    except EnginesError:
        return None
    folder = engines / manifest.build
    complete = all((folder / name).is_file() for name in manifest.files)
    return manifest if complete else None


@contextmanager
def new_build_folder(engines: Path, nbytes: int) -> Iterator[Path]:
    """A fresh folder inside ``engines``, removed again if the body fails; leftovers of dead builds go first.

    The caller is the only build in ``engines``.
    """
    with explained_os_errors(engines):
        remove_dead(engines, keep=(current.build,) if (current := current_manifest(engines)) else ())
        require_free(engines, nbytes)
    folder = engines / f"{BUILD_PREFIX}{uuid.uuid4().hex[:8]}"
    try:
        with explained_os_errors(engines):
            folder.mkdir()  # Ctrl-C comes between any two lines
            yield folder
    finally:
        current = current_manifest(engines)
        if current is None or current.build != folder.name:  # once the manifest names it, it stays whatever happens
            shutil.rmtree(folder, ignore_errors=True)


def commit(engines: Path, manifest: Manifest) -> None:
    """Make the new build the directory's build, then remove the old one."""
    sync_tree(engines / manifest.build)  # before anything names it: the power may go at any moment
    record_checked(engines, manifest)
    with atomic_path(engines / MANIFEST) as temporary:
        temporary.write_text(manifest_to_json(manifest), encoding="utf-8")
    remove_dead(engines, keep=(manifest.build,))
    remove_cpu_engines(engines, but_of=manifest.build)
    if fp8_engines(engines) is None and (nbytes := remove_fp8_engines(engines)):
        log.info(
            "removed the fp8 engines in %s, which are of other checkpoints: %s",
            format_path(engines),
            format_bytes(nbytes),
        )


def clear_up(engines: Path, current: Manifest) -> None:
    """Remove what dead builds have left beside the current one, up to a whole build; needs no lock if all is clear."""
    if not dead_builds(engines, keep=(current.build,)):
        return
    try:
        with only_build(engines):
            if (now := current_manifest(engines)) is not None:
                remove_dead(engines, keep=(now.build,))
                remove_cpu_engines(engines, but_of=now.build)
    except OutputUnwritable as error:
        log.warning("what an earlier build left stays: %s", error)


def remove_dead(engines: Path, keep: tuple[str, ...]) -> None:
    """Remove the folders of replaced and of dead builds, and the files that they were writing."""
    remove_leftovers(engines)
    for folder in dead_builds(engines, keep):
        if reason := remove_folder(folder):
            log.warning("%s stays until the next build: %s", format_path(folder), reason)


def dead_builds(engines: Path, keep: tuple[str, ...]) -> list[Path]:
    """The folders of other builds than those to keep; a folder that holds anything else is somebody else's."""
    ours = {"graphs", PLAN_FOLDER, PLUGIN_FOLDER, *FAMILIES}
    folders = [f for f in engines.glob(f"{BUILD_PREFIX}*") if f.is_dir() and not f.is_symlink() and f.name not in keep]
    return [folder for folder in folders if {path.name for path in folder.iterdir()} <= ours]
