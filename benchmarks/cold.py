"""A cold run beside plain reading: what does `i2l run` cost when nothing of the packs is in memory?

In each round the packs are read with `dd` through the page cache, with `dd` past it, and by a run of `i2l` that makes a
LoRA; before each the page cache is dropped. Then a warm run. Prints one JSON line.
Usage: python benchmarks/cold.py --engines DIR --image FILE --output FILE [--rounds N]
"""

import argparse
import json
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from i2l.benchmarks.build import drop_page_cache


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
        cold = drop_page_cache() and cold
        seconds["through_page_cache"].append(timed(*(dd(pack) for pack in packs)))
        drop_page_cache()
        seconds["past_page_cache"].append(timed(*(dd(pack, "iflag=direct") for pack in packs)))
        drop_page_cache()
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
