"""The tensorrt backend on the stand-in driver: what tests/engines/standin/test_standin.py runs in a process of its own.

CudaDevice, slots, lanes and the pipeline are ours, cuda-bindings NVIDIA's; TensorRT is played, and its kernels compute
when the stand-in's stream comes to them. For each case one line of JSON: the LoRAs as hashes, and what the driver saw.

    LD_LIBRARY_PATH=folder-of-libcuda.so.1 python scenario.py ENGINES '[{"passes": [1, 2], "environment": {}}]'
"""

import hashlib
import itertools
import json
import logging
import os
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, nullcontext, suppress
from functools import cache, partial
from pathlib import Path
from typing import Any, TypeVar

sys.path.insert(0, str(Path(__file__).parents[2]))

import played_tensorrt
from driver_library import Driver
from planted_faults import GRAPH_MUTATIONS, MUTATIONS, put

from conftest import picture
from i2l.engines.base import Limits, Opened
from i2l.engines.device import backend as device_backend
from i2l.engines.device import which_card
from i2l.engines.device.pinned import copy_lane, kept
from i2l.engines.device.pinned.copy_lane import CopyLane
from i2l.engines.device.pinned.staging import Staging
from i2l.engines.device.slots import DeviceStore
from i2l.engines.directory.manifest import Manifest
from i2l.engines.replay import outbox
from i2l.errors import BudgetTooSmall, I2LError, OutOfDeviceMemory
from i2l.lora.lora import Lora
from i2l.runtime import opening
from i2l.runtime.pipeline import Pipeline
from i2l.runtime.proof import timing
from i2l.runtime.proof.activations import seeded_activation
from i2l.runtime.proof.choice import Chosen

T = TypeVar("T")


def digest(lora: Lora) -> str:
    """Equal for LoRAs that are equal to the bit."""
    found = hashlib.sha256()
    for module, pair in sorted(lora.factors.items()):
        found.update(module.encode())
        for factor in pair:
            found.update(factor.tobytes())
    return found.hexdigest()


def run(
    engines: Path,
    driver: Driver,
    passes: Sequence[int] = (1,),
    spare_bytes: int = 0,
    interrupt_at: int | None = None,
    device: str | None = None,
    margin_bytes: int | None = None,
    auto: bool = False,
    threads: bool = False,
    shrink_after: int | None = None,
    move_after: int | None = None,
    lanes: bool = False,
    slots: int | None = None,
) -> dict[str, Any]:
    """LoRAs of passes of so many images on one pipeline, with so much more than the least budget.

    ``interrupt_at``: Ctrl-C comes when progress was told so often. ``margin_bytes``: what is free but for that is the
    budget. ``auto``: the backend is left to us, and the card was proven. ``threads``: a new one for each pass, and for
    closing. ``shrink_after``: memory runs out behind so many passes; ``move_after``: as much is found again, elsewhere.
    ``lanes``: what a proof tells of them, before the passes, with so many ``slots``.
    """
    budget = None if margin_bytes is not None else least_budget(engines) + spare_bytes
    facts: dict[str, Any] = {"loras": [], "budget_bytes": budget, "filled_bytes": [], "kept": []}
    told = itertools.count()

    def report(stage: str, done: int, total: int) -> None:  # noqa: ARG001
        if next(told) == interrupt_at:
            raise KeyboardInterrupt

    with (
        suppress(KeyboardInterrupt),
        Pipeline(
            engines,
            backend="auto" if auto else "tensorrt",
            threads=1,
            vram_budget_bytes=budget,
            vram_margin_bytes=margin_bytes or 0,
            report=report,
            device=device,
        ) as pipeline,
    ):
        backend: Any = pipeline._open.backend
        facts["card"] = backend.device.name if pipeline.backend_name != "cpu" else "the CPU"
        if lanes:
            facts["lanes"] = proof_of_lanes(Opened(backend, pipeline.manifest, pipeline.manifest), slots)
        facts["streamed_bytes"] = backend.residency.streamed_bytes if pipeline.backend_name != "cpu" else 0
        for number, images in enumerate(passes):
            if number in {shrink_after, move_after}:
                facts["launched_before"] = driver.graph_launches
                with moved(backend) if number == move_after else nullcontext():
                    backend.shrink(OutOfDeviceMemory(backend.device.name, 1, 0))
            FILLED.clear()
            pictures = [picture(90, 70, seed=seed) for seed in range(images)]
            lora = in_thread(threads, partial(pipeline.lora_from_images, pictures))
            facts["loras"].append(digest(lora))
            facts["filled_bytes"].append(sum(FILLED))
            if pipeline.backend_name != "cpu":
                chunks = backend.device._copies._kept._kept.values()
                facts["kept"].append(sum(chunk.filled for chunk in chunks))
        facts["vram"] = pipeline.vram
        facts["live_at_last"] = driver.live_bytes
        if pipeline.backend_name != "cpu":
            plan = backend.residency
            facts["planned_live_bytes"] = plan.activation_bytes + plan.value_bytes + plan.weight_bytes
            driver.give_back()
        facts["backend"] = pipeline.backend_name
        in_thread(threads, pipeline.close)
    return facts


def proof_of_lanes(opened: Opened, slots: int | None) -> dict[str, Any]:
    """What a proof tells by the device's events."""
    models, inputs = opened.running.models, {}
    for family, model in models.items():
        inputs[family] = seeded_activation(model.spec, model.chunks[0].steps[0].graph, 1)
        store: Any = opened.backend.store(family)
        store.slots = slots or store.slots
        while len(store._free) > store.slots:
            store._free.pop()
    put(timing, "STRETCH", 3)  # less than there is
    return timing.lane_facts(opened, inputs)


