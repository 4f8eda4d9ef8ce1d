"""This project's path on the CPU: image file to LoRA file, from an opened engines directory.

Prints one JSON line: seconds to open, seconds of each call by stage, peak resident bytes; `rival.py` prints the same of
the original's path. Usage: python benchmarks/ours.py --engines DIR --image FILE --output FILE [--calls N] [--copies N]
"""

import argparse
import json
import time
from pathlib import Path

from i2l.machine.memory import peak_resident_bytes
from i2l.runtime.pipeline import open_engines


def main() -> None:
    """Open the engines, then turn the image into a LoRA as often as asked."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--engines", type=Path, required=True)
    parser.add_argument("--image", type=Path, required=True)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--calls", type=int, default=2)
    parser.add_argument("--copies", type=int, default=1, help="how many images a call has")
    arguments = parser.parse_args()

    start = time.perf_counter()
    seconds = []
    with open_engines(arguments.engines, backend="cpu") as pipeline:
        load_seconds = time.perf_counter() - start
        for _ in range(arguments.calls):
            start = time.perf_counter()
            lora = pipeline.lora_from_images([arguments.image] * arguments.copies)
            with pipeline.timings.stage("save"):
                lora.save(arguments.output)
            total = time.perf_counter() - start
            stages = {stage: round(value, 3) for stage, value in pipeline.timings.seconds.items()}
            seconds.append({"total": round(total, 3), **stages})
    facts = {"load_seconds": round(load_seconds, 3), "calls": seconds, "peak_resident_bytes": peak_resident_bytes()}
    print(json.dumps(facts))


if __name__ == "__main__":
    main()
