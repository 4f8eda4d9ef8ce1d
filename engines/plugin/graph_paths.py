"""The graphs of plugin providers in an engines directory.

    engines/build-<id>/plugin/plain/dinov3.block.onnx    every graph
    engines/build-<id>/plugin/mha/dinov3.block.onnx      those of which there is another form

They are files of the build like any other, so the manifest knows them and opening checks them.
"""

from pathlib import Path

from ..directory.manifest import Manifest, graphs_of
from .errors import PluginGraphsMissing

PLUGIN_FOLDER = "plugin"
FORMS = ("plain", "mha")
"""Of the attention, the safest first: MatMul, Softmax, MatMul; onnxruntime's MultiHeadAttention."""


def graph_paths(engines: Path, manifest: Manifest, form: str) -> dict[str, Path]:
    """``graph -> file`` of every graph in a form, where there is no other in the first.

    Raises:
        PluginGraphsMissing: the build has none: it is older, or its packs are of another precision.
    """
    paths = {}
    for model in manifest.models.values():
        for graph in sorted(graphs_of(model)):
            names = [f"{PLUGIN_FOLDER}/{folder}/{graph}.onnx" for folder in (form, FORMS[0])]
            found = next((name for name in names if name in manifest.files), None)
            if found is None:
                raise PluginGraphsMissing(engines, manifest.precision)
            paths[graph] = engines / manifest.build / found
    return paths