def in_thread(new: bool, work: Callable[[], T]) -> T:
    """What it gives, done here or in a new thread."""
    if not new:
        return work()
    with ThreadPoolExecutor(1) as pool:
        return pool.submit(work).result()


@contextmanager
def moved(backend: Any) -> Iterator[None]:
    """What is given back meanwhile is somebody else's when as much is asked for again."""
    weights, device = backend._weights, backend.device
    taken: list[int] = []

    def same_plan(_: object) -> None:
        plan = weights.residency
        taken.extend(device.allocate(n) for n in (plan.activation_bytes + plan.value_bytes, plan.weight_bytes))

    weights._replan = same_plan
    yield
    for address in taken:
        device.free(address)


def choose(path: Path, manifest: Manifest, backend: str, limits: Limits, *, prove: bool) -> Chosen:  # noqa: ARG001
    """``auto`` as after a proof."""
    return Chosen("tensorrt", "auto: proven") if backend == "auto" else Chosen(backend, "asked for")


FILLED: list[int] = []
"""Bytes of every filling of pinned memory with chunks."""
PIECE_BYTES = 16 << 10
"""Of the ring: so small that chunks pass in several pieces."""


def count_fillings() -> None:
    """In :data:`FILLED`."""
    fill = Staging._fill

    def counted(self: Any, target: int, source: int, nbytes: int) -> None:
        if self.piece_bytes == PIECE_BYTES:
            FILLED.append(nbytes)
        fill(self, target, source, nbytes)

    put(Staging, "_fill", counted)


@contextmanager
def copies_wait_for_launches(facts: dict[str, Any]) -> Iterator[None]:
    """No copy is made before what uses the chunks before was launched: so the one may not hold up the other.

    ``held_up``: whether that was waited for in vain.
    """
    copy, release = CopyLane.copy, DeviceStore.release
    numbers, released, changed = itertools.count(), [0], threading.Condition()
    facts["held_up"] = False

    def late(self: Any, source: memoryview, address: int) -> None:
        number = next(numbers)

        def wait() -> None:
            with changed:
                facts["held_up"] |= not changed.wait_for(lambda: facts["held_up"] or released[0] >= number, timeout=6)

        self._do(wait)
        copy(self, source, address)

    def counted(self: Any, chunk: Any) -> None:
        release(self, chunk)
        with changed:
            released[0] += 1
            changed.notify_all()

    put(CopyLane, "copy", late)
    put(DeviceStore, "release", counted)
    try:
        yield
    finally:
        put(CopyLane, "copy", copy)
        put(DeviceStore, "release", release)


@cache
def least_budget(engines: Path) -> int:
    """What the smallest plan needs."""
    try:
        Pipeline(engines, backend="tensorrt", vram_budget_bytes=1).close()
    except BudgetTooSmall as error:
        return error.needed_bytes
    raise AssertionError("one byte was enough")


def run_case(engines: Path, driver: Driver, case: dict[str, Any]) -> dict[str, Any]:
    """One case, its environment set for as long; errors that are not ours end the process.

    ``host_bytes``: of the machine's memory, of which only what is pinned is taken. ``late_copies``: see
    :func:`copies_wait_for_launches`.
    """
    environment = {
        name if name.startswith("CUDA_") else f"I2L_STANDIN_{name}": str(value)
        for name, value in case.pop("environment", {}).items()
    }
    host_bytes, late_copies = case.pop("host_bytes", 0), case.pop("late_copies", False)
    for module in (device_backend, kept):
        put(module, "available_bytes", lambda: host_bytes - driver.pinned_bytes)
    least_budget(engines)  # before anything fails
    driver.reset()
    os.environ |= environment
    which_card.most_free.cache_clear()
    facts: dict[str, Any] = {}
    try:
        with copies_wait_for_launches(facts) if late_copies else nullcontext():
            facts |= run(engines, driver, **case)
    except I2LError as error:
        facts |= {"error": type(error).__name__, "message": str(error)}
    facts["without_graphs"] = sum("without CUDA graphs" in line for line in SAID)
    facts["chosen"] = [line for line in SAID if "has the most free memory" in line]
    SAID.clear()
    for name in environment:
        del os.environ[name]
    return facts | {name: getattr(driver, name) for name in SEEN}


SEEN = (
    "problems", "live_bytes", "peak_bytes", "pinned_bytes", "pinned_peak_bytes", "copies", "pageable_copies", "calls",
    "uploaded_bytes", "graph_launches", "allocations", "spilled_bytes", "contexts", "streams",
)  # fmt: skip
SAID: list[str] = []
"""What is said to the user."""


class Listener(logging.Handler):
    def emit(self, record: logging.LogRecord) -> None:
        SAID.append(record.getMessage())


def main() -> None:
    engines, cases = Path(sys.argv[1]), json.loads(sys.argv[2])
    if len(sys.argv) > 3:
        (MUTATIONS | GRAPH_MUTATIONS)[sys.argv[3]]()
    driver = Driver()
    opening.choose_backend = choose
    logging.getLogger("i2l").addHandler(Listener())
    logging.getLogger("i2l").setLevel(logging.INFO)
    put(copy_lane, "Staging", partial(Staging, piece_bytes=PIECE_BYTES))
    put(outbox, "BLOCK_BYTES", 16 * PIECE_BYTES)  # so small that results lie in several
    count_fillings()
    sys.modules["tensorrt_rtx"] = played_tensorrt.Played(None, launch=driver.launch, ended=driver.context_ended).module
    for case in cases:
        sys.stdout.write(f"{json.dumps(run_case(engines, driver, case))}\n")


if __name__ == "__main__":
    main()
