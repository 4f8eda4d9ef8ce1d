"""TensorRT plans for an engines directory: its graphs exported for the GPU, each built for each generation.

Needs neither checkpoints nor a GPU: a graph follows from the spec and the precision, and its weights are inputs.
"""

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from ..engines.gpus import BFLOAT16_FROM, FLOAT8_FROM
from ..engines.manifest import read_manifest
from ..engines.plans import (
    BATCHES,
    FACTS,
    PlanFacts,
    PlanKey,
    differences,
    plans_folder,
    plans_to_json,
    read_plans,
    spec_hash,
)
from ..engines.tensorrt import Flavour, build_plan, find_flavour
from ..errors import PrecisionUnsupported
from ..files import Report, atomic_path, silent
from ..specs import Spec
from .gpu_precision import gpu_precision
from .graphs import export_graphs


@dataclass(frozen=True)
class PlansResult:
    """What :func:`build_plans` did."""

    flavour: Flavour
    plans: dict[int, dict[str, PlanFacts]]
    """``sm -> graph -> facts``."""
    built: int
    """Plans made now; the others were up to date."""


def build_plans(engines: Path, sms: Sequence[int], *, report: Report = silent) -> PlansResult:
    """Make the plans of an engines directory for some generations of GPUs.

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
    manifest = read_manifest(engines)
    for sm in sms:
        require_precision(sm, manifest.precision)
    flavour = find_flavour()
    specs = [model.spec for model in manifest.models.values()]
    total = len(sms) * len(manifest.graphs)
    plans: dict[int, dict[str, PlanFacts]] = {sm: {} for sm in sms}
    built = done = 0
    for compute in dict.fromkeys(compute_dtype(sm) for sm in sms):
        for spec, name, model in gpu_graphs(specs, manifest.precision, compute):
            for sm in (sm for sm in sms if compute_dtype(sm) is compute):
                report(f"TensorRT plans, sm{sm}", done, total)
                facts, new = renew_plan(engines, flavour, spec, name, model, sm, manifest.precision)
                plans[sm][name] = facts
                built += new
                done += 1
                report(f"TensorRT plans, sm{sm}", done, total)
    for sm, facts_by_graph in plans.items():
        with atomic_path(plans_folder(engines, sm, manifest.precision) / FACTS) as temporary:
            temporary.write_text(plans_to_json(facts_by_graph), encoding="utf-8")
    return PlansResult(flavour, plans, built)


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
    return PlanFacts(key, hashlib.sha256(plan.data).hexdigest(), len(plan.data), plan.activation_bytes), True


def gpu_graphs(specs: Sequence[Spec], precision: str, compute: torch.dtype) -> Iterator[tuple[Spec, str, bytes]]:
    """``(spec, graph name, ONNX file)`` of every graph, as TensorRT gets it."""
    for spec in specs:
        for name, model in export_graphs(spec, gpu_precision(precision, spec, compute)):
            yield spec, name, model.SerializeToString(deterministic=True)


def compute_dtype(sm: int) -> torch.dtype:
    """In what a generation multiplies."""
    return torch.bfloat16 if sm >= BFLOAT16_FROM else torch.float16


def plan_precision(sms: Sequence[int]) -> tuple[str, str]:
    """``(precision, reason)`` of the packs that all these generations can compute with."""
    old = [sm for sm in sms if sm < FLOAT8_FROM]
    if old:
        return "int8", f"auto: {', '.join(f'sm{sm}' for sm in old)} cannot multiply FP8"
    return "fp8", f"auto: {', '.join(f'sm{sm}' for sm in sms)} multiply FP8"


def require_precision(sm: int, precision: str) -> None:
    """Raise :class:`PrecisionUnsupported` if a generation cannot compute with packs of this precision."""
    least = {"fp8": FLOAT8_FROM, "bf16": BFLOAT16_FROM, "int8": 75}.get(precision)
    if least is None or sm < least:
        raise PrecisionUnsupported(sm, precision, plan_precision([sm])[0])
