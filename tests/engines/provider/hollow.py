"""Engines of any size whose packs are holes: real graphs, plans and headers, and zeros that take no disk."""

import hashlib
from pathlib import Path

from i2l.engines.directory.hashing import MARK_DIGITS, REGION_BYTES, FileFacts, region_mark
from i2l.engines.directory.integrity import file_facts, record_checked
from i2l.engines.directory.manifest import MANIFEST, Manifest, Model, manifest_to_json
from i2l.engines.directory.tensorfile import Layout
from i2l.export.backends.cuda import build_cuda_graphs
from i2l.export.packs.planning import plan_pack
from i2l.export.precisions.storing import storing_for
from i2l.specs import PRESETS, Family


def make_hollow(directory: Path, preset: str, precision: str) -> None:
    """Make an engines directory with the cuda backend's graphs; what it computes with its weights is nothing."""
    build = directory / "build-hollow"
    models: dict[Family, Model] = {}
    files: dict[str, FileFacts] = {}
    for spec in PRESETS[preset]:
        plan = plan_pack(spec, storing_for(precision, spec), 1)
        pack = f"{spec.family}/weights.safetensors"
        (build / spec.family).mkdir(parents=True)
        files[pack] = _hole(build / pack, plan.layout)
        models[spec.family] = Model(spec, pack, plan.chunks, plan.layout.tensors, {"shape_hash": "none"})
    used = sorted({step.graph for model in models.values() for chunk in model.chunks for step in chunk.steps})
    (build / "graphs").mkdir()
    for graph in used:  # the cuda backend has its own
        (build / "graphs" / f"{graph}.onnx").write_bytes(b"")
        files[f"graphs/{graph}.onnx"] = file_facts(build / "graphs" / f"{graph}.onnx")
    graphs = {graph: f"graphs/{graph}.onnx" for graph in used}
    key = hashlib.sha256(preset.encode()).hexdigest()
    manifest = Manifest(build.name, key, precision, "a test", 1, {}, "2026-01-01T00:00:00+00:00", models, graphs, files)
    (directory / MANIFEST).write_text(manifest_to_json(manifest))
    record_checked(directory, manifest)
    build_cuda_graphs(directory)


def _hole(path: Path, layout: Layout) -> FileFacts:
    """A pack that is its header, and the marks of its regions, most of which are alike."""
    path.write_bytes(layout.header)
    with path.open("r+b") as file:
        file.truncate(layout.nbytes)
    count = -(-layout.nbytes // REGION_BYTES)
    if count == 1:
        return file_facts(path)
    written = -(-len(layout.header) // REGION_BYTES)
    with path.open("rb") as file:
        first = [region_mark(file.read(REGION_BYTES)) for _ in range(written)]
    zeros, last = region_mark(bytes(REGION_BYTES)), region_mark(bytes((layout.nbytes - 1) % REGION_BYTES + 1))
    marks = "".join([*first, *[zeros] * (count - written - 1), last])
    assert len(marks) == count * MARK_DIGITS
    return FileFacts(layout.nbytes, "0" * 64, marks)
