"""The float32 torch reference, one step at a time, so that it also runs at full size in a few GB.

It uses the modules that are exported and the checkpoint's own values; that those modules compute what transformers and
DiffSynth compute is what the parity tests show.
"""

from collections.abc import Iterator

import numpy as np
import torch
from numpy.typing import NDArray

from ..specs import AdapterSpec
from .checkpoints import Checkpoint, CheckpointReader
from .graphs import stored_tensors
from .modules import graph_modules
from .packs import prepared_weights, source_keys
from .precision import precision_for
from .weights import graph_weights, plan_steps

Array = NDArray[np.float32]


@torch.inference_mode()
def reference_steps(checkpoint: Checkpoint, activation: Array) -> Iterator[tuple[str, dict[str, Array]]]:
    """Every step's outputs: ``(step name, output name -> array)``.

    Args:
        checkpoint: any of the three models.
        activation: pixels ``[B, 3, S, S]``, or for the adapter embeddings ``[B, embedding]``.
    """
    exact = precision_for("fp32", checkpoint.spec)
    weights = graph_weights(checkpoint.spec)
    modules = graph_modules(checkpoint.spec, exact)
    x = torch.from_numpy(np.ascontiguousarray(activation))
    reader = CheckpointReader(checkpoint)
    for step in (step for group in plan_steps(checkpoint.spec) for step in group):
        values: dict[str, list[torch.Tensor]] = {}
        for name, piece in prepared_weights(reader, step, weights[step.graph], exact):
            values.setdefault(name, []).append(piece.flatten())
        shapes = {name: shape for name, _, shape in stored_tensors(weights[step.graph], exact)}
        joined = {name: torch.cat(pieces).view(shapes[name]) for name, pieces in values.items()}
        del values
        reader.release(source_keys(step, weights[step.graph]))
        outputs = modules[step.graph](x, joined)
        if isinstance(checkpoint.spec, AdapterSpec):
            yield step.name, {name: y.numpy() for name, y in outputs.items()}
        else:
            x = outputs
            yield step.name, {"embedding" if step.graph.endswith(".head") else "hidden_out": x.numpy()}
