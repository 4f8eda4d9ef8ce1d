"""TensorRT plans for an engines directory: its graphs exported for the GPU, each built for each generation.

Needs neither checkpoints nor a GPU: a graph follows from the spec and the precision, and its weights are inputs.
"""

import hashlib
import shutil
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from ...engines.directory.manifest import read_manifest, spec_hash
from ...engines.tensorrt.library import Flavour, build_plan, find_flavour
from ...engines.tensorrt.plans import (
    BATCHES,
    FACTS,
    PLANS,
    PlanFacts,
    PlanKey,
    differences,
    planned_generations,
    plans_folder,
    plans_to_json,
    read_plans,
)
from ...machine.files import atomic_path
from ...machine.progress import Report, silent
from ...specs import Spec
from ..graphs.graphs import export_graphs
from ..precisions.choosing import gpu_precision
from .build_lock import only_build
from .cards import compute_dtype, require_precision


@dataclass(frozen=True)
class PlansResult:
    """What :func:`build_plans` did."""

    flavours: dict[int, Flavour]
    """``sm -> what makes its plans``."""
    plans: dict[int, dict[str, PlanFacts]]
    """``sm -> graph -> facts``."""
    built: int
    """Plans made now; the others were up to date."""
    kept: tuple[int, ...]
    """Other generations that have plans for these packs from before."""


def build_plans(engines: Path, sms: Sequence[int], *, report: Report = silent) -> PlansResult:
    """Make the plans of an engines directory for some generations of GPUs; no build is at work there meanwhile.

    A plan that is finished counts, even if the next one is not made. Plans for packs of another precision go.

    Args:
        engines: the engines directory, built.
        sms: compute capabilities, 89 for 8.9.
        report: told the plans done.

    Raises:
        EnginesError: the directory is missing or of another version.
        PackageMissing: no TensorRT is installed.
        PrecisionUnsupported: a generation cannot compute in the packs' precision.
        PlanBuildFailed: TensorRT refuses a graph; with its own words.
    """
    flavours = {sm: find_flavour(sm) for sm in sms}
    read_manifest(engines)  # or else the lock would make the directory
    with only_build(engines):
        manifest = read_manifest(engines)
        for sm in sms:
            require_precision(sm, manifest.precision)
        specs = [model.spec for model in manifest.models.values()]
        total = len(sms) * len(manifest.graphs)
        plans: dict[int, dict[str, PlanFacts]] = {sm: {} for sm in sms}
        built = done = 0
        for compute in dict.fromkeys(compute_dtype(sm) for sm in sms):
            for spec, name, model in gpu_graphs(specs, manifest.precision, compute):
                for sm in (sm for sm in sms if compute_dtype(sm) is compute):
                    report(f"TensorRT plans, sm{sm}", done, total)
                    plans[sm][name], new = renew_plan(engines, flavours[sm], spec, name, model, sm, manifest.precision)
                    built += new
                    done += 1
                    report(f"TensorRT plans, sm{sm}", done, total)
        for sm, facts in plans.items():
            write_facts(plans_folder(engines, sm, manifest.precision), facts)
        remove_plans(engines, but_of=manifest.precision)
        kept = tuple(sm for sm in planned_generations(engines, manifest.precision) if sm not in sms)
    return PlansResult(flavours, plans, built, kept)


def renew_plan(
    engines: Path, flavour: Flavour, spec: Spec, name: str, model: bytes, sm: int, precision: str
) -> tuple[PlanFacts, bool]:
    """The plan of one graph, built unless the one that is there has the wanted key."""
    folder = plans_folder(engines, sm, precision)
    key = PlanKey(
        graph=hashlib.sha256(model).hexdigest(),
        model=spec_hash(spec),
        flavour=flavour.name,
        version=flavour.version,
        sm=sm,
        precision=precision,
        profile=BATCHES,
    )
    old = read_plans(folder).get(name)
    path = folder / f"{name}.plan"
    if old and not differences(old.key, key) and path.is_file() and path.stat().st_size == old.nbytes:
        return old, False
    plan = build_plan(flavour, name, model, sm)
    for target, data in ((folder / f"{name}.onnx", model), (path, plan.data)):
        with atomic_path(target) as temporary:
            temporary.write_bytes(data)
    facts = PlanFacts(key, hashlib.sha256(plan.data).hexdigest(), len(plan.data), plan.activation_bytes)
    write_facts(folder, read_plans(folder) | {name: facts})
    return facts, True


def write_facts(folder: Path, plans: Mapping[str, PlanFacts]) -> None:
    """Write what the plans of a folder are."""
    with atomic_path(folder / FACTS) as temporary:
        temporary.write_text(plans_to_json(plans), encoding="utf-8")


def remove_plans(engines: Path, *, but_of: str) -> None:
    """Remove the plans for packs of other precisions, which the directory no longer holds."""
    for facts in (engines / PLANS).glob(f"sm*-*/{FACTS}"):
        if not facts.parent.name.endswith(f"-{but_of}"):
            shutil.rmtree(facts.parent, ignore_errors=True)


def gpu_graphs(specs: Sequence[Spec], precision: str, compute: torch.dtype) -> Iterator[tuple[Spec, str, bytes]]:
    """``(spec, graph name, ONNX file)`` of every graph, as TensorRT gets it."""
    for spec in specs:
        for name, model in export_graphs(spec, gpu_precision(precision, spec, compute)):
            yield spec, name, model.SerializeToString(deterministic=True)
