"""The backends of a GPU: parity with the CPU, bandwidth, times, VRAM, prediction, kernels. One command.

Makes synthetic checkpoints and engines in the work folder if they are not there. Without a GPU it says why and ends.
A backend behind a plugin provider, such as webgpu, counts no bytes on the card and copies from pageable memory: what it
uploads in a second stands in the place of the pinned bandwidth.
Usage: python benchmarks/gpu.py --preset tiny|small|full [--backend NAME] [--precision int8|fp8] [--work DIR]
       [--json FILE]
"""

import argparse
import json
import statistics
import time
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from i2l.engines.backends import BACKENDS, detect_backends
from i2l.engines.base import Array
from i2l.engines.device.backend import DeviceBackend
from i2l.engines.device.card import CudaDevice
from i2l.engines.device.predict import Card, predict
from i2l.engines.device.residency import Planned
from i2l.engines.plugin.backend import PluginBackend
from i2l.engines.tensorrt.backend import TensorRTBackend
from i2l.engines.tensorrt.layers import products
from i2l.engines.tensorrt.library import current_sm
from i2l.errors import BudgetTooSmall, I2LError
from i2l.export.backends.cuda import build_cuda_graphs
from i2l.export.backends.tensorrt import build_plans
from i2l.export.build import build_engines
from i2l.export.checkpoints.synthetic import make_checkpoints
from i2l.look.verification import step_error
from i2l.lora.lora import Lora
from i2l.runtime.pipeline import Pipeline
from i2l.runtime.streamer import stream

IMAGE = Path(__file__).parent.parent / "docs" / "photo.jpg"
BUDGETS_GIB = {"tiny": (), "small": (), "full": (2, 4, 8)}
"""Beside the smallest that works and all that is free."""
IMAGES = (1, 4, 8)
CALLS = 5
"""The median counts; one call before warms up."""
TFLOPS = 400.0
"""For the prediction: half of what an H100 reached in one large bfloat16 product."""


def main() -> None:
    """Measure in the order of what is most worth knowing; every finished part is written at once."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--preset", choices=sorted(BUDGETS_GIB), default="small")
    parser.add_argument(
        "--backend", choices=[name for name in BACKENDS if name != "cpu"], help="by default each that works"
    )
    parser.add_argument("--precision", choices=["int8", "fp8"], default="int8")
    parser.add_argument("--work", type=Path, default=Path("bench"), help="scratch folder; what is in it is reused")
    parser.add_argument("--json", type=Path, default=Path("gpu.json"), help="where the facts go")
    arguments = parser.parse_args()
    statuses = {status.name: status for status in detect_backends() if status.name != "cpu"}
    backends = [arguments.backend] if arguments.backend else list(statuses)
    facts: dict[str, Any] = {"preset": arguments.preset, "precision": arguments.precision}
    for backend in backends:
        facts[backend] = {}
        if not statuses[backend].works:
            facts[backend]["not measured"] = statuses[backend].reason
            print(f"{backend}: {statuses[backend].reason}")
            continue
        try:
            for name, value in measured(backend, arguments.preset, arguments.precision, arguments.work):
                facts[backend][name] = value
                print(f"{backend}: {name}: {json.dumps(value)}", flush=True)
                arguments.json.write_text(json.dumps(facts), encoding="utf-8")
        except I2LError as error:  # the other backend may do better
            facts[backend]["stopped by"] = str(error)
            print(f"{backend}: {error}")
            arguments.json.write_text(json.dumps(facts), encoding="utf-8")


def measured(name: str, preset: str, precision: str, work: Path) -> Iterator[tuple[str, Any]]:
    """``(what, facts)`` of every part of a backend."""
    start = time.perf_counter()
    engines = prepared(name, preset, precision, work)
    yield "prepare_seconds", round(time.perf_counter() - start, 1)
    with Pipeline(engines, backend="cpu") as cpu:
        pixels = cpu.pixels([IMAGE])
        stages: dict[str, Array] = {}
        cpu.embed_pixels(pixels, observe=lambda step, outputs: stages.update({step: next(iter(outputs.values()))}))
        wanted = cpu.lora_from_images([IMAGE])
    start = time.perf_counter()
    with Pipeline(engines, backend=name) as pipeline:
        yield "open_seconds_at_first", round(time.perf_counter() - start, 2)  # TensorRT-RTX compiles
        backend = planned_backend(pipeline)
        yield "device", backend.device.name
        errors: dict[str, float] = {}

        def compare(step: str, outputs: dict[str, Array]) -> None:
            errors[step] = step_error(step, next(iter(outputs.values())), stages[step]).relative_error

        pipeline.embed_pixels(pixels, observe=compare)
        yield "stage_errors", errors
        if isinstance(backend, PluginBackend):
            bandwidth = upload_bandwidth(backend)
            yield "upload_gbps", bandwidth / 1e9
        else:
            bandwidth = pinned_bandwidth(backend.device)
            yield "pinned_gbps", bandwidth / 1e9
            yield "pinning_gbps", pinning_speed(backend.device) / 1e9
        first = pipeline.lora_from_images([IMAGE])
        if isinstance(backend, TensorRTBackend):
            yield "products", kernels(backend, work)
    for budget, budget_bytes in budgets(name, preset, engines):
        start = time.perf_counter()
        with Pipeline(engines, backend=name, vram_budget_bytes=budget_bytes) as pipeline:
            open_seconds = time.perf_counter() - start
            lora = pipeline.lora_from_images([IMAGE])
            backend = planned_backend(pipeline)
            if isinstance(backend, DeviceBackend):
                backend.device.keep_on_host((), 0)
            ring = streaming_bandwidth(pipeline)
            if isinstance(backend, DeviceBackend):
                backend.keep_on_host()
            images = {count: timed(pipeline, count, bandwidth) for count in IMAGES}
            yield (
                budget,
                {
                    "open_seconds": round(open_seconds, 2),
                    "lora_error": lora_error(lora, wanted),
                    "same_as_unlimited": lora_error(lora, first) == 0,
                    "streaming_fraction_ring": ring / bandwidth,
                    "streaming_fraction": streaming_bandwidth(pipeline) / bandwidth,
                    "images": images,
                    **(pipeline.vram or {}),
                },
            )


def prepared(backend: str, preset: str, precision: str, work: Path) -> Path:
    """The engines with what a backend needs of them, made of synthetic checkpoints where they are not there."""
    models, engines = work / preset, work / f"{preset}-{precision}"
    if not (engines / "manifest.json").is_file():
        if not models.is_dir():
            make_checkpoints(models, preset)
        build_engines(models, engines, precision=precision)
    if backend == "cuda":
        build_cuda_graphs(engines)
    elif backend == "tensorrt":
        build_plans(engines, [current_sm()])
    return engines


def kernels(backend: TensorRTBackend, work: Path) -> dict[str, Any]:
    """``graph -> products by the type of their operands``; what the inspector said goes to files, for reading."""
    found = {}
    for graph, engine in backend.opened.items():
        layers = engine.layers
        (work / f"layers-{graph}.json").write_text(layers, encoding="utf-8")
        found[graph] = asdict(products(layers))
    return found


def budgets(backend: str, preset: str, engines: Path) -> Iterator[tuple[str, int | None]]:
    """The smallest budget that works, the preset's, and all."""
    try:
        Pipeline(engines, backend=backend, vram_budget_bytes=1).close()
    except BudgetTooSmall as error:
        yield "smallest", error.needed_bytes
    yield from ((f"{size} GiB", size << 30) for size in BUDGETS_GIB[preset])
    yield "unlimited", None


