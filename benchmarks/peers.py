"""One block of each encoder at full size, ours beside every peer that computes the same on this CPU. One command.

How to read it: on a CPU without BF16, torch emulates it, so a ratio to torch BF16 flatters. The row to beat is the
fastest peer, and only at an equal error: the last columns say how far a block's output is from float32, against the
output and against what the block adds to its input, SigLIP2 / DINOv3. Each contender has a process of its own; they
take turns for some rounds, and a number is the median of the rounds' medians. On a shared machine the fastest pass, in
brackets, says more, and with many beside us the CPU time by thread in the JSON object: waiting for a core is no part of
it, though spinning for the other thread is. All is for one image; "both" is the blocks of both encoders. contenders.py
says what a peer gets.

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
    """The median of every number over the rounds, and the encoder's seconds."""
    of = [values for one in rounds if (values := one[family])]
    if not of:
        return None
    facts = {name: statistics.median(values[name] for values in of) for name in of[0]}
    facts["fastest_ms"] = min(values["fastest_ms"] for values in of)
    return facts | {"seconds": facts["block_ms"] * DEPTHS[family] / 1e3}


def show(results: dict[str, dict[str, Any]]) -> None:
    """A row for each contender, the fastest first."""
    table = Table("", "SigLIP2, ms", "DINOv3, ms", "both, s", "times i2l", "error", "of what is added")
    rows = {name: list(of.values()) for name, of in results.items() if all(of.values())}
    seconds = {name: sum(facts["seconds"] for facts in of) for name, of in rows.items()}
    ours = seconds[next(iter(CONTENDERS))]
    for name in sorted(seconds, key=lambda name: seconds[name]):
        cells = [f"{facts['block_ms']:.0f} ({facts['fastest_ms']:.0f})" for facts in rows[name]]
        cells += [f"{seconds[name]:.1f}", f"{seconds[name] / ours:.2f}"]
        for error in ("error", "error_of_what_is_added"):
            cells.append(" / ".join(f"{facts[error]:.2%}" for facts in rows[name]))
        table.add_row(name, *cells)
    Console().print(table)


if __name__ == "__main__":
    main()
