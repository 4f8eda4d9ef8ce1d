"""A cold run beside plain reading: what does `i2l run` cost when nothing of the packs is in memory?

In each round the packs are read with `dd` through the page cache, with `dd` past it, and by a run of `i2l` that makes a
LoRA, in turn; before each the page cache is dropped. Then as much memory as the packs need is touched once: a virtual
machine may have given free memory back to its host, and getting it again costs more than the disk (10 microseconds a
page where this was written), in whichever of the three comes first. Prints one JSON line.
Usage: python benchmarks/cold.py --engines DIR --image FILE --output FILE [--rounds N]
"""

import argparse
import json
import mmap
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from i2l.benchmarks.build import drop_page_cache

SPARE_BYTES = 4 << 30
"""Touched beside the packs' size, for the processes themselves; and left alone."""
POPULATE_WRITE = 23
"""Linux's ``MADV_POPULATE_WRITE``, which Python's mmap does not name."""


def main() -> None:
    """Alternate the three, then compare their medians."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--engines", type=Path, required=True)
    parser.add_argument("--image", type=Path, required=True)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--rounds", type=int, default=3)
    arguments = parser.parse_args()
    packs = sorted(arguments.engines.glob("build-*/*/weights.safetensors"))
    nbytes = sum(pack.stat().st_size for pack in packs)
    run = [sys.executable, "-m", "i2l.cli", "run", arguments.image, "--engines", arguments.engines]
    run += ["--output", arguments.output, "--json", "--no-cache"]
    seconds: dict[str, list[float]] = {"run": [], "through_page_cache": [], "past_page_cache": [], "warm_run": []}
    cold = True
    for _ in range(arguments.rounds):
        cold = fresh(nbytes) and cold
        seconds["through_page_cache"].append(timed(*(dd(pack) for pack in packs)))
        fresh(nbytes)
        seconds["past_page_cache"].append(timed(*(dd(pack, "iflag=direct") for pack in packs)))
        fresh(nbytes)
        seconds["run"].append(timed(run))
        seconds["warm_run"].append(timed(run))
    middle = {name: statistics.median(values) for name, values in seconds.items()}
    facts: dict[str, Any] = {
        "page_cache": "dropped" if cold else "could not be dropped: nothing here is cold",
        "read_bytes": nbytes,
        "seconds": seconds,
        "median_seconds": middle,
        "ratio": {
            way: round(middle["run"] / max(middle[way], middle["warm_run"]), 2)
            for way in ("through_page_cache", "past_page_cache")
        },
    }
    print(json.dumps(facts))


def fresh(nbytes: int) -> bool:
    """Drop the page cache, if this process may, and touch so much memory that what follows finds it there."""
    dropped = drop_page_cache()
    free = os.sysconf("SC_AVPHYS_PAGES") * mmap.PAGESIZE
    with mmap.mmap(-1, min(nbytes + SPARE_BYTES, free - SPARE_BYTES)) as memory:
        memory.madvise(mmap.MADV_HUGEPAGE)
        memory.madvise(POPULATE_WRITE)
    return dropped


def dd(pack: Path, *flags: str) -> list[str]:
    """Read a file and keep nothing."""
    return ["dd", f"if={pack}", "of=/dev/null", "bs=4M", *flags]


def timed(*commands: list[Any]) -> float:
    """Seconds of all commands, one after the other."""
    start = time.perf_counter()
    for command in commands:
        subprocess.run(list(map(str, command)), check=True, capture_output=True)
    return round(time.perf_counter() - start, 2)


if __name__ == "__main__":
    main()
