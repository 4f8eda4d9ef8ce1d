"""A process that forks builds and conversions and ends each at another file-system call, then looks what is left.

``python crasher.py KIND MODELS ENGINES STEP OFFSET SIGNAL``: every STEP-th call from OFFSET on. Graphs are copied from
a finished build: exporting them takes all the time and plays no part. Prints one JSON object, outcome -> how often.
"""

import hashlib
import json
import os
import shutil
import sys
import traceback
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

from PIL import Image

from i2l.engines.cpu.converted import PLAN_FOLDER, cpu_engines
from i2l.engines.directory.manifest import read_manifest
from i2l.errors import I2LError
from i2l.machine.files import LEFTOVER
from i2l.runtime.jobs import plan_jobs
from i2l.runtime.making import run_jobs
from i2l.runtime.passes import IMAGES_PER_PASS
from i2l.runtime.pipeline import open_engines
from injectors import arm, small_lora


def memoised(good: Path) -> None:
    """Let builds take their graphs from a finished one; imported here, once for all children, as torch comes along."""
    import torch

    from i2l.export import build

    torch.set_num_threads(1)  # a fork takes no others along
    manifest = read_manifest(good)
    folder = good / manifest.build

    def write_graphs(target: Path, *_: Any) -> dict[str, str]:
        for source in sorted(path for path in folder.rglob("*.onnx") if PLAN_FOLDER not in path.parts):
            path = target / source.relative_to(folder)
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(source.read_bytes())
        return dict(manifest.graphs)

    vars(build)["write_graphs"] = write_graphs


def rebuild(models: Path, engines: Path) -> None:
    from i2l.export import build

    build.build_engines(models, engines, precision="int8", force=True)


def finish(models: Path, engines: Path) -> None:
    """The next build that a user starts, who has not forced it."""
    from i2l.export import build

    build.build_engines(models, engines, precision="int8")


def convert(_: Path, engines: Path) -> None:
    cpu_engines(engines, read_manifest(engines), threads=1)


def save(_: Path, engines: Path) -> None:
    small_lora(1).save(engines / "x.safetensors")


def batch(_: Path, engines: Path) -> None:
    with open_engines(engines, threads=1) as pipeline:
        result = run_jobs(pipeline, plan_jobs(engines / "pictures", engines / "out", "image").jobs)
    assert not result.failed, result.failed


def prepare(kind: str, good: Path) -> None:
    """What the work takes beside engines."""
    if kind in {"rebuild", "first build"}:
        memoised(good)
    if kind == "batch":  # two rounds, each of a pass and its files
        (good / "pictures").mkdir()
        for index in range(IMAGES_PER_PASS + 2):
            Image.new("RGB", (40, 40), (10 * index, 50, 90)).save(good / "pictures" / f"{index}.png")


def loras_of(engines: Path) -> str:
    """What a batch has made so far."""
    hashes = {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in engines.glob("out/*.safetensors")}
    return json.dumps(hashes, sort_keys=True)


def lora_of(engines: Path) -> bytes:
    with open_engines(engines, threads=1) as pipeline:
        lora = pipeline.lora_from_images([Image.new("RGB", (64, 64), "red")])
    return b"".join(factor.tobytes() for pair in lora.factors.values() for factor in pair)


def forked(work: Callable[[], object]) -> tuple[int, str]:
    """``(status, what it wrote)`` of a forked child."""
    read, write = os.pipe()
    if not (child := os.fork()):
        os.close(read)
        status, said = 0, ""
        try:
            said = str(work() or "")
        except I2LError as error:
            said = f"refused: {type(error).__name__}"
        except BaseException:  # noqa: BLE001 - the parent tells
            status, said = 1, f"bad: {traceback.format_exc()[-300:]}"
        os.write(write, said.encode())
        os._exit(status)
    os.close(write)
    with os.fdopen(read, "rb") as pipe:
        said = pipe.read().decode()
    return os.waitpid(child, 0)[1], said


def left_over(engines: Path) -> list[str]:
    """What no manifest names and no process writes."""
    found = [path.name for path in engines.rglob("*") if LEFTOVER.fullmatch(path.name)]
    named = {read_manifest(engines).build}
    return found + [path.name for path in engines.glob("build-*") if path.name not in named]


def main() -> None:
    kind, models, good = sys.argv[1], Path(sys.argv[2]), Path(sys.argv[3])
    step, offset, number = int(sys.argv[4]), int(sys.argv[5]), int(sys.argv[6])
    work = {"rebuild": rebuild, "first build": finish, "conversion": convert, "save": save, "batch": batch}[kind]
    place = good.parent / "crash"
    prepare(kind, good)

    def look(engines: Path) -> str:
        return loras_of(engines) if kind == "batch" else lora_of(engines).hex()

    if kind == "batch":
        forked(lambda: batch(models, shutil.copytree(good, place)))
    _, wanted = forked(lambda: look(place if kind == "batch" else good))
    outcomes: Counter[str] = Counter()
    countdown = offset
    while True:
        shutil.rmtree(place, ignore_errors=True)
        if kind == "first build":
            place.mkdir()
        else:
            shutil.copytree(good, place)
        if kind == "conversion":
            shutil.rmtree(place / "cpu-int8", ignore_errors=True)

        def dying(left: int = countdown) -> None:
            arm(left, number)
            work(models, place)

        status, said = forked(dying)
        if not os.WIFSIGNALED(status):
            if said:
                outcomes[f"bad: unkilled: {said}"] += 1
            break
        _, found = forked(lambda: look(place))
        if kind == "batch":
            whole = json.loads(found).items() <= json.loads(wanted).items()
            outcomes[f"{len(json.loads(found))} of {IMAGES_PER_PASS + 2} LoRAs" if whole else "bad: another LoRA"] += 1
        else:
            said = found[:200] if found.startswith(("refused", "bad")) else "bad"
            outcomes["the LoRA" if found == wanted else said] += 1
        if kind in {"save", "batch"}:
            forked(lambda: work(models, place))
        elif kind != "conversion":
            forked(lambda: finish(models, place))
        _, found = forked(lambda: look(place))
        if found != wanted:
            outcomes[f"bad: after the next one: {found[:200]}"] += 1
        if rest := left_over(place):
            outcomes[f"bad: left over: {rest[0][:12]}"] += 1
        countdown += step
    outcomes[f"calls: {countdown - offset}"] = 1
    sys.stdout.write(json.dumps(dict(sorted(outcomes.items()))))


if __name__ == "__main__":
    main()
