"""The contenders of peers.py: each makes the same encoder blocks runnable, `hidden_in -> hidden_out`, float32 arrays.

The peers get every advantage that a library offers: weights are constants, packed when the block is loaded, and stay in
memory; what is calibrated is calibrated with the very input that is measured. i2l runs as it always does: weights are
inputs in a mapped file, brought in and given back around every block.

peer_files.py writes what the peers load. Run as a script, this file is one contender in a process of its own and prints
one JSON line. Usage: python benchmarks/contenders.py NAME --models DIR --engines DIR --work DIR
"""

import argparse
import json
import os
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import TypeAlias

import numpy as np
import onnxruntime as ort
from numpy.typing import NDArray

from i2l.engines.cpu.backend import CpuBackend
from i2l.engines.directory.manifest import read_manifest
from i2l.machine.threads import default_threads
from i2l.specs import Family

Array: TypeAlias = NDArray[np.float32]
Block: TypeAlias = Callable[[Array], Array]
BLOCKS: dict[Family, int] = {"siglip2": 4, "dinov3": 2}
"""The first blocks of each encoder take turns, so that no weights are still in the cache: 113 and 336 MB in int8."""
SECONDS = 2.0
"""Time for the timed passes of a process, at least two over all blocks."""


def main() -> None:
    """Run one contender: milliseconds of a block and errors, by encoder."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("name", choices=CONTENDERS)
    for option in ("--models", "--engines", "--work"):
        parser.add_argument(option, type=Path, required=True)
    arguments = parser.parse_args()
    load = CONTENDERS[arguments.name]
    print(json.dumps({family: measure(load(arguments, family), arguments.work, family) for family in BLOCKS}))


def measure(blocks: Sequence[Block], work: Path, family: Family) -> dict[str, float] | None:
    """The median pass, and the largest error of a block; None where the CPU has no such arithmetic."""
    if not blocks:
        return None
    inputs, exact = (np.load(work / f"{family}.{name}.npy") for name in ("inputs", "outputs"))
    outputs = [block(x) for block, x in zip(blocks, inputs, strict=True)]  # the warm-up
    errors = [np.linalg.norm(y - e) / np.linalg.norm(e) for y, e in zip(outputs, exact, strict=True)]
    added = [np.linalg.norm(y - e) / np.linalg.norm(e - x) for y, e, x in zip(outputs, exact, inputs, strict=True)]
    seconds: list[float] = []
    cpu_seconds: list[float] = []
    while len(seconds) < 2 * len(blocks) or sum(seconds) < SECONDS:
        index = len(seconds) % len(blocks)
        start, cpu_start = time.perf_counter(), time.process_time()
        blocks[index](inputs[index])
        seconds.append(time.perf_counter() - start)
        cpu_seconds.append((time.process_time() - cpu_start) / default_threads())
    return {
        "block_ms": statistics.median(seconds) * 1e3,
        "cpu_ms": statistics.median(cpu_seconds) * 1e3,
        "error": float(max(errors)),
        "error_of_what_is_added": float(max(added)),
    }


def i2l_int8(arguments: argparse.Namespace, family: Family) -> list[Block]:
    """Our runtime: one session, another block's weights for each pass, streamed through the mapped pack."""
    manifest = read_manifest(arguments.engines)
    backend = CpuBackend(arguments.engines, manifest)
    store, engine = backend.store(family), backend.engine(f"{family}.block")
    chunks = [chunk for chunk in manifest.models[family].chunks if chunk.steps[0].graph == f"{family}.block"]

    def block(index: int, x: Array) -> Array:
        chunk = chunks[index]
        (step, *more) = chunk.steps
        assert not more, "a chunk of the CPU's packs is one block"
        store.prefetch(chunk)
        store.acquire(chunk)
        (y,) = engine.run(backend.value(x), store.weights(step)).values()
        store.release(chunk)
        return backend.array(y)

    return [partial(block, index) for index in range(BLOCKS[family])]


