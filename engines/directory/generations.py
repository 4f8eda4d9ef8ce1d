"""Which engines serve which generation of GPUs.

The generations before sm89 have no FP8 products, so for cards on both sides of it an engines directory holds another
one:

    engines/
      manifest.json, build-<id>/    int8: for the CPU and the generations before sm89
      plans/sm86-int8/
      gpu-fp8/                      an engines directory like any other, from the same checkpoints
        manifest.json, build-<id>/
        plans/sm89-fp8/

The two are replaced one after the other, the outer one first, and inner engines of other checkpoints than the outer
ones are not used: a card must not give another LoRA than the card beside it.
"""

import logging
from pathlib import Path

from ...machine.files import remove_folder
from ...machine.wording import format_path
from ..errors import EnginesError
from .architectures import FLOAT8_FROM
from .manifest import MANIFEST, Manifest, read_manifest

log = logging.getLogger(__name__)

FP8_FOLDER = "gpu-fp8"
"""In the engines directory."""


def engines_for(engines: Path, sm: int) -> Path:
    """The engines directory that serves a generation: ``engines`` itself, or the FP8 one in it.

    The CPU is served by ``engines`` itself, also when it takes over from a GPU: it would have to convert FP8 packs.

    Args:
        engines: an engines directory.
        sm: compute capability, 89 for 8.9.

    Raises:
        EnginesMissing, ManifestInvalid: ``engines`` is no engines directory, or of another version.
    """
    return inner if sm >= FLOAT8_FROM and (inner := fp8_engines(engines)) else engines


def build_target(engines: Path) -> Path:
    """The directory that ``i2l build-engines`` is given for engines that :func:`engines_for` found."""
    return engines.parent if engines.name == FP8_FOLDER else engines


def fp8_engines(engines: Path) -> Path | None:
    """The FP8 engines inside an engines directory; None if there are none, or none of the same checkpoints.

    Raises:
        EnginesMissing, ManifestInvalid: ``engines`` is no engines directory, or of another version.
    """
    outer, inner = read_manifest(engines), engines / FP8_FOLDER
    try:
        return inner if _sources(read_manifest(inner)) == _sources(outer) else None
    except EnginesError:
        return None


def remove_fp8_engines(engines: Path) -> int:
    """Remove the FP8 engines inside an engines directory, whole or begun; return the bytes of their files."""
    inner = engines / FP8_FOLDER
    if not (inner / MANIFEST).is_file() and not any(inner.glob("build-*")):
        return 0  # not there, or somebody else's folder
    nbytes = sum(path.stat().st_size for path in inner.rglob("*") if path.is_file())
    (inner / MANIFEST).unlink(missing_ok=True)  # first: half a build must not look like one
    if reason := remove_folder(inner):
        log.warning("%s stays until the next build: %s", format_path(inner), reason)
    return nbytes


def _sources(manifest: Manifest) -> dict[str, object]:
    return {family: model.checkpoint for family, model in manifest.models.items()}
