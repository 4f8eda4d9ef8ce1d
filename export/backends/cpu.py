"""What an fp8 build holds for the CPU: int8 graphs, and the plan of the packs that are made from the FP8 ones at need.

The packs themselves would double the build for machines that may never use them; see engines/cpu/converted.py.
"""

from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path

from ...engines.cpu.converted import PLAN_FOLDER
from ...engines.directory.integrity import file_facts
from ...engines.directory.manifest import MANIFEST, Manifest, manifest_to_json
from ...specs import Family
from ..checkpoints.recognise import Checkpoint
from ..graphs.graphs import export_graphs
from ..packs.planning import plan_pack
from ..precisions.choosing import precision_for


def write_cpu_plan(
    build: Path, manifest: Manifest, checkpoints: Mapping[Family, Checkpoint], tell: Callable[[str], None]
) -> None:
    """Write ``cpu/manifest.json`` and the graphs that it names.

    Args:
        build: the build folder.
        manifest: of the fp8 build; its files do not matter.
        checkpoints: what the build is made from.
        tell: told the stage before the first graph of a model and after each.
    """
    folder = build / PLAN_FOLDER
    (folder / "graphs").mkdir(parents=True)
    models, graphs, files = {}, {}, {}
    for family, checkpoint in checkpoints.items():
        precision = precision_for("int8", checkpoint.spec)
        pack = plan_pack(checkpoint.spec, precision, manifest.blocks_per_chunk)
        models[family] = replace(manifest.models[family], chunks=pack.chunks, tensors=pack.layout.tensors)
        tell(stage := f"exporting {family} for the CPU")
        for name, graph in export_graphs(checkpoint.spec, precision):
            graphs[name] = path = f"graphs/{name}.onnx"
            (folder / path).write_bytes(graph.SerializeToString())
            files[path] = file_facts(folder / path)
            tell(stage)
    plan = replace(
        manifest,
        precision="int8",
        precision_reason="the CPU's form of fp8 engines",
        models=models,
        graphs=graphs,
        files=files,
    )
    (folder / MANIFEST).write_text(manifest_to_json(plan), encoding="utf-8")
