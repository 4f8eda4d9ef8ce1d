"""The graphs of the cuda backend for an engines directory. Needs neither checkpoints nor a GPU."""

from pathlib import Path

import torch

from ..engines.cuda_graphs import FACTS, FORM, GraphFacts, graphs_folder, graphs_of, graphs_to_json
from ..engines.integrity import file_facts
from ..engines.manifest import read_manifest
from ..engines.plans import spec_hash
from ..files import Report, atomic_path, silent
from .cuda_precision import cuda_precision
from .graphs import export_graphs


def build_cuda_graphs(engines: Path, *, compute: torch.dtype = torch.bfloat16, report: Report = silent) -> int:
    """Export every graph of an engines directory for onnxruntime's CUDA provider; return how many.

    Ten seconds at any size: most of it is torch's export.

    Args:
        engines: the engines directory, built.
        compute: what matrices are multiplied in; float32 for onnxruntime's CPU provider, which has no bfloat16 product.
        report: told the graphs done.

    Raises:
        EnginesError: the directory is missing or of another version.
    """
    manifest = read_manifest(engines)
    folder = graphs_folder(engines, manifest.precision)
    folder.mkdir(parents=True, exist_ok=True)
    total = sum(len(graphs_of(model)) for model in manifest.models.values())
    facts: dict[str, GraphFacts] = {}
    for model in manifest.models.values():
        for name, graph in export_graphs(model.spec, cuda_precision(manifest.precision, model.spec, compute)):
            report("graphs for cuda", len(facts), total)
            path = folder / f"{name}.onnx"
            with atomic_path(path) as temporary:
                temporary.write_bytes(graph.SerializeToString(deterministic=True))
            facts[name] = GraphFacts(FORM, spec_hash(model.spec), file_facts(path).sha256)
    report("graphs for cuda", total, total)
    with atomic_path(folder / FACTS) as temporary:
        temporary.write_text(graphs_to_json(facts), encoding="utf-8")
    return total
