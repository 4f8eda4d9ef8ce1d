"""The engines of an adapter: found beside the models, or built there once.

``models/I2L/engines`` itself may be an engines directory (somebody ran ``i2l build-engines``). What the nodes build
goes to ``engines/<adapter>-<precision>`` below it, so that adapters and precisions do not replace one another.
Engines are used if their build key says that they came from these checkpoints by this version.
"""

import logging
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from ..engines.directory.manifest import Manifest
from ..export.checkpoints.errors import (
    TITLES,
    CheckpointForeign,
    CheckpointMissing,
    CheckpointOfAnotherKind,
)
from ..machine.wording import format_path
from ..specs import Family
from .errors import AdapterUnfit, ModelFilesMissing, NoPlaceForEngines
from .folders import can_write
from .node_text import Tell
from .progress import comfy_report, of_build
from .requirements import pack_requirements

if TYPE_CHECKING:
    from ..export.checkpoints.recognise import Checkpoint

log = logging.getLogger(__name__)
FOLDER = "engines"
ENCODERS: tuple[Family, ...] = ("siglip2", "dinov3")


def prepare_engines(
    adapter: Path,
    roots: Sequence[Path],
    precision: str,
    tell: Tell,
    places: Sequence[Path] = (),
    *,
    close: Callable[[], None],
) -> tuple[Path, Manifest]:
    """The engines directory of an adapter and its manifest, built if there is none or it is out of date.

    Args:
        adapter: the adapter's checkpoint.
        roots: folders to look for the encoders in.
        precision: ``auto``, or what ``i2l build-engines --precision`` takes.
        tell: shows on the node what is built, if anything is.
        places: where engines may be and go, best first; by default in the first root.
        close: closes the open pipeline, before a build that may replace its engines: Windows removes no file that is
            open, and the build gets the memory.

    Raises:
        CheckpointError: the adapter is no adapter, or no root has the encoders and there are no engines yet.
        NoPlaceForEngines, OutputUnwritable, DiskFull: the engines cannot be written.
        NodePackIncomplete: a package that building needs is not installed.
    """
    with pack_requirements():
        from ..export.build import build_engines, build_key, choose_precision  # noqa: PLC0415
        from ..export.build_folder import current_manifest  # noqa: PLC0415
        from ..export.checkpoints.weights import graph_weights  # noqa: PLC0415
    places = places or [roots[0] / FOLDER]
    name = f"{adapter.stem}-{choose_precision(precision)[0]}"
    manifests = {folder: current_manifest(folder) for place in places for folder in (place, place / name)}
    existing = {folder: m for folder, m in manifests.items() if m and precision in {"auto", m.precision}}
    checkpoints: dict[Family, Checkpoint] = {"adapter": adapter_checkpoint(adapter)}
    try:
        checkpoints |= find_encoders(roots)
    except CheckpointMissing as error:
        for engines, manifest in existing.items():
            if manifest.models["adapter"].checkpoint["shape_hash"] == checkpoints["adapter"].shape_hash:
                log.warning("i2l: %s. Meanwhile the engines in %s serve, unchecked.", error, format_path(engines))
                return engines, manifest
        raise
    for engines, manifest in existing.items():
        if manifest.build_key == build_key(checkpoints, manifest.precision, manifest.blocks_per_chunk):
            return engines, manifest
    place = next((place for place in places if can_write(place)), None)
    if place is None:
        raise NoPlaceForEngines(places)
    own = place / name
    if place != places[0]:
        log.info("i2l: %s cannot be written, so engines go to %s", format_path(places[0]), format_path(place))
    log.info("i2l: no engines for %s yet: building them in %s, once", adapter.name, format_path(own))
    close()
    start = time.perf_counter()
    graphs = sum(1 + len(graph_weights(checkpoint.spec)) for checkpoint in checkpoints.values())
    bar = of_build(graphs * (2 if precision == "fp8" else 1))  # fp8 engines hold the CPU's graphs, too
    with quiet_exporters():
        report = comfy_report(tell, bar, "building engines, once: ")
        manifest = build_engines(checkpoints, own, precision=precision, report=report).manifest
    log.info("i2l: built %s in %.0f s (%s)", format_path(own), time.perf_counter() - start, manifest.precision_reason)
    return own, manifest


def adapter_checkpoint(adapter: Path) -> "Checkpoint":
    """The adapter in a file.

    Raises:
        AdapterUnfit: the file is something else.
        CheckpointError: it is an adapter, but not whole, or not one that i2l knows.
    """
    from ..export.checkpoints.finding import find_checkpoints  # noqa: PLC0415

    try:
        return find_checkpoints(adapter, ("adapter",))["adapter"]
    except CheckpointForeign as error:
        raise AdapterUnfit(adapter, error.what or "of a model that i2l does not know") from error
    except CheckpointOfAnotherKind as error:
        raise AdapterUnfit(adapter, TITLES[error.kind]) from error


def find_encoders(roots: Sequence[Path]) -> "Mapping[Family, Checkpoint]":
    """Both encoders, from the first root that has them.

    Raises:
        CheckpointError: no root has them; the first root says why.
    """
    from ..export.checkpoints.finding import find_checkpoints  # noqa: PLC0415

    missing: list[CheckpointMissing] = []
    for root in roots:
        try:
            return find_checkpoints(root, ENCODERS)
        except CheckpointMissing as error:
            missing.append(error)
    raise ModelFilesMissing(missing[0].families, roots[0], missing[0].damaged) from missing[0]


@contextmanager
def quiet_exporters() -> Iterator[None]:
    """Keep hundreds of lines about folded constants out of ComfyUI's log, which shows every library's INFO."""
    loggers = [logging.getLogger(name) for name in ("onnxscript", "onnx_ir", "torch.onnx")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.WARNING)
    try:
        yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
