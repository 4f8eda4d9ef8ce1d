"""How near is the adapter to the speed of memory? One pass reads all its weights once and computes next to nothing.

Reading is measured here, in the same process, with as many threads, on the same mapped file, all of it in memory:
every byte goes through an XOR, which no core does slower than memory delivers. A pass may not be faster; what it
takes beyond that is onnxruntime's operators, of its own profile below, and the runtime around them: bringing chunks
in, giving them back, and copying the factors out. Reading and passes take turns; on a busy machine compare CPU times.
Prints one JSON line.
Usage: python benchmarks/adapter.py --engines DIR
"""

import argparse
import json
import statistics
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import numpy as np
import onnxruntime as ort

from gemm import kernel_events, profiled
from i2l.engines.cpu.backend import CpuBackend
from i2l.engines.directory.manifest import Manifest, read_manifest
from i2l.machine.platforms.mapping import open_mapped, populate
from i2l.machine.threads import default_threads
from i2l.runtime.pipeline import open_engines
from i2l.runtime.streamer import stream
from i2l.specs import AdapterSpec

ROUNDS = 9
PIECE_BYTES = 8 << 20
IMAGES = (1, 4)


def main() -> None:
    """Time reading and passes in turn, then profile the passes."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--engines", type=Path, required=True)
    engines = parser.parse_args().engines
    manifest = read_manifest(engines)
    model = manifest.models["adapter"]
    assert isinstance(model.spec, AdapterSpec)
    shapes = {images: (images, model.spec.embedding) for images in IMAGES}
    embeddings = {n: np.random.default_rng(0).standard_normal(shape, np.float32) for n, shape in shapes.items()}
    mapped = open_mapped(engines / manifest.build / model.pack)
    first, nbytes = model.chunks[0].offset, sum(chunk.nbytes for chunk in model.chunks)
    populate(mapped, first, nbytes)
    words = np.frombuffer(mapped, np.uint64, nbytes // 8, first)
    pieces = [words[start : start + PIECE_BYTES // 8] for start in range(0, len(words), PIECE_BYTES // 8)]
    seconds: dict[str, list[tuple[float, float]]] = {}
    with ThreadPoolExecutor(default_threads()) as threads, open_engines(engines, backend="cpu") as pipeline:
        calls: dict[str, Callable[[], object]] = {
            "reading": lambda: list(threads.map(np.bitwise_xor.reduce, pieces)),
            **{f"images_{images}": partial(pipeline.factors, batch) for images, batch in embeddings.items()},
        }
        for _ in range(ROUNDS + 1):
            for name, call in calls.items():
                start, cpu_start = time.perf_counter(), time.process_time()
                call()
                cpu_seconds = (time.process_time() - cpu_start) / default_threads()
                seconds.setdefault(name, []).append((time.perf_counter() - start, cpu_seconds))
    middle = {name: statistics.median(value for value, _ in values[1:]) for name, values in seconds.items()}
    cpu = {name: statistics.median(value for _, value in values[1:]) for name, values in seconds.items()}
    facts = {
        "bytes": nbytes,
        "threads": default_threads(),
        "reading_gb_per_second": round(nbytes / middle["reading"] / 1e9, 2),
        "seconds": {name: round(value, 4) for name, value in middle.items()},
        "times_reading": {name: round(value / middle["reading"], 2) for name, value in middle.items()},
        "cpu_seconds_by_thread": {name: round(value, 4) for name, value in cpu.items()},
        "cpu_times_reading": {name: round(value / cpu["reading"], 2) for name, value in cpu.items()},
        "operators_ms": {n: operators_ms(engines, manifest, batch) for n, batch in embeddings.items()},
    }
    print(json.dumps(facts))


def operators_ms(engines: Path, manifest: Manifest, embeddings: np.ndarray) -> dict[str, float]:
    """Milliseconds per operator of one pass by one thread; the first of two warms up."""
    chunks = manifest.models["adapter"].chunks
    backend = CpuBackend(engines, manifest)
    totals: Counter[str] = Counter()
    with tempfile.TemporaryDirectory() as folder:
        graphs = {step.graph for chunk in chunks for step in chunk.steps}
        paths = {graph: engines / manifest.build / manifest.graphs[graph] for graph in graphs}
        sessions = {graph: profiled(path, 1, folder) for graph, path in paths.items()}
        value = ort.OrtValue.ortvalue_from_numpy(embeddings)
        for _ in range(2):
            for step, weights in stream(backend.store("adapter"), chunks):
                session = sessions[step.graph]
                names = [output.name for output in session.get_outputs()]
                session.run_with_ort_values(names, {session.get_inputs()[0].name: value, **weights})
        for session in sessions.values():
            events = kernel_events(session)
            for event in events[len(events) // 2 :]:
                totals[event["args"]["op_name"]] += event["dur"] / 1e3
    backend.close()
    return {name: round(ms, 2) for name, ms in totals.most_common()}


if __name__ == "__main__":
    main()