def torch_blocks(dtype: str, *, int8: bool = False) -> Callable[[argparse.Namespace, Family], list[Block]]:
    """Torch, eager."""

    def load(arguments: argparse.Namespace, family: Family) -> list[Block]:
        import torch

        from peer_files import torch_layers

        layers, _, _ = torch_layers(arguments.models, family, dtype)
        if int8:
            per_channel = {torch.nn.Linear: torch.ao.quantization.per_channel_dynamic_qconfig}
            layers = [torch.ao.quantization.quantize_dynamic(layer, per_channel) for layer in layers]

        @torch.inference_mode()
        def block(index: int, x: Array) -> Array:
            y: Array = layers[index](torch.from_numpy(x).to(getattr(torch, dtype))).float().numpy()
            return y

        return [partial(block, index) for index in range(len(layers))]

    return load


def onnxruntime_blocks(form: str) -> Callable[[argparse.Namespace, Family], list[Block]]:
    """Onnxruntime with constant weights, which it packs when the session is made."""

    def load(arguments: argparse.Namespace, family: Family) -> list[Block]:
        options = ort.SessionOptions()
        options.intra_op_num_threads = default_threads()
        options.log_severity_level = 3
        paths = [str(arguments.work / f"{family}.{index}.{form}.onnx") for index in range(BLOCKS[family])]
        sessions = [ort.InferenceSession(path, options, providers=["CPUExecutionProvider"]) for path in paths]

        def block(index: int, x: Array) -> Array:
            y: Array = sessions[index].run(None, {"hidden": x})[0]
            return y

        return [partial(block, index) for index in range(len(sessions))]

    return load


def openvino_blocks(form: str, precision: str = "f32", group: int = 0) -> Callable[..., list[Block]]:
    """OpenVINO, for one answer at a time; `group`: activations are quantised in groups of so many channels."""

    def load(arguments: argparse.Namespace, family: Family) -> list[Block]:
        import openvino as ov

        core = ov.Core()
        if precision == "bf16" and "BF16" not in core.get_property("CPU", "OPTIMIZATION_CAPABILITIES"):
            return []
        properties = {
            "PERFORMANCE_HINT": "LATENCY",
            "INFERENCE_NUM_THREADS": default_threads(),
            "INFERENCE_PRECISION_HINT": precision,
            "DYNAMIC_QUANTIZATION_GROUP_SIZE": group,
        }
        paths = [arguments.work / f"{family}.{index}.{form}.xml" for index in range(BLOCKS[family])]
        models = [core.compile_model(path, "CPU", properties) for path in paths]

        def block(index: int, x: Array) -> Array:
            y: Array = models[index](x)[0]
            return y

        return [partial(block, index) for index in range(len(models))]

    return load


CONTENDERS: dict[str, Callable[[argparse.Namespace, Family], list[Block]]] = {
    "i2l int8": i2l_int8,
    "torch BF16": torch_blocks("bfloat16"),
    "torch FP32": torch_blocks("float32"),
    "torch int8, dynamic": torch_blocks("float32", int8=True),
    "onnxruntime FP32": onnxruntime_blocks("fp32"),
    "onnxruntime W8A8, dynamic": onnxruntime_blocks("s8"),
    "onnxruntime W8A8, dynamic, unsigned": onnxruntime_blocks("u8"),
    "OpenVINO FP32": openvino_blocks("fp32"),
    "OpenVINO BF16": openvino_blocks("fp32", "bf16"),
    "OpenVINO int8 weights": openvino_blocks("weights"),
    "OpenVINO int8 weights, dynamic": openvino_blocks("weights", group=128),
    "OpenVINO W8A8, calibrated": openvino_blocks("w8a8"),
}


if __name__ == "__main__":
    main()
    sys.stdout.flush()
    os._exit(0)  # some peers crash while they are taken down
