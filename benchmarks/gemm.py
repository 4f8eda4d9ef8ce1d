"""Where does an encoder block spend its time, and how near are its linears to this machine's int8 peak?

The peak is measured here, on the same shapes: `MatMulInteger` with constant matrices, which onnxruntime packs once when
the session is made. As in the encoders every product has a matrix of its own, so that none is still in the cache. Ours
is the time inside `DynamicQuantizeMatMul`, of onnxruntime's own profile of the block's graph, with the weights as graph
inputs; it includes quantising the input. Prints one JSON line.
Usage: python benchmarks/gemm.py --engines DIR (int8) [--threads N]
"""

import argparse
import json
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort
from onnx import TensorProto, helper, numpy_helper

from i2l.engines.cpu.backend import CpuBackend
from i2l.engines.directory.manifest import Manifest, Model, read_manifest
from i2l.machine.threads import default_threads
from i2l.specs import EncoderSpec

PASSES = 12
"""Runs of a block; the first ones warm up."""
WARM_UP = 4
MATRICES = 4
"""Of each shape: together larger than the last-level cache, as the blocks' are."""
KERNEL = "_kernel_time"


def main() -> None:
    """Profile a block of each encoder and measure the peak on its shapes."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--engines", type=Path, required=True)
    parser.add_argument("--threads", type=int, default=default_threads())
    arguments = parser.parse_args()
    manifest = read_manifest(arguments.engines)
    facts = {}
    for family in ("siglip2", "dinov3"):
        model = manifest.models[family]
        operators = block_profile(arguments.engines, manifest, model, arguments.threads)
        peak = sum(peak_ms(rows, *shape, arguments.threads) for rows, shape in linear_shapes(model))
        facts[family] = {
            "blocks": len(block_steps(model)),
            "block_ms": round(sum(operators.values()), 2),
            "operators_ms": {name: round(ms, 2) for name, ms in operators.most_common(12)},
            "linears_at_peak_ms": round(peak, 2),
            "fraction_of_peak": round(peak / operators["DynamicQuantizeMatMul"], 3),
        }
    print(json.dumps(facts))


def linear_shapes(model: Model) -> list[tuple[int, tuple[int, int]]]:
    """``(rows, (in_features, out_features))`` of the matrices of one block, for one image."""
    assert isinstance(model.spec, EncoderSpec)
    (step, *_) = block_steps(model)
    panels = [i.shape for n, i in model.tensors.items() if n.startswith(f"{step.name}.") and i.dtype == "I8"]
    return [(model.spec.tokens, (width, count * panel)) for count, width, panel in panels]


def block_steps(model: Model) -> list:
    """The steps of the encoder's blocks."""
    return [step for chunk in model.chunks for step in chunk.steps if step.graph.endswith(".block")]


def block_profile(engines: Path, manifest: Manifest, model: Model, threads: int) -> Counter[str]:
    """Milliseconds per operator of one run of a block, each run with another block's weights."""
    spec = model.spec
    assert isinstance(spec, EncoderSpec)
    steps = block_steps(model)
    with tempfile.TemporaryDirectory() as folder:
        session = profiled(engines / manifest.build / manifest.graphs[steps[0].graph], threads, folder)
        pack = CpuBackend(engines, manifest).store(spec.family)
        x = np.random.default_rng(0).standard_normal((1, spec.tokens, spec.hidden)).astype(np.float32)
        feed = {session.get_inputs()[0].name: ort.OrtValue.ortvalue_from_numpy(x)}
        for index in range(PASSES):
            weights = pack.weights(steps[index % min(len(steps), WARM_UP)])
            session.run_with_ort_values(["hidden_out"], feed | dict(weights))
        kernels = kernel_events(session)
    kernels = kernels[len(kernels) * WARM_UP // PASSES :]
    totals: Counter[str] = Counter()
    for event in kernels:
        totals[event["args"]["op_name"]] += event["dur"] / 1e3 / (PASSES - WARM_UP)
    return totals


def profiled(graph: Path, threads: int, folder: str) -> ort.InferenceSession:
    """A session of a graph that writes a profile into the folder."""
    options = ort.SessionOptions()
    options.intra_op_num_threads = threads
    options.enable_profiling = True
    options.profile_file_prefix = f"{folder}/{graph.stem}"
    return ort.InferenceSession(str(graph), options, providers=["CPUExecutionProvider"])


def kernel_events(session: ort.InferenceSession) -> list[dict[str, Any]]:
    """What its profile says of the operators' kernels, in the order in which they ran; ends the profile."""
    events = json.loads(Path(session.end_profiling()).read_text(encoding="utf-8"))
    return [event for event in events if event.get("cat") == "Node" and event["name"].endswith(KERNEL)]


def peak_ms(rows: int, in_features: int, out_features: int, threads: int) -> float:
    """Milliseconds of the plain int8 product with a constant, packed matrix: the best of some."""
    generator = np.random.default_rng(0)
    names = [str(index) for index in range(MATRICES)]
    matrices = [generator.integers(-127, 128, (in_features, out_features), np.int8) for _ in names]
    graph = helper.make_graph(
        [helper.make_node("MatMulInteger", ["x", f"matrix.{name}", "zero_point"], [f"y.{name}"]) for name in names],
        "peak",
        [helper.make_tensor_value_info("x", TensorProto.UINT8, [rows, in_features])],
        [helper.make_tensor_value_info(f"y.{name}", TensorProto.INT32, [rows, out_features]) for name in names],
        [
            *(numpy_helper.from_array(m, f"matrix.{name}") for m, name in zip(matrices, names, strict=True)),
            numpy_helper.from_array(np.array(128, np.uint8), "zero_point"),
        ],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)
    options = ort.SessionOptions()
    options.intra_op_num_threads = threads
    session = ort.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    x = ort.OrtValue.ortvalue_from_numpy(generator.integers(0, 256, (rows, in_features), np.uint8))
    binding = session.io_binding()
    binding.bind_ortvalue_input("x", x)
    for name in names:
        y = ort.OrtValue.ortvalue_from_numpy(np.zeros((rows, out_features), np.int32))
        binding.bind_ortvalue_output(f"y.{name}", y)
    best = float("inf")
    for _ in range(PASSES):
        start = time.perf_counter()
        session.run_with_iobinding(binding)
        best = min(best, time.perf_counter() - start)
    return best * 1e3 / MATRICES


if __name__ == "__main__":
    main()
