"""The graphs of the cuda backend for an engines directory. Needs neither checkpoints nor a GPU."""

import hashlib
from pathlib import Path

import torch

from ...engines.cuda.graph_files import FACTS, FORM, GraphFacts, graphs_folder, graphs_to_json
from ...engines.directory.manifest import graphs_of, read_manifest, spec_hash
from ...machine.files import atomic_path
from ...machine.progress import Report, silent
from ..graphs.graphs import export_graphs
from ..precisions.choosing import cuda_precision
from .build_lock import only_build


def build_cuda_graphs(engines: Path, *, compute: torch.dtype = torch.bfloat16, report: Report = silent) -> int:
    """Export every graph of an engines directory for onnxruntime's CUDA provider; return how many.

    Ten seconds at any size: most of it is torch's export. Only then are files written, so that who stops it leaves the
    graphs that were there.

    Args:
        engines: the engines directory, built.
        compute: what matrices are multiplied in; float32 for onnxruntime's CPU provider, which has no bfloat16 product.
        report: told the graphs done.

    Raises:
        EnginesError: the directory is missing or of another version.
    """
    read_manifest(engines)  # or else the lock would make the directory
    with only_build(engines):
        manifest = read_manifest(engines)
        folder = graphs_folder(engines, manifest.precision)
        total = sum(len(graphs_of(model)) for model in manifest.models.values())
        facts: dict[str, GraphFacts] = {}
        files: dict[str, bytes] = {}
        for model in manifest.models.values():
            for name, graph in export_graphs(model.spec, cuda_precision(manifest.precision, model.spec, compute)):
                report("graphs for cuda", len(files), total)
                files[f"{name}.onnx"] = data = graph.SerializeToString(deterministic=True)
                facts[name] = GraphFacts(FORM, spec_hash(model.spec), hashlib.sha256(data).hexdigest())
        files[FACTS] = graphs_to_json(facts).encode()
        for name, data in files.items():
            with atomic_path(folder / name) as temporary:
                temporary.write_bytes(data)
        report("graphs for cuda", total, total)
    return total
