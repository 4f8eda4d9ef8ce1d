"""What a step must give, against onnxruntime over the same packs and graphs that only dequantise."""

from typing import Any

import numpy as np
import onnxruntime as ort
import pytest
import torch
from toy_backend import ToyEngine, ToyStore

from conftest import MakeEngines, graphs_once
from i2l.engines.cpu.plain import held_weights, plain_step
from i2l.engines.directory.manifest import read_manifest
from i2l.export.precisions.choosing import cuda_precision
from i2l.runtime.proof.activations import seeded_activation
from i2l.runtime.proof.judging import first_steps, worst_error


@pytest.mark.parametrize("precision", ["fp32", "int8", "bf16", "fp8"])
def test_every_kind_of_step_is_what_its_graph_computes(engines: MakeEngines, precision: str) -> None:
    """int8 has no such graph among the CPU's, which round activations: those for a card, in float32."""
    directory = engines("tiny", precision)
    manifest = read_manifest(directory)
    build = directory / manifest.build
    graphs = {name: (build / path).read_bytes() for name, path in manifest.graphs.items()}
    if precision == "int8":
        for model in manifest.models.values():
            form: Any = cuda_precision("int8", model.spec, torch.float32)  # frozen, so it has a hash
            graphs |= {name: graph.SerializeToString() for name, graph in graphs_once(model.spec, form)}
    for model in manifest.models.values():
        for step in first_steps(model):
            activation = seeded_activation(model.spec, step.graph, images=2)
            found = plain_step(model.spec, step.graph, activation, held_weights(build / model.pack, model, step))
            values = ToyStore(build / model.pack, model).weights(step)
            wanted = ToyEngine(graphs[step.graph]).run(ort.OrtValue.ortvalue_from_numpy(activation), values)
            arrays = {name: np.asarray(value.numpy()) for name, value in wanted.items()}
            error = worst_error(model.spec, activation, found, arrays)
            assert error < 2e-5, (step.graph, error)  # 4e-6 observed, of dinov3.block