def planned_backend(pipeline: Pipeline) -> Any:
    """The backend behind a pipeline, with its device at hand."""
    backend: Any = pipeline._backend  # noqa: SLF001 - what is measured is behind the pipeline
    assert isinstance(backend, Planned)
    return backend


def settle(backend: Any) -> None:
    """Wait until the device has done all that was asked for."""
    if isinstance(backend, DeviceBackend):
        backend.device.finish()
    else:
        backend.array(backend.value(np.zeros((1, 1), np.float32)))


def upload_bandwidth(backend: PluginBackend, nbytes: int = 64 << 20, copies: int = 8) -> float:
    """Bytes per second of copies of a value, each waited for."""
    array = np.ones(nbytes, np.uint8)
    value = backend.device.allocate(np.uint8, array.shape)
    start = time.perf_counter()
    for _ in range(copies):
        backend.device.write(value, array)
        backend.device.settle()
    return copies * nbytes / (time.perf_counter() - start)


def pinned_bandwidth(device: CudaDevice, nbytes: int = 256 << 20) -> float:
    """Bytes per second of plain copies from pinned memory."""
    address = device.allocate(nbytes)
    try:
        return device.pinned_rate(address, nbytes)
    finally:
        device.free(address)


def pinning_speed(device: CudaDevice, nbytes: int = 1 << 30) -> float:
    """Bytes per second that become pinned: what a cache of chunks costs once."""
    start = time.perf_counter()
    address = device._call("cuMemAllocHost", nbytes)  # noqa: SLF001
    seconds = time.perf_counter() - start
    device._call("cuMemFreeHost", address)  # noqa: SLF001
    return nbytes / seconds


def streaming_bandwidth(pipeline: Pipeline) -> float:
    """Bytes per second of DINOv3's streamed chunks, nothing computed; 0 where all stay."""
    backend = planned_backend(pipeline)
    store, chunks = backend.store("dinov3"), pipeline.manifest.models["dinov3"].chunks
    nbytes = sum(chunk.nbytes for chunk in chunks if chunk not in store.resident)
    settle(backend)
    start = time.perf_counter()
    for _ in stream(store, chunks):
        pass
    settle(backend)
    return float(nbytes / (time.perf_counter() - start))


def timed(pipeline: Pipeline, images: int, bandwidth: float) -> dict[str, float]:
    """Milliseconds per image of the models, reading the picture left out, beside the prediction."""
    seconds = []
    for _ in range(CALLS + 1):
        pipeline.lora_from_images([IMAGE] * images)
        stages = pipeline.timings.seconds
        seconds.append(sum(stages[family] for family in ("siglip2", "dinov3", "adapter")))
    residency = planned_backend(pipeline).residency
    predicted = predict(pipeline.manifest.models, residency, Card(bandwidth / 1e9, TFLOPS), images)
    return {
        "ms_per_image": 1000 * statistics.median(seconds[1:]) / images,
        "predicted_ms_per_image": 1000 * predicted.seconds_per_image,
    }


def lora_error(found: Lora, wanted: Lora) -> float:
    """The largest relative difference of ``B @ A`` over all modules, from the factors' Gram matrices."""
    return max(product_difference(found.factors[name], factors) for name, factors in wanted.factors.items())


def product_difference(found: tuple[Array, Array], wanted: tuple[Array, Array]) -> float:
    """``|Y X - B A| / |B A|`` without forming the products."""
    (x, y), (a, b) = ((f[0].astype(np.float64), f[1].astype(np.float64)) for f in (found, wanted))
    if np.array_equal(x, a) and np.array_equal(y, b):
        return 0.0
    left, right = np.concatenate([y, -b], axis=1), np.concatenate([x, a], axis=0)
    difference = np.sum((left.T @ left) * (right @ right.T))
    return float(np.sqrt(max(difference, 0.0) / np.sum((b.T @ b) * (a @ a.T))))


if __name__ == "__main__":
    main()
