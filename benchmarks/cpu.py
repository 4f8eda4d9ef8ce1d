"""This project beside the original's path on the CPU: seconds, memory, four images, int8 peak, fidelity. One command.

Everything runs in turn, each contender in a process of its own, on the same synthetic checkpoints and image. `full`
needs 60 GB of disk, 22 GB of memory for the original's path, and the better part of an hour.
Usage: python benchmarks/cpu.py --preset small|full [--work DIR] [--json FILE] [--only speed|fidelity]
[--as-cpu avx2|avx512|avx512-vnni|avx512-bf16]
"""

import argparse
import json
import os
import re
import shutil
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from as_cpu import CPUS, environment

HERE = Path(__file__).parent
IMAGE = HERE.parent / "docs" / "photo.jpg"
CALLS = 4
"""Calls of an opened pipeline; the first warms up, the median of the others counts."""
INSTRUCTIONS = ("avx2", "avx_vnni", "avx512f", "avx512_vnni", "avx512_bf16", "amx_int8")
PRECISIONS = {"small": ("int8", "fp8", "bf16", "fp32"), "full": ("int8", "fp8")}
"""bf16 and fp32 engines of the full preset take 18 and 35 GiB; parity tests cover them at small sizes."""


def main() -> None:
    """Make what is missing, run everything in turn, print tables and one JSON object."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--preset", choices=sorted(PRECISIONS), default="small")
    parser.add_argument("--work", type=Path, default=Path("bench"), help="scratch folder; checkpoints in it are reused")
    parser.add_argument("--json", type=Path, help="where to write the JSON object; default: standard output")
    parser.add_argument("--only", choices=["speed", "fidelity"])
    parser.add_argument("--as-cpu", choices=CPUS, help="both contenders as on such a CPU: see as_cpu.py")
    arguments = parser.parse_args()
    os.environ |= environment(arguments.as_cpu) if arguments.as_cpu else {}
    facts: dict[str, Any] = {"preset": arguments.preset, "machine": machine(), "as_cpu": arguments.as_cpu}
    if arguments.only != "fidelity":
        facts["speed"] = speed(arguments.preset, arguments.work)
        show_speed(facts["speed"])
    if arguments.only != "speed":
        facts["fidelity"] = fidelity(arguments.preset, arguments.work)
        show_fidelity(facts["fidelity"])
    text = json.dumps(facts)
    print(text) if arguments.json is None else arguments.json.write_text(text, encoding="utf-8")


def speed(preset: str, work: Path) -> dict[str, Any]:
    """Both contenders, cold and warm, four images, and the int8 peak."""
    models = checkpoints(preset, work, outliers=False)
    engines = build(models, work / f"{preset}-int8", "int8")
    common = ["--image", IMAGE, "--output", work / "lora.safetensors"]
    facts: dict[str, Any] = {
        "cold": script("cold.py", "--engines", engines, *common),
        "warm": [command_line(engines, work) for _ in range(CALLS)][1:],
        "ours": script("ours.py", "--engines", engines, *common, "--calls", CALLS),
        "ours_four_images": script("ours.py", "--engines", engines, *common, "--calls", 3, "--copies", 4),
        "gemm": script("gemm.py", "--engines", engines),
        "adapter": script("adapter.py", "--engines", engines),
        "reference": script("rival.py", "--models", models, *common, "--calls", CALLS),
    }
    return facts


def fidelity(preset: str, work: Path) -> dict[str, list[dict[str, Any]]]:
    """Errors against float32, of plain and of outlier checkpoints."""
    facts = {}
    for name, outliers in (("plain", False), ("outliers", True)):
        models = checkpoints(preset, work, outliers=outliers)
        rows: dict[str, dict[str, Any]] = {}
        for precision in PRECISIONS[preset]:  # one after the other, as each may take the disk's last room
            engines = build(models, work / f"{models.name}-{precision}", precision)
            command = [HERE / "fidelity.py", "--models", models, "--engines", engines, "--image", IMAGE]
            lines = run(*command).splitlines()
            rows |= {row["path"]: row for row in map(json.loads, lines)}
            shutil.rmtree(engines)
        facts[name] = list(rows.values())
        if outliers:
            shutil.rmtree(models)
    return facts


def checkpoints(preset: str, work: Path, *, outliers: bool) -> Path:
    """Synthetic checkpoints, made if they are not there."""
    models = work / f"{preset}{'-outliers' if outliers else ''}"
    if not models.is_dir():
        run("-m", "i2l.cli", "make-checkpoints", models, "--preset", preset, *(["--outliers"] if outliers else []))
    return models


def build(models: Path, engines: Path, precision: str) -> Path:
    """Engines, built if they are not there or old."""
    run("-m", "i2l.cli", "build-engines", "--models", models, "--engines", engines, "--precision", precision)
    return engines


def command_line(engines: Path, work: Path) -> dict[str, Any]:
    """One `i2l run` in a new process: its own report, and the seconds of the whole process."""
    arguments = [IMAGE, "--engines", engines, "--output", work / "lora.safetensors", "--json", "--no-cache"]
    start = time.perf_counter()
    facts = json.loads(run("-m", "i2l.cli", "run", *arguments))
    process = time.perf_counter() - start
    started = process - facts["seconds"]["total"]
    return {"process": round(process, 3), "outside_stages": round(started, 3), **facts}


def script(name: str, *arguments: object) -> dict[str, Any]:
    """The JSON that a script of this folder prints."""
    facts: dict[str, Any] = json.loads(run(HERE / name, *arguments))
    return facts


def run(*arguments: object) -> str:
    """Run Python and return what it prints; its progress stays hidden unless it fails."""
    command = [sys.executable, *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"{' '.join(command)}\n{done.stderr}")
    return done.stdout


def machine() -> dict[str, Any]:
    """What the numbers depend on."""
    cpu = Path("/proc/cpuinfo").read_text(encoding="utf-8") if Path("/proc/cpuinfo").exists() else ""
    lines = dict(re.findall(r"^(model name|cpu family|model|flags)\s*: (.*)$", cpu, re.MULTILINE))
    flags = lines.pop("flags", "").split()
    commit = subprocess.run(["git", "-C", HERE, "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False)  # noqa: S607, E501  # fmt: skip
    return {
        "cores": os.cpu_count(),
        "cpu": lines,
        "instructions": [flag for flag in INSTRUCTIONS if flag in flags],
        "commit": commit.stdout.strip(),
    }


def show_speed(facts: dict[str, Any]) -> None:
    """The table of seconds and memory."""
    ours, theirs = (middle(facts[name]["calls"]) for name in ("ours", "reference"))
    table = Table("", "original", "i2l int8", "ratio")
    for stage in ("total", "siglip2", "dinov3", "adapter"):
        label = "seconds per image, models open" if stage == "total" else f"  {stage}"
        table.add_row(label, f"{theirs[stage]:.2f}", f"{ours[stage]:.2f}", f"{theirs[stage] / ours[stage]:.2f}")
    nothing = facts["reference"]["load_seconds"] + facts["reference"]["calls"][0]["total"]
    warm = statistics.median(run["process"] for run in facts["warm"])
    table.add_row("a new process, warm", f"{nothing:.1f}", f"{warm:.2f}", f"{nothing / warm:.1f}")
    start = statistics.median(run["outside_stages"] for run in facts["warm"])
    table.add_row("  of it outside the stages (start, imports, open, exit)", "", f"{start:.2f}", "")
    cold = facts["cold"]
    table.add_row(f"a new process, page cache {cold['page_cache']}", "", f"{cold['median_seconds']['run']:.2f}", "")
    for way, ratio in cold["ratio"].items():
        words = way.replace("_", " ")
        table.add_row(f"  packs read {words}; cold run beside it", "", f"{cold['median_seconds'][way]:.2f}", f"{ratio}")
    four = middle(facts["ours_four_images"]["calls"])["total"]
    table.add_row("four images in one call / one image", "", f"{four:.2f}", f"{four / ours['total']:.2f}")
    peaks = facts["reference"]["peak_resident_bytes"], max(run["peak_resident_bytes"] for run in facts["warm"])
    table.add_row("peak resident GB", *(f"{peak / 1e9:.2f}" for peak in peaks), f"{peaks[0] / peaks[1]:.0f}")
    floor = sum(profile["blocks"] * profile["linears_at_peak_ms"] / 1e3 for profile in facts["gemm"].values())
    table.add_row("the encoders' linears alone at the int8 peak", "", f"{floor:.2f}", f"{theirs['total'] / floor:.1f}")
    for family, profile in facts["gemm"].items():
        table.add_row(f"int8 peak in linears, {family}", "", f"{profile['fraction_of_peak']:.0%}", "")
    adapter = facts["adapter"]
    for name, ratio in adapter["times_reading"].items():
        label = f"adapter, {name.replace('_', ' ')}; ratio to reading"
        table.add_row(label, "", f"{adapter['seconds'][name]:.3f}", f"{ratio:.2f}")
    Console().print(table)


def show_fidelity(facts: dict[str, list[dict[str, Any]]]) -> None:
    """The table of errors."""
    table = Table("checkpoints", "path", "SigLIP2", "worst token", "DINOv3", "worst token", "B @ A median", "worst")
    for kind, rows in facts.items():
        for row in rows:
            table.add_row(kind, row["path"], *(f"{value:.2%}" for name, value in row.items() if name != "path"))
    Console().print(table)


def middle(calls: list[dict[str, float]]) -> dict[str, float]:
    """The median of every stage, without the first call."""
    return {stage: statistics.median(call[stage] for call in calls[1:]) for stage in calls[0]}


if __name__ == "__main__":
    main()
