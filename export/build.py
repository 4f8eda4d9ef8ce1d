"""Building an engines directory: checkpoints to graphs and packs, the manifest last."""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from functools import partial
from importlib.metadata import version
from pathlib import Path

from .. import __version__
from ..engines.directory.hashing import FileFacts
from ..engines.directory.integrity import file_facts
from ..engines.directory.manifest import FORMAT, Manifest, Model
from ..machine.files import require_free
from ..machine.progress import Report, silent
from ..specs import DiffusionModel, Family
from .backends.build_lock import only_build
from .backends.cpu import write_cpu_plan
from .backends.plugin import write_plugin_graphs
from .build_folder import clear_up, commit, new_build_folder, up_to_date
from .checkpoints.finding import find_checkpoints, require_fitting
from .checkpoints.recognise import Checkpoint
from .graphs.graphs import export_graphs, standalone_model
from .packs.packs import write_pack
from .packs.planning import PackPlan, plan_pack
from .precisions.choosing import precision_for
from .precisions.parallel import quantising_threads

BUILD_VERSION = 9
"""Raised whenever the same inputs give other engines, so that an old directory is rebuilt."""


@dataclass(frozen=True)
class BuildResult:
    """What :func:`build_engines` did."""

    manifest: Manifest
    rebuilt: bool
    """False: the directory was up to date."""


def build_engines(
    models: Path | Mapping[Family, Checkpoint],
    engines: Path,
    *,
    precision: str = "auto",
    precision_reason: str = "",
    blocks_per_chunk: int = 1,
    adapter: DiffusionModel | None = None,
    force: bool = False,
    report: Report = silent,
) -> BuildResult:
    """Make ``engines`` from the checkpoints under ``models``; waits for another build of the same directory.

    Args:
        models: folder with the three checkpoints, under any names; or the checkpoints, if they are found already.
        engines: the engines directory; made if absent, replaced as a whole if present.
        precision: ``auto``, ``fp8``, ``int8``, ``bf16`` or ``fp32``.
        precision_reason: for the manifest, if somebody else than this function chose it for the user.
        blocks_per_chunk: transformer blocks that move as one copy.
        adapter: the diffusion model that LoRAs are made for; by default that of the one adapter under ``models``.
        force: build even if nothing changed.
        report: told the bytes of packs written, also between the graphs that are exported before.

    Raises:
        CheckpointError: a checkpoint is missing or wrong, or the three do not fit together.
        OutputUnwritable, DiskFull: the directory cannot be written; what was there still works.
    """
    precision, own_reason = choose_precision(precision)
    checkpoints = find_checkpoints(models, adapter=adapter) if isinstance(models, Path) else models
    require_fitting(checkpoints)
    key = build_key(checkpoints, precision, blocks_per_chunk)
    if not force and (current := up_to_date(engines, key)):
        clear_up(engines, current)
        return BuildResult(current, rebuilt=False)
    plans = plan_packs(checkpoints, precision, blocks_per_chunk)
    if not engines.exists():
        require_free(engines, packs_bytes(plans))  # before there is a directory to lock
    with only_build(engines):
        if not force and (current := up_to_date(engines, key)):  # built by another process while this one waited
            return BuildResult(current, rebuilt=False)
        with quantising_threads(), new_build_folder(engines, packs_bytes(plans)) as folder:
            progress = _Progress(report, sum(plan.weight_bytes for plan in plans.values()))
            graphs = write_graphs(folder, checkpoints, plans, precision, progress)
            packs = write_packs(folder, checkpoints, plans, precision, progress)
            packages = {name: version(name) for name in ("torch", "onnx", "onnxscript")}
            manifest = Manifest(
                build=folder.name,
                build_key=key,
                precision=precision,
                precision_reason=precision_reason or own_reason,
                blocks_per_chunk=blocks_per_chunk,
                versions={"i2l-engines": __version__, **packages},
                created=datetime.now(UTC).isoformat(timespec="seconds"),
                models={family: _model(checkpoints[family], plans[family]) for family in checkpoints},
                graphs=graphs,
                files={},
            )
            if precision == "fp8":
                write_cpu_plan(folder, manifest, checkpoints, progress.tell)
            manifest = replace(manifest, files=_files(folder, packs))
            commit(engines, manifest)
        return BuildResult(manifest, rebuilt=True)


def choose_precision(name: str) -> tuple[str, str]:
    """``(precision, reason)``: ``auto`` is int8, which every backend of this version runs."""
    if name != "auto":
        return name, "asked for"
    return "int8", "auto: int8 is the fastest precision of the CPU backend, the one this version runs"


