"""The cuda backend on onnxruntime's real CUDA provider: what test_provider.py runs in an environment of its own.

The provider launches nothing (cudart.c), so the LoRAs are noise. For each case one line of JSON: what was planned, what
lay on the card, what was copied and launched, where the nodes went. Each case has a process of its own, forked before
onnxruntime is imported: a failure leaves nothing for the next one.

    LD_LIBRARY_PATH=folder PYTHONPATH=.typecheck python provider_run.py ENGINES '[{"passes": [1, 4]}]'
"""

import ctypes
import hashlib
import json
import os
import signal
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from i2l.engines.base import Array, Limits
from i2l.engines.device.backend import DeviceBackend
from i2l.engines.directory.manifest import Manifest
from i2l.errors import BudgetTooSmall, I2LError
from i2l.runtime import opening
from i2l.runtime.pipeline import Pipeline
from i2l.runtime.proof.choice import Chosen

EACH_PASS = (
    "copies", "copied_bytes", "uploaded_bytes", "pageable_copies", "launches", "graph_launches", "calls", "inside_ns",
)  # fmt: skip
COUNTED = ("problems", "live_bytes", "peak_bytes", "pinned_bytes", "pinned_peak_bytes", "allocations", *EACH_PASS)
HANGS_SECONDS = 120


class Driver:
    """The stand-in's counters."""

    def __init__(self) -> None:
        self._library = ctypes.CDLL("libcuda.so.1")

    def seen(self) -> dict[str, int]:
        counts = {}
        for name in COUNTED:
            function = getattr(self._library, f"standin_{name}")
            function.restype = ctypes.c_ulong
            counts[name] = int(function())
        return counts


def run(engines: Path, driver: Driver, case: dict[str, Any]) -> dict[str, Any]:
    """Passes of so many images on one pipeline, each counted by itself."""
    facts: dict[str, Any] = {"passes": []}
    budget = case.get("budget_bytes")
    if budget is None:
        budget = least_budget(engines, case.get("backend", "cuda")) + case.get("spare_bytes", 0)
    facts["budget_bytes"] = budget
    pictures = [np.full((64, 64, 3), 40 * n, np.uint8) for n in range(1, 5)]
    begin = time.perf_counter()
    with Pipeline(engines, backend=case.get("backend", "cuda"), vram_budget_bytes=budget, threads=1) as pipeline:
        backend = pipeline._open.backend
        facts["open"] = driver.seen() | {"seconds": time.perf_counter() - begin}
        if function := case.get("copies_from_host"):
            copy_in_each_run(backend, function)
        for images in case["passes"]:
            pixels = pipeline.pixels(pictures[:images])
            before, begin = driver.seen(), time.thread_time()
            embeddings = pipeline.embed_pixels(pixels)
            embedded = time.thread_time() - begin - 1e-9 * (driver.seen()["inside_ns"] - before["inside_ns"])
            factors = pipeline.factors(embeddings)
            spent, after = time.thread_time() - begin, driver.seen()
            steps = {name: after[name] - before[name] for name in EACH_PASS}
            times = {"host_ms": 1e3 * spent - 1e-6 * steps["inside_ns"], "embed_ms": 1e3 * embedded}
            row = {"images": images, **times, "live_bytes": after["live_bytes"], "factors": digest(factors)}
            del factors  # as whoever saves each LoRA: its memory is used again
            facts["passes"].append(row | steps)
        if case.get("stranger"):
            facts |= stranger(engines, driver, backend)
        if isinstance(backend, DeviceBackend):
            plan = backend.residency
            facts |= {
                "card": backend.device.name,
                "parts": plan.parts,
                "streamed_bytes": plan.streamed_bytes,
                "least_bytes": plan.least_bytes,
                "values_bytes": backend._values_bytes,
            }
            if case.get("placement"):
                facts["elsewhere"] = elsewhere(backend._engines)
        facts["vram"] = pipeline.vram
        facts["backend"] = pipeline.backend_name
    return facts


def digest(factors: Mapping[str, tuple[Array, Array]]) -> str:
    """Equal for factors that are equal to the bit."""
    found = hashlib.sha256()
    for _, pair in sorted(factors.items()):
        for factor in pair:
            found.update(factor.tobytes())
    return found.hexdigest()


