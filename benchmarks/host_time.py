"""What the host does for an image on `cuda` where all weights stay: onnxruntime's real CUDA provider, nothing launched.

Full size, packs of holes, a card of 48 GiB that is played (tests/engines/provider): kernels and copies take no time.
For each pass JSON: milliseconds of processor time of the thread that computes, without what the stand-in itself takes;
launches, copies, bytes from the host. The first pass brings the weights, the second is recorded where it can be.
Usage: python benchmarks/host_time.py [--precision int8] [--passes 1,1,1,1]; Linux on x86-64 with cc, after `make
test-cuda` has made .cuda; PYTHONPATH=OTHER/.typecheck for another commit's code
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import i2l

ROOT = Path(__file__).parents[1]
TESTS = ROOT / "tests"
sys.path[:0] = [str(TESTS), str(TESTS / "engines" / "provider")]

from hollow import make_hollow  # noqa: E402 - the tests' own
from standin_libraries import compile_libraries  # noqa: E402

SHOWN = ("images", "host_ms", "launches", "graph_launches", "copies", "uploaded_bytes", "calls")


def main() -> None:
    """Run it."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--precision", default="int8", choices=["int8", "fp8", "bf16"])
    parser.add_argument("--passes", default="1,1,1,1,1,1")
    options = parser.parse_args()
    home = ROOT / ".cuda"
    (packages,) = home.glob("lib/python3.*/site-packages")
    (headers,) = home.glob("headers/nvidia/cu*/include")
    with tempfile.TemporaryDirectory(prefix="i2l-host-time-") as folder:
        libraries, engines = Path(folder, "libraries"), Path(folder, "engines")
        libraries.mkdir()
        engines.mkdir()
        compile_libraries(packages, headers, libraries)
        make_hollow(engines, "full", options.precision)
        environment = os.environ | {
            "LD_LIBRARY_PATH": str(libraries),
            "PYTHONPATH": os.environ.get("PYTHONPATH", str(ROOT / ".typecheck")),
            "OMP_NUM_THREADS": "1",
            "I2L_STANDIN_HOLLOW": "1",
            "I2L_STANDIN_BYTES": str(48 << 30),
        }
        case = {"passes": [int(images) for images in options.passes.split(",")], "budget_bytes": 40 << 30}
        program = [str(home / "bin" / "python"), str(TESTS / "engines" / "provider" / "provider_run.py")]
        command = [*program, str(engines), json.dumps(case)]
        said = subprocess.run(command, env=environment, check=True, stdout=subprocess.PIPE, text=True).stdout
    sys.stdout.write(f"code: {Path(i2l.__file__).parent}\n")
    for row in json.loads(said.splitlines()[-1])["passes"]:
        sys.stdout.write(f"{json.dumps({name: round(row[name], 1) for name in SHOWN})}\n")


if __name__ == "__main__":
    main()
