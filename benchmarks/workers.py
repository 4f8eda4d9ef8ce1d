"""How much do more Ray workers make of the same batch? One process, then one worker and two, of one thread each.

Each round starts a Ray of its own with so many CPUs. What a worker costs once (Ray, imports, opening the engines) is
left out: the rate is the slope of a line through the moments at which files were finished. (From the first file to the
last would flatter two workers, as both have then done a pass.) The rounds are interleaved; prints one JSON line.
Usage: python benchmarks/workers.py --engines DIR [--pictures 96] [--rounds 3], with the extra ray, on an idle machine.
"""

import argparse
import json
import os
import secrets
import shutil
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
from PIL import Image

SIDE = 512


def main() -> None:
    """Run the rounds and print rates."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--engines", type=Path, required=True)
    parser.add_argument("--pictures", type=int, default=96)
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    rates: dict[str, list[float]] = {}
    with tempfile.TemporaryDirectory(prefix="i2l-workers-") as folder:
        pictures = Path(folder, "pictures")
        pictures.mkdir()
        generator = np.random.default_rng(0)
        for index in range(options.pictures):
            pixels = generator.integers(0, 256, (SIDE, SIDE, 3), np.uint8)
            Image.fromarray(pixels).save(pictures / f"{index}.png")
        for number in range(options.rounds):
            for workers in (0, 1, 2):
                output = Path(folder, f"{number}-{workers}")
                name = f"{workers} workers" if workers else "one process"
                rates.setdefault(name, []).append(files_per_second(pictures, options.engines, output, workers))
    middle = {name: round(statistics.median(values), 2) for name, values in rates.items()}
    print(json.dumps({"per_second": middle, "two_of_one": round(middle["2 workers"] / middle["1 workers"], 2)}))


def files_per_second(pictures: Path, engines: Path, output: Path, workers: int) -> float:
    """Of a batch; 0 workers: without Ray."""
    command = [sys.executable, "-m", "i2l.cli", "batch", str(pictures)]
    command += ["--engines", str(engines), "--output-dir", str(output)]
    command += ["--backend", "cpu", "--threads", "1", "--no-cache", "--quiet"]
    if workers:
        with ray_of(workers) as address:
            subprocess.run([*command, "--ray", address], check=True)
    else:
        subprocess.run(command, check=True)
    times = sorted(path.stat().st_mtime for path in output.glob("*.safetensors"))
    return float(np.polyfit(np.array(times) - times[0], np.arange(len(times)), 1)[0])


@contextmanager
def ray_of(workers: int) -> Iterator[str]:
    """The address of a Ray with so many CPUs."""
    folder = Path(tempfile.mkdtemp(prefix="i2l-ray-"))
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    os.environ["RAY_AUTH_TOKEN"] = secrets.token_hex(32)
    command = [str(Path(sys.executable).with_name("ray")), "start", "--head", "--block", "--port", str(port)]
    command += [
        "--num-cpus",
        str(workers),
        "--include-dashboard",
        "false",
        "--disable-usage-stats",
        "--temp-dir",
        str(folder),
    ]
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, text=True, env=os.environ | {"RAY_AUTH_MODE": "token"}
    ) as head:
        assert head.stdout
        for line in head.stdout:
            if "Ray runtime started" in line:
                break
        try:
            yield f"127.0.0.1:{port}"
        finally:
            head.terminate()
            head.wait(30)
            time.sleep(1)
            shutil.rmtree(folder, ignore_errors=True)


if __name__ == "__main__":
    main()