def copy_in_each_run(backend: Any, function: str) -> None:
    """As a library would that keeps arguments of its kernels on the host."""
    from i2l.engines.cuda.session import OrtDeviceEngine  # imports onnxruntime

    run, device = OrtDeviceEngine.run, backend.device
    pinned, undo = device._call("cuMemAllocHost", 256), backend.device.close

    def copying(self: Any, *arguments: Any) -> Any:
        outputs = run(self, *arguments)
        address = next(iter(outputs.values())).data_ptr()
        device._call(function, address, pinned, 256, device._streams["compute"])
        return outputs

    def close() -> None:
        device._call("cuMemFreeHost", pinned)
        undo()

    OrtDeviceEngine.run, device.close = copying, close  # type: ignore[assignment, method-assign]


def stranger(engines: Path, driver: Driver, backend: Any) -> dict[str, int]:
    """What a session of somebody else, who shares allocators too, takes of the card and of an open pipeline's arena."""
    import onnxruntime as ort  # here, so that it is not imported before the fork

    options = ort.SessionOptions()
    options.add_session_config_entry("session.use_env_allocators", "1")
    before = driver.seen()["live_bytes"]
    backend._arena.most_bytes = 0
    graph = next(engines.glob("cuda/*/dinov3.head.onnx"))
    session = ort.InferenceSession(graph, options, providers=["CUDAExecutionProvider"])
    shapes = {put.name: [size if isinstance(size, int) else 1 for size in put.shape] for put in session.get_inputs()}
    session.run(None, {name: np.zeros(shape, np.float32) for name, shape in shapes.items()})
    taken = driver.seen()["live_bytes"] - before
    del session
    return {"stranger_bytes": taken, "lent_bytes": backend._arena.most_bytes}


def elsewhere(engines: Mapping[str, Any]) -> list[str]:
    """Nodes that are not on the CUDA provider."""
    found = []
    for graph, engine in engines.items():
        for part in engine._session.get_provider_graph_assignment_info():
            if part.ep_name != "CUDAExecutionProvider":
                found += [f"{graph} {node.op_type} {node.name}" for node in part.get_nodes()]
    return found


def recording(make: Callable[[], Any]) -> Callable[[], Any]:
    """Options of sessions that note where each node went."""

    def options() -> Any:
        made = make()
        made.add_session_config_entry("session.record_ep_graph_assignment_info", "1")
        return made

    return options


def least_budget(engines: Path, backend: str) -> int:
    """What the smallest plan needs."""
    try:
        Pipeline(engines, backend=backend, vram_budget_bytes=1).close()
    except BudgetTooSmall as error:
        return error.needed_bytes
    raise AssertionError("one byte was enough")


def choose(path: Path, manifest: Manifest, backend: str, limits: Limits, *, prove: bool) -> Chosen:  # noqa: ARG001
    """``auto`` as after a proof."""
    return Chosen("cuda", "auto: proven") if backend == "auto" else Chosen(backend, "asked for")


def run_case(engines: Path, case: dict[str, Any]) -> dict[str, Any]:
    """One case's facts, or its error."""
    import onnxruntime as ort  # here: it has threads, which no fork takes along

    os.environ |= {f"I2L_STANDIN_{name}": str(value) for name, value in case.get("environment", {}).items()}
    opening.choose_backend = choose
    driver = Driver()
    if case.get("placement"):
        ort.SessionOptions = recording(ort.SessionOptions)
    try:
        facts = run(engines, driver, case)
    except I2LError as error:
        held = driver.seen()["live_bytes"]  # while somebody has the error, and with it the frames that it came through
        facts = {"error": type(error).__name__, "message": str(error), "held_bytes": held}
    return facts | {"after": driver.seen(), "providers": ort.get_available_providers()}


def main() -> None:
    engines, cases = Path(sys.argv[1]), json.loads(sys.argv[2])
    for case in cases:
        ours, its = os.pipe()
        child = os.fork()
        if not child:  # it ends as any process does: what libraries do then is seen, too
            signal.alarm(HANGS_SECONDS)
            with os.fdopen(its, "w") as line:
                json.dump(run_case(engines, case), line)
            return
        os.close(its)
        with os.fdopen(ours) as line:
            text = line.read()
        _, status = os.waitpid(child, 0)
        facts = json.loads(text or "{}") | {"ended": os.waitstatus_to_exitcode(status)}
        sys.stdout.write(f"{json.dumps(facts)}\n")
        sys.stdout.flush()


if __name__ == "__main__":
    main()
