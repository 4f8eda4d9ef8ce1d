"""One block of each encoder at full size, ours beside every peer that computes the same on this CPU. One command.

How to read it: on a CPU without BF16, torch emulates it, so a ratio to torch BF16 flatters. The row to beat is the
fastest peer, and only at an equal error: the last columns say how far a block's output is from float32, against the
output and against what the block adds to its input, SigLIP2 / DINOv3. Each contender has a process of its own; they
take turns for some rounds, and a number is the median of the rounds' medians. In brackets is the CPU time of a pass
divided by the threads, which hardly changes when others use the machine, where the time itself doubles: it leaves out
waiting for a core, but also what only one thread does, unless the other spins meanwhile, as onnxruntime's do. So on a
busy machine compare CPU times, and expect those of OpenVINO to be a little low. All is for one image; "both" is the
blocks of both encoders. contenders.py says what a peer gets.

Wants nncf and openvino, which `make bench-peers` installs, and checkpoints of the preset `full`: 6 GB of disk in
--work, 4 GB of memory; ten minutes, and as long once to write what the peers load.
Usage: python benchmarks/peers.py --models DIR --engines DIR (int8) [--work DIR] [--as-cpu avx2] [--json FILE]
"""

import argparse
import json
import os
import statistics
from pathlib import Path
from typing import Any

from rich.box import MARKDOWN
from rich.console import Console
from rich.progress import track
from rich.table import Table

from as_cpu import CPUS, environment
from contenders import CONTENDERS
from cpu import machine, run
from i2l.specs import PRESETS

HERE = Path(__file__).parent
ROUNDS = 3
DEPTHS = {"siglip2": PRESETS["full"].siglip2.depth, "dinov3": PRESETS["full"].dinov3.depth}
Rounds = list[dict[str, dict[str, float] | None]]


def main() -> None:
    """Prepare what is missing, let the contenders take turns, print a table and one JSON object."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--models", type=Path, required=True)
    parser.add_argument("--engines", type=Path, required=True)
    parser.add_argument(
        "--work", type=Path, default=Path("bench/peers"), help="scratch folder; what is in it is reused"
    )
    parser.add_argument("--as-cpu", choices=CPUS, help="all contenders as on such a CPU: see as_cpu.py")
    parser.add_argument("--json", type=Path, help="where to write the JSON object; default: standard output")
    arguments = parser.parse_args()
    models, engines, work = (f"--{name}={getattr(arguments, name)}" for name in ("models", "engines", "work"))
    run(HERE / "peer_files.py", models, work)
    os.environ |= environment(arguments.as_cpu) if arguments.as_cpu else {}
    rounds: dict[str, Rounds] = {name: [] for name in CONTENDERS}
    for name in track(list(CONTENDERS) * ROUNDS, console=Console(stderr=True)):
        rounds[name].append(json.loads(run(HERE / "contenders.py", name, models, engines, work)))
    results = {name: {family: middle(of, family) for family in DEPTHS} for name, of in rounds.items()}
    show(results)
    text = json.dumps({"machine": machine(), "as_cpu": arguments.as_cpu, "contenders": results, "rounds": rounds})
    print(text) if arguments.json is None else arguments.json.write_text(text, encoding="utf-8")


def middle(rounds: Rounds, family: str) -> dict[str, float] | None:
    """The median of every number over the rounds, and the seconds of the encoder's blocks."""
    of = [values for one in rounds if (values := one[family])]
    if not of:
        return None
    facts = {name: statistics.median(values[name] for values in of) for name in of[0]}
    seconds, cpu_seconds = (facts[name] * DEPTHS[family] / 1e3 for name in ("block_ms", "cpu_ms"))
    return facts | {"seconds": seconds, "cpu_seconds": cpu_seconds}


def show(results: dict[str, dict[str, Any]]) -> None:
    """A row for each contender, the fastest first."""
    table = Table("", "SigLIP2, ms", "DINOv3, ms", "both, s", "i2l = 1", "error", "of what is added", box=MARKDOWN)
    rows = {name: list(of.values()) for name, of in results.items() if all(of.values())}
    sums = {name: [sum(one[of] for one in rows[name]) for of in ("seconds", "cpu_seconds")] for name in rows}
    ours = sums[next(iter(CONTENDERS))]
    for name in sorted(rows, key=lambda name: sums[name]):
        cells = [f"{one['block_ms']:.0f} ({one['cpu_ms']:.0f})" for one in rows[name]]
        cells.append("{:.1f} ({:.1f})".format(*sums[name]))
        cells.append("{:.2f} ({:.2f})".format(*(x / our for x, our in zip(sums[name], ours, strict=True))))
        errors = ("error", "error_of_what_is_added")
        cells += [" / ".join(f"{one[error]:.2%}" for one in rows[name]) for error in errors]
        table.add_row(name, *cells)
    Console(width=140).print(table)


if __name__ == "__main__":
    main()
