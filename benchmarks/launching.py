"""How long is a chunk on the card before what uses it is launched? The host's part of it, over the stand-in driver.

Chunks of SigLIP2 at full size go to a card without memory, so a copy takes no time; filling pinned buffers takes as
long as it does. For each chunk: from the end of its last copy call to the moment at which the host has launched its
steps, which are none here: what lies between is the host being held up by other chunks. Milliseconds as JSON.
Usage: python benchmarks/launching.py [--passes 4]; Linux with cc; PYTHONPATH=OTHER/.typecheck for another commit's code
"""

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from functools import partial
from itertools import accumulate
from pathlib import Path
from typing import Any

from i2l.engines.device.calls import DriverCalls
from i2l.engines.device.card import CudaDevice
from i2l.engines.device.residency import plan_residency
from i2l.engines.device.slots import DeviceWeights
from i2l.engines.directory.manifest import Step
from i2l.errors import BudgetTooSmall
from i2l.export.packs.planning import planned_model
from i2l.machine.platforms.mapping import open_mapped
from i2l.runtime.streamer import stream
from i2l.specs import PRESETS

if sys.platform != "linux":
    raise SystemExit("the stand-in for the driver needs Linux")

DRIVER = Path(__file__).parents[1] / "tests" / "engines" / "standin" / "driver.c"
LIBRARY = "libcuda.so.1"


def main() -> None:
    """Compile the stand-in and run again with it."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--passes", type=int, default=4)
    options = parser.parse_args()
    if "I2L_STANDIN_HOLLOW" in os.environ:
        measure(options.passes)
        return
    with tempfile.TemporaryDirectory(prefix="i2l-launching-") as folder:
        compiler = shutil.which("cc") or "cc"
        subprocess.run([compiler, "-shared", "-fPIC", "-O1", "-o", f"{folder}/{LIBRARY}", DRIVER], check=True)
        own = {"LD_LIBRARY_PATH": folder, "I2L_STANDIN_HOLLOW": "1", "I2L_STANDIN_MODE": "eager"}
        subprocess.run([sys.executable, *sys.argv], env=os.environ | own, check=True)


def measure(passes: int) -> None:
    """Passes over all chunks of one model with the fewest bytes of VRAM."""
    copies: list[tuple[float, int]] = []
    call = DriverCalls.__call__

    def timed(self: DriverCalls, function: str, *arguments: Any, **more: Any) -> Any:
        found = call(self, function, *arguments, **more)
        if function == "cuMemcpyHtoDAsync":
            copies.append((time.perf_counter(), arguments[2]))
        return found

    DriverCalls.__call__ = timed  # type: ignore[method-assign]
    model = planned_model(PRESETS["full"].siglip2, "int8")
    plan = partial(plan_residency, {"siglip2": model.chunks}, {})
    with tempfile.TemporaryDirectory(prefix="i2l-launching-") as folder:
        pack = Path(folder, "pack")
        with pack.open("wb") as file:
            for _ in range(0, model.chunks[-1].offset + model.chunks[-1].nbytes, 1 << 24):
                file.write(os.urandom(1 << 24))
        device = CudaDevice()
        try:
            plan(0)
        except BudgetTooSmall as error:
            least_bytes = error.needed_bytes
        weights = DeviceWeights(
            device, {"siglip2": model}, {"siglip2": memoryview(open_mapped(pack))}, plan, least_bytes
        )
        store = weights.stores["siglip2"]
        passing = [chunk for chunk in model.chunks if chunk not in store.resident]
        rows = []
        for _ in range(passes):
            copies.clear()
            launched: dict[Step, float] = {}
            start = time.perf_counter()
            for step, _ in stream(store, passing):
                launched[step] = time.perf_counter()
            whole = time.perf_counter() - start
            device.finish()
            ends = list(accumulate(size for _, size in copies))
            there = [copies[ends.index(end)][0] for end in accumulate(chunk.nbytes for chunk in passing)]
            held = [launched[chunk.steps[-1]] - at for chunk, at in zip(passing, there, strict=True)]
            rows.append({"median_held_up": ms(statistics.median(held)), "held_up": ms(sum(held)), "pass": ms(whole)})
        weights.close()
        device.close()
    print(json.dumps({"chunks": len(passing), "passes": rows, "load": os.getloadavg()[0]}))


def ms(seconds: float) -> float:
    """Rounded."""
    return round(1000 * seconds, 2)


if __name__ == "__main__":
    main()
