"""The float32 torch reference, one step at a time, so that it also runs at full size in a few GB.

It uses the modules that are exported and the checkpoint's own values; that those modules compute what transformers and
DiffSynth compute is what the parity tests show.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence

import numpy as np
import torch
from numpy.typing import NDArray

from ..specs import AdapterSpec
from .checkpoints.reader import stream_tensors
from .checkpoints.recognise import Checkpoint
from .checkpoints.weights import Matrix, Step, Weight, graph_weights, plan_steps
from .graphs.modules import graph_modules
from .packs.packs import source_keys
from .packs.stack import Stack
from .precisions.choosing import precision_for

Array = NDArray[np.float32]


@torch.inference_mode()
def reference_steps(
    checkpoint: Checkpoint, activation: Array, cast: Callable[[torch.Tensor], torch.Tensor] = torch.Tensor.float
) -> Iterator[tuple[str, dict[str, Array]]]:
    """Every step's outputs: ``(step name, output name -> array)``.

    Args:
        checkpoint: any of the three models.
        activation: pixels ``[B, 3, S, S]``, or for the adapter embeddings ``[B, embedding]``.
        cast: what happens to every weight; the dtype that it gives is the one that is computed in.
    """
    exact = precision_for("fp32", checkpoint.spec)
    weights = graph_weights(checkpoint.spec)
    dtype = cast(torch.zeros(1)).dtype
    modules = {name: module.to(dtype) for name, module in graph_modules(checkpoint.spec, exact).items()}
    x = torch.from_numpy(np.ascontiguousarray(activation)).to(dtype)
    steps = [step for group in plan_steps(checkpoint.spec) for step in group]
    groups = [source_keys(step, weights[step.graph]) for step in steps]
    for step, tensors in zip(steps, stream_tensors(checkpoint, groups), strict=True):
        outputs = modules[step.graph](x, step_values(tensors, step, weights[step.graph], cast))
        if isinstance(checkpoint.spec, AdapterSpec):
            yield step.name, {name: y.float().numpy() for name, y in outputs.items()}
        else:
            x = outputs
            yield step.name, {"embedding" if step.graph.endswith(".head") else "hidden_out": x.float().numpy()}


def step_values(
    tensors: Mapping[str, torch.Tensor],
    step: Step,
    weights: Sequence[Weight],
    cast: Callable[[torch.Tensor], torch.Tensor] = torch.Tensor.float,
) -> dict[str, torch.Tensor]:
    """The weights of a step as its float32 graph takes them."""
    stacks = {weight.name: (weight, Stack.of(tensors, step, weight)) for weight in weights}
    values = {}
    for name, (weight, stack) in stacks.items():
        whole = cast(stack.rows(0, stack.shape[0]))
        if isinstance(weight, Matrix):
            values[f"{name}.weight"] = whole
        else:
            values[name] = whole.view(weight.shape)
    return values