def plan_packs(
    checkpoints: Mapping[Family, Checkpoint], precision: str, blocks_per_chunk: int
) -> dict[Family, PackPlan]:
    """The packs of every model before they are written."""
    return {
        family: plan_pack(checkpoint.spec, precision_for(precision, checkpoint.spec), blocks_per_chunk)
        for family, checkpoint in checkpoints.items()
    }


def packs_bytes(plans: Mapping[Family, PackPlan]) -> int:
    """What they will take on the disk."""
    return sum(plan.layout.nbytes for plan in plans.values())


def build_key(checkpoints: Mapping[Family, Checkpoint], precision: str, blocks_per_chunk: int) -> str:
    """A hash of everything the engines depend on.

    Checkpoints count by header, size and modification time, as ``make`` does it: hashing 21 GB would cost more than
    many a build step.
    """
    facts: list[object] = [BUILD_VERSION, FORMAT, __version__, precision, blocks_per_chunk]
    for family, checkpoint in sorted(checkpoints.items()):
        stat = checkpoint.path.stat()
        tensors = {name: [info.dtype, info.shape, info.offset] for name, info in checkpoint.tensors.items()}
        others = [[other.stat().st_size, other.stat().st_mtime_ns] for other in checkpoint.paths[1:]]
        scales = {name: [info.dtype, info.shape, info.offset] for name, (_, info) in checkpoint.scales.items()}
        facts.append([family, stat.st_size, stat.st_mtime_ns, tensors, *([others, scales] if others or scales else [])])
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()


def write_graphs(
    folder: Path,
    checkpoints: Mapping[Family, Checkpoint],
    plans: Mapping[Family, PackPlan],
    precision: str,
    progress: "_Progress",
) -> dict[str, str]:
    """Write every graph and its standalone forms; return ``graph name -> path`` in the build folder."""
    paths = {}
    for family, checkpoint in checkpoints.items():
        stage, graphs = f"exporting {family}", {}
        (folder / "graphs").mkdir(exist_ok=True)
        (folder / family).mkdir()
        progress.tell(stage)
        for name, graph in export_graphs(checkpoint.spec, precision_for(precision, checkpoint.spec)):
            graphs[name] = graph
            paths[name] = f"graphs/{name}.onnx"
            (folder / paths[name]).write_bytes(graph.SerializeToString())
            progress.tell(stage)  # each takes 0.6 to 3 s on two cores, and a caller may stop the build here
        write_plugin_graphs(folder, checkpoint.spec, precision, graphs, partial(progress.tell, stage))
        for step in plans[family].steps:
            standalone = standalone_model(
                step, graphs[step.graph], plans[family].layout.tensors, Path(pack_path(family)).name
            )
            (folder / family / f"{step.name}.onnx").write_bytes(standalone.SerializeToString())
    return paths


def write_packs(
    folder: Path,
    checkpoints: Mapping[Family, Checkpoint],
    plans: Mapping[Family, PackPlan],
    precision: str,
    progress: "_Progress",
) -> dict[str, FileFacts]:
    """Write the packs; return their facts by their paths in the build folder."""
    packs = {}
    for family, checkpoint in checkpoints.items():
        progress.stage = f"packing {family}, {precision}"
        path, kept = pack_path(family), precision_for(precision, checkpoint.spec)
        packs[path] = write_pack(folder / path, plans[family], checkpoint, kept, progress.advance)
    return packs


def pack_path(family: Family) -> str:
    """Where a model's pack lies in the build folder."""
    return f"{family}/weights.safetensors"


def _model(checkpoint: Checkpoint, plan: PackPlan) -> Model:
    source = {
        "shape_hash": checkpoint.shape_hash,
        "dtype": checkpoint.dtype,
        "nbytes": checkpoint.nbytes,
        "mtime_ns": checkpoint.path.stat().st_mtime_ns,
    }
    return Model(checkpoint.spec, pack_path(checkpoint.spec.family), plan.chunks, plan.layout.tensors, source)


def _files(folder: Path, packs: Mapping[str, FileFacts]) -> dict[str, FileFacts]:
    """The facts of every file; the packs were hashed while they were written."""
    files = {}
    for path in sorted(p for p in folder.rglob("*") if p.is_file()):
        name = path.relative_to(folder).as_posix()
        files[name] = packs.get(name) or file_facts(path)
    return files


class _Progress:
    """Adds up bytes over the three packs."""

    def __init__(self, report: Report, total: int) -> None:
        self._report = report
        self._done = 0
        self._total = total
        self.stage = ""

    def tell(self, stage: str) -> None:
        self.stage = stage
        self.advance(0)

    def advance(self, nbytes: int) -> None:
        self._done += nbytes
        self._report(self.stage, self._done, self._total)
