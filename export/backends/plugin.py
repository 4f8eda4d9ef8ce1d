"""The graphs of plugin providers, made by every build of int8 and fp32 packs: seconds, some hundred KB, no weights.

    build-<id>/plugin/plain/dinov3.block.onnx    every graph
    build-<id>/plugin/mha/dinov3.block.onnx      those with an attention, in its other form

A graph that computes in float32 on the CPU already is taken as it is; only the others are exported again.
"""

from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import onnx

from ...engines.directory.pieces import LARGEST_BYTES
from ...engines.plugin.graph_paths import FORMS, PLUGIN_FOLDER
from ...specs import Spec
from ..checkpoints.weights import graph_weights
from ..graphs.attention_forms import has_attention, with_attention
from ..graphs.graphs import export_graphs
from ..precisions.choosing import plugin_precision, precision_for
from ..precisions.storing import stored_tensors


def write_plugin_graphs(
    build: Path, spec: Spec, precision: str, exported: Mapping[str, onnx.ModelProto], tell: Callable[[], None]
) -> None:
    """Write every form of a model's graphs; nothing for packs in FP8 and BF16, which no provider multiplies.

    Args:
        build: the build folder.
        spec: of the model.
        precision: of the packs.
        exported: the CPU's graphs.
        tell: called after each graph that takes a while.
    """
    for name, graph in plugin_graphs(spec, precision, exported):
        for form in FORMS if has_attention(graph) else FORMS[:1]:
            folder = build / PLUGIN_FOLDER / form
            folder.mkdir(parents=True, exist_ok=True)
            (folder / f"{name}.onnx").write_bytes(with_attention(graph, form).SerializeToString(deterministic=True))
        tell()


def plugin_graphs(
    spec: Spec, precision: str, exported: Mapping[str, onnx.ModelProto], largest_bytes: int = LARGEST_BYTES
) -> Iterator[tuple[str, onnx.ModelProto]]:
    """``(name, graph)`` in float32 arithmetic over the CPU's packs, its attention still ONNX's.

    Args:
        spec: of the model.
        precision: of the packs.
        exported: the CPU's graphs.
        largest_bytes: for one matrix; larger ones come in pieces.
    """
    wanted, packed = plugin_precision(precision, spec, largest_bytes), precision_for(precision, spec)
    if wanted is None:
        return
    same = set()
    for name, weights in graph_weights(spec).items():
        stored = stored_tensors(weights, packed)
        if stored == stored_tensors(weights, wanted) and all(dtype == "F32" for _, dtype, _ in stored):
            same.add(name)
            yield name, exported[name]
    if same != exported.keys():
        yield from export_graphs(spec, wanted, but=frozenset(same))
