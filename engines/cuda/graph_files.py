"""The graphs of the cuda backend in an engines directory, and whether they may be used.

    engines/cuda/int8/
      dinov3.block.onnx      reads the CPU's packs, other arithmetic
      graphs.json            what each graph is for, written last

They hold no weights. So they outlive builds, like plans: renewed checkpoints of the same sizes keep them.
"""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

from ...machine.files import read_small
from ..directory.integrity import file_sha256
from ..directory.manifest import Manifest, graphs_of, spec_hash
from ..directory.typed_facts import typed
from .errors import CudaGraphsUnusable

FOLDER = "cuda"
FACTS = "graphs.json"
FORM = 3
"""Raised whenever the arithmetic of the graphs changes."""


@dataclass(frozen=True)
class GraphFacts:
    """One graph."""

    form: int
    model: str
    """SHA-256 of the spec."""
    sha256: str


def graphs_folder(engines: Path, precision: str) -> Path:
    """Where the graphs for packs of a precision lie."""
    return engines / FOLDER / precision


def graphs_to_json(graphs: Mapping[str, GraphFacts]) -> str:
    """The text of ``graphs.json``."""
    return json.dumps({graph: asdict(facts) for graph, facts in graphs.items()}, indent=1)


def checked_graphs(engines: Path, manifest: Manifest) -> dict[str, Path]:
    """``graph -> file`` of every graph of a build, if each is exactly what is wanted.

    Raises:
        CudaGraphsUnusable: one is absent, damaged, of another version or for another architecture; the error says it.
    """
    folder = graphs_folder(engines, manifest.precision)
    try:
        facts = {graph: typed(GraphFacts(**row)) for graph, row in json.loads(read_small(folder / FACTS)).items()}
    except FileNotFoundError as error:
        raise CudaGraphsUnusable(engines, f"none were made for {manifest.precision} packs") from error
    except (OSError, ValueError, TypeError, AttributeError, RecursionError) as error:
        raise CudaGraphsUnusable(engines, f"{FACTS} does not parse") from error
    paths = {}
    for model in manifest.models.values():
        for graph in graphs_of(model):
            paths[graph] = folder / f"{graph}.onnx"
            if reason := difference(facts.get(graph), spec_hash(model.spec), paths[graph]):
                raise CudaGraphsUnusable(engines, f"{graph} {reason}")
    return paths


def difference(facts: GraphFacts | None, model: str, path: Path) -> str:
    """Why a graph may not be used; empty if it may."""
    if facts is None or not path.is_file():
        return "is not there"
    if facts.form != FORM:
        return f"has form {facts.form}, this i2l runs form {FORM}"
    if facts.model != model:
        return "is for another architecture"
    if file_sha256(path) != facts.sha256:
        return "is not what was written"
    return ""
