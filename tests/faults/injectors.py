"""What goes wrong on purpose: file-system calls that end the process, rotten bits, doctored manifests."""

import builtins
import hashlib
import io
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from i2l.engines.cpu.converted import PLAN_FOLDER
from i2l.engines.directory.integrity import file_facts
from i2l.engines.directory.manifest import MANIFEST, manifest_to_json, read_manifest
from i2l.export.build_folder import commit
from i2l.lora.lora import Lora


def arm(countdown: int, number: int) -> None:
    """End this process with a signal at its ``countdown``-th call to the file system that may change something."""
    left = countdown

    def watched(real: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any, **options: Any) -> Any:
            nonlocal left
            left -= 1
            if left == 0:
                os.kill(os.getpid(), number)
            return real(*arguments, **options)

        return call

    for name in ("open", "mkdir", "rename", "replace", "unlink", "rmdir", "fsync", "remove"):
        setattr(os, name, watched(getattr(os, name)))
    io.open = builtins.open = watched(io.open)


@contextmanager
def answered(seconds: int = 20) -> Iterator[None]:
    """The body answers in time: whoever waits for a pipe that nobody writes is ended with an error of the test."""

    def late(*_: object) -> None:
        raise AssertionError("no answer")

    before = signal.signal(signal.SIGALRM, late)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def run_python(code: str, *arguments: object, **options: Any) -> subprocess.CompletedProcess[str]:
    """Run a script in a process of its own, with at most one thread for products."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", **options.pop("env", {})}
    command = [sys.executable, "-c", code, *map(str, arguments)]
    options = {"timeout": 120, "capture_output": True, **options}
    return subprocess.run(command, text=True, check=False, env=environment, **options)


def i2l_process(*arguments: object, **options: Any) -> subprocess.CompletedProcess[str]:
    """The command line in a process of its own."""
    return run_python("from i2l.cli import main; main()", *arguments, **options)


def flip(path: Path, position: int, bit: int = 0, *, keep_time: bool = True) -> None:
    """Change one bit; a rotten disk tells nobody, so the time of modification stays unless asked otherwise."""
    before = path.stat()
    with path.open("r+b") as stream:
        stream.seek(position)
        value = stream.read(1)[0]
        stream.seek(position)
        stream.write(bytes([value ^ (1 << bit)]))
    if keep_time:
        os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))


def doctored(directory: Path, change: Callable[[dict[str, Any]], object]) -> None:
    """Change a manifest as somebody would who knows how it is sealed."""
    path = directory / MANIFEST
    values = json.loads(path.read_bytes())
    change(values)
    seal(path, values)


def seal(path: Path, values: Mapping[str, Any]) -> None:
    """Write a manifest with the hash that belongs to it."""
    rest = {name: value for name, value in values.items() if name not in {"format", "sha256"}}
    body = json.dumps(rest, separators=(",", ":"))[1:]
    head = json.dumps({"format": values["format"], "sha256": hashlib.sha256(body.encode()).hexdigest()})
    path.write_text(f"{head[:-1].replace(' ', '')},\n{body}", encoding="utf-8")


def small_lora(seed: int = 0, modules: int = 2, width: int = 8) -> Lora:
    """A LoRA of a few kilobytes whose values tell which one it is."""
    names = [f"layers.{index}.attention.to_q" for index in range(modules)]
    value = np.float32(seed + 1)
    return Lora({n: (np.full((4, width), value), np.full((width, 4), value)) for n in names})


def no_traceback(text: str) -> bool:
    return re.search(r"^Traceback", text, re.MULTILINE) is None


def names(folder: Path) -> Sequence[str]:
    return sorted(path.name for path in folder.iterdir())


def rebuilt(directory: Path) -> str:
    """Do what a rebuild of the same checkpoints does to a directory: a new build, the manifest, the old build gone."""
    manifest = read_manifest(directory)
    again = replace(manifest, build=f"build-{uuid.uuid4().hex[:8]}")
    shutil.copytree(directory / manifest.build, directory / again.build)
    plan = directory / again.build / PLAN_FOLDER
    if plan.is_dir():
        planned = replace(read_manifest(plan, planned=True), build=again.build)
        (plan / MANIFEST).write_text(manifest_to_json(planned), encoding="utf-8")
        name = f"{PLAN_FOLDER}/{MANIFEST}"
        again = replace(again, files={**again.files, name: file_facts(plan / MANIFEST)})
    commit(directory, again)
    return again.build
