"""One engines directory for several generations of GPUs: each with the packs that it computes with best.

Up to two precisions are needed, as FP8 products begin with sm89; where both are,
:mod:`..engines.directory.generations` says which of them serves a card. One generation's packs are built after the
other's, each reading the checkpoints once.
"""

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from ..engines.directory.architectures import FLOAT8_FROM
from ..engines.directory.generations import FP8_FOLDER
from ..machine.files import require_free
from ..machine.progress import Report, silent
from ..machine.wording import format_bytes
from ..specs import DiffusionModel, Family
from .backends.cards import require_precision
from .build import BuildResult, build_engines, build_key, choose_precision, packs_bytes, plan_packs
from .build_folder import current_manifest
from .checkpoints.finding import find_checkpoints, require_fitting
from .checkpoints.recognise import Checkpoint

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Part:
    """Packs of one precision, and the generations that use them."""

    precision: str
    reason: str
    """Why this one; empty where the user or the build chose it."""
    sms: tuple[int, ...]
    folder: str = "."
    """Below the engines directory."""


def plan_parts(precision: str, sms: Sequence[int]) -> tuple[Part, ...]:
    """What an engines directory must hold, the part of the CPU and of the lowest generation first.

    Args:
        precision: ``auto``: each generation gets its best; else all get this one.
        sms: compute capabilities, 89 for 8.9; none: for the CPU.

    Raises:
        PrecisionUnsupported: a generation cannot compute in ``precision``.
    """
    if precision != "auto" or not sms:
        for sm in sms:
            require_precision(sm, precision)
        return (Part(precision, "", tuple(sms)),)
    old = tuple(sm for sm in sms if sm < FLOAT8_FROM)
    new = tuple(sm for sm in sms if sm >= FLOAT8_FROM)
    int8 = Part("int8", f"auto: no FP8 products on {_names(old)}", old)
    fp8 = Part("fp8", f"auto: FP8 products on {_names(new)}", new, FP8_FOLDER if old else ".")
    return tuple(part for part in (int8, fp8) if part.sms)


@dataclass(frozen=True)
class PlannedBuild:
    """Packs that a build would write."""

    precision: str
    nbytes: int
    replaced_bytes: int
    """Of the packs there now, which go once the new ones are whole."""


def planned_builds(
    checkpoints: Mapping[Family, Checkpoint],
    engines: Path,
    parts: Sequence[Part],
    *,
    blocks_per_chunk: int = 1,
    force: bool = False,
) -> list[PlannedBuild]:
    """What :func:`build_parts` would do: nothing for parts that are up to date."""
    builds = []
    for part in parts:
        precision, current = choose_precision(part.precision)[0], current_manifest(engines / part.folder)
        if force or current is None or current.build_key != build_key(checkpoints, precision, blocks_per_chunk):
            old = sum(facts.nbytes for facts in current.files.values()) if current else 0
            new = packs_bytes(plan_packs(checkpoints, precision, blocks_per_chunk))
            builds.append(PlannedBuild(precision, new, old))
    return builds


def build_parts(
    models: Path | Mapping[Family, Checkpoint],
    engines: Path,
    parts: Sequence[Part],
    *,
    blocks_per_chunk: int = 1,
    adapter: DiffusionModel | None = None,
    force: bool = False,
    report: Report = silent,
) -> list[BuildResult]:
    """:func:`build_engines` for every part; room on the disk for all of them is asked for before any work.

    ``models`` may be the checkpoints, if they are found already.

    Raises:
        CheckpointError, OutputUnwritable, DiskFull: as :func:`build_engines`.
    """
    checkpoints, builds = checked_builds(
        models, engines, parts, blocks_per_chunk=blocks_per_chunk, adapter=adapter, force=force
    )
    if len(builds) > 1:
        packs = " and ".join(f"{format_bytes(build.nbytes)} in {build.precision}" for build in builds)
        log.info("building packs of %s; needs %s of free disk", packs, format_bytes(peak_bytes(builds)))
    return [
        build_engines(
            checkpoints,
            engines / part.folder,
            precision=part.precision,
            precision_reason=part.reason,
            blocks_per_chunk=blocks_per_chunk,
            force=force,
            report=report,
        )
        for part in parts
    ]


def checked_builds(
    models: Path | Mapping[Family, Checkpoint],
    engines: Path,
    parts: Sequence[Part],
    *,
    blocks_per_chunk: int = 1,
    adapter: DiffusionModel | None = None,
    force: bool = False,
) -> tuple[Mapping[Family, Checkpoint], list[PlannedBuild]]:
    """The checkpoints, and what :func:`build_parts` would do with them, if nothing speaks against it.

    Whoever asks before locking ``engines`` leaves no directory behind where something does.

    Raises:
        CheckpointError, DiskFull: as :func:`build_parts`.
    """
    checkpoints = find_checkpoints(models, adapter=adapter) if isinstance(models, Path) else models
    require_fitting(checkpoints)
    builds = planned_builds(checkpoints, engines, parts, blocks_per_chunk=blocks_per_chunk, force=force)
    if len(builds) > 1 or not engines.exists():  # else what dead builds have left goes first
        require_free(engines, peak_bytes(builds))
    return checkpoints, builds


def peak_bytes(builds: Sequence[PlannedBuild]) -> int:
    """The free disk that builds in a row need."""
    peak = grown = 0
    for build in builds:
        peak = max(peak, grown + build.nbytes)
        grown += build.nbytes - build.replaced_bytes
    return peak


def _names(sms: Sequence[int]) -> str:
    return ", ".join(f"sm{sm}" for sm in sms)
