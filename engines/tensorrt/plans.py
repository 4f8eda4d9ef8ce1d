"""Plans in an engines directory, and whether one of them may be used.

    engines/plans/sm89-fp8/
      dinov3.block.onnx      the graph that TensorRT got
      dinov3.block.plan      what it made of it
      plans.json             the key and the facts of every plan, written last

A plan is for one graph, one TensorRT, one generation of GPUs. All of that is its key; a plan whose key differs from the
wanted one in any part is never used. Plans outlive builds: renewed checkpoints of the same sizes keep them.
"""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path

from ...machine.files import read_small
from ...specs import Spec
from ..directory.architectures import GENERATIONS
from ..directory.generations import build_target
from ..directory.integrity import file_sha256
from ..directory.manifest import spec_hash
from ..directory.typed_facts import typed
from .errors import PlanMissing, PlanStale

PLANS = "plans"
FACTS = "plans.json"
BATCHES = (1, 1, 8)
"""Smallest, usual and largest number of images of a plan."""
FORM = 3
"""Raised whenever the arithmetic or the names of the graphs change, or what TensorRT is told beside them: a machine
without torch cannot compare them."""


@dataclass(frozen=True)
class PlanKey:
    """Everything that a plan depends on."""

    graph: str
    """SHA-256 of the ONNX file."""
    model: str
    """SHA-256 of the spec."""
    flavour: str
    """``tensorrt`` or ``tensorrt_rtx``."""
    version: str
    sm: int
    """Compute capability, 89 for 8.9."""
    precision: str
    profile: tuple[int, int, int]
    form: int = FORM


@dataclass(frozen=True)
class PlanFacts:
    """One plan."""

    key: PlanKey
    sha256: str
    nbytes: int
    activation_bytes: int
    """Device memory while it runs, by TensorRT's planner; the compiler on the device may need another amount."""


def plans_folder(engines: Path, sm: int, precision: str) -> Path:
    """Where the plans of a generation lie."""
    return engines / PLANS / f"sm{sm}-{precision}"


def read_plans(folder: Path) -> dict[str, PlanFacts]:
    """``graph -> facts``; empty where there are none, or none that can be read."""
    try:
        rows = json.loads(read_small(folder / FACTS))
        return {graph: _facts(row) for graph, row in rows.items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return {}


def planned_generations(engines: Path, precision: str) -> dict[int, dict[str, PlanFacts]]:
    """``sm -> graph -> facts`` of every generation that there are plans of a precision for."""
    names = (path.name for path in (engines / PLANS).glob(f"sm*-{precision}"))
    numbers = (name.removeprefix("sm").removesuffix(f"-{precision}") for name in names)
    found = {
        sm: read_plans(plans_folder(engines, sm, precision)) for sm in sorted(map(int, filter(str.isdecimal, numbers)))
    }
    return {sm: plans for sm, plans in found.items() if plans}


def plans_to_json(plans: Mapping[str, PlanFacts]) -> str:
    """The text of ``plans.json``."""
    return json.dumps({graph: asdict(facts) for graph, facts in plans.items()}, indent=1)


def wanted_key(engines: Path, graph: str, spec: Spec, precision: str, flavour: str, version: str, sm: int) -> PlanKey:
    """The key that the plan of a graph must have to run here.

    Raises:
        PlanMissing: the graph that TensorRT got is not there.
    """
    path = plans_folder(engines, sm, precision) / f"{graph}.onnx"
    if not path.is_file():
        raise PlanMissing(graph, build_target(engines), f"{flavour} {version}", sm, target_of(sm))
    return PlanKey(file_sha256(path), spec_hash(spec), flavour, version, sm, precision, BATCHES)


def checked_plan(engines: Path, graph: str, wanted: PlanKey) -> bytes:
    """The plan of a graph, if it is exactly what is wanted.

    Raises:
        PlanMissing: there is none for this generation and precision.
        PlanStale: there is one, but it or its key differs; the error says in what.
    """
    folder = plans_folder(engines, wanted.sm, wanted.precision)
    facts = read_plans(folder).get(graph)
    path = folder / f"{graph}.plan"
    if facts is None or not path.is_file():
        raise PlanMissing(
            graph, build_target(engines), f"{wanted.flavour} {wanted.version}", wanted.sm, target_of(wanted.sm)
        )
    if parts := differences(facts.key, wanted):
        raise PlanStale(path, parts, build_target(engines), target_of(wanted.sm))
    if file_sha256(path) != facts.sha256:
        raise PlanStale(path, ["its content is not what was built"], build_target(engines), target_of(wanted.sm))
    return path.read_bytes()


def target_of(sm: int) -> str:
    """What to give ``--sm`` for a generation: only TensorRT proper builds for others, and only for the GPU at hand."""
    return str(sm) if sm in GENERATIONS else "current"


def differences(found: PlanKey, wanted: PlanKey) -> list[str]:
    """What differs, in words."""
    parts = []
    for name in (field.name for field in fields(PlanKey)):
        is_, should = getattr(found, name), getattr(wanted, name)
        if is_ != should:
            short = (str(value)[:12] if name in {"graph", "model"} else value for value in (is_, should))
            parts.append("its {} is {}, not {}".format(name, *short))
    return parts


def _facts(row: dict[str, object]) -> PlanFacts:
    values = {field.name: row[field.name] for field in fields(PlanFacts)}
    key = dict(values["key"])  # type: ignore[call-overload]  # a mapping, or the caller's except
    return typed(PlanFacts(**{**values, "key": typed(PlanKey(**{"form": 0, **key, "profile": tuple(key["profile"])}))}))  # type: ignore[arg-type]
