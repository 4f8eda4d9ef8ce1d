"""A process of its own for a proof: a driver that crashes or hangs takes nothing else along.

The parent gives the task as one line of JSON on standard input and reads lines of JSON from standard output: progress,
then the outcome. What libraries print goes to standard error, whose last words are a crash's reason. Not
``multiprocessing``: its children import the main module again, which in ComfyUI is the server.
"""

import io
import json
import os
import queue
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import IO, Any

from ...engines.backends import BACKENDS
from ...engines.base import Limits, VramBudget
from ...engines.directory.manifest import read_manifest
from ...engines.errors import BackendUnavailable, BudgetTooSmall, EnginesError, OutOfDeviceMemory
from ...machine.errors import I2LError, PackageMissing
from .judging import FormOutcome
from .records import outcome_from_dict
from .timing import time_cpu
from .trial import Tell, Trial

ROOT = Path(__file__).parents[2]
BOOT = """
import importlib, importlib.util, json, sys
task = json.loads(sys.stdin.readline())
sys.path[:] = task["path"]
spec = importlib.util.spec_from_file_location("i2l", task["init"], submodule_search_locations=[task["root"]])
sys.modules["i2l"] = module = importlib.util.module_from_spec(spec)
spec.loader.exec_module(module)
importlib.import_module("i2l.runtime.proof.child").serve(task)
"""
"""The package under its own name, wherever it lies and whatever this process calls it."""
POLL_SECONDS = 0.25
"""How often the caller's report is told something, so that it may interrupt."""
LAST_WORDS = 300
"""Characters of a crash's standard error that are kept."""
NOT_THE_CARDS_FAULT = (EnginesError, BackendUnavailable, PackageMissing, BudgetTooSmall, OutOfDeviceMemory)
"""What stops a proof from beginning; other explained errors are the card's."""


@dataclass(frozen=True)
class TimeLimits:
    """When a proof is taken for hung."""

    silence_seconds: float = 150.0
    """Without a phase done: the first use of a card compiles its kernels."""
    total_seconds: float = 900.0


@dataclass(frozen=True)
class Task:
    """What a child does."""

    engines: Path
    backend: str
    limits: Limits
    software: bool = False
    """The card is a renderer on the CPU."""
    time_only: bool = False


def run_task(task: Task, tell: Tell, time_limits: TimeLimits) -> FormOutcome:
    """Do a task in a child; its outcome, whatever becomes of the child.

    ``tell`` is called several times a second. If it raises, or Ctrl-C is pressed, the child is ended first.
    """
    start = time.monotonic()
    with tempfile.TemporaryFile() as words, _child(task, words) as process:
        lines: queue.Queue[str | None] = queue.Queue()
        threading.Thread(target=_read, args=(process.stdout, lines.put), daemon=True).start()
        done, total, heard = 0, 1, start
        outcome: FormOutcome | None = None
        while True:
            tell(done, total)
            now = time.monotonic()
            if now - heard > time_limits.silence_seconds or now - start > time_limits.total_seconds:
                late = f"no answer for {now - heard:.0f} s, {now - start:.0f} s in all: it was ended"
                return FormOutcome(task.limits.form, failure=late, seconds=now - start)
            try:
                line = lines.get(timeout=POLL_SECONDS)
            except queue.Empty:
                continue
            if line is None:
                break
            heard, message = time.monotonic(), json.loads(line)
            if "outcome" in message:
                outcome = outcome_from_dict(message["outcome"])
            else:
                done, total = message["done"], message["total"]
        code = process.wait()
        if outcome is None:
            words.seek(0)
            reason = f"{_ending(code)}: {_last_words(words.read().decode(errors='replace'))}"
            outcome = FormOutcome(task.limits.form, failure=reason, seconds=time.monotonic() - start)
        return outcome


@contextmanager
def _child(task: Task, words: IO[bytes]) -> Iterator[subprocess.Popen[str]]:
    """The process, ended whatever the body does."""
    process = subprocess.Popen(  # noqa: S603 - this interpreter
        [sys.executable, "-c", BOOT], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=words,
        text=True, encoding="utf-8",
    )  # fmt: skip
    assert process.stdin is not None
    try:
        try:
            process.stdin.write(json.dumps(_task_to_dict(task)) + "\n")
            process.stdin.close()
        except OSError:  # it has ended already: its last words say why
            pass
        yield process
    finally:
        process.kill()
        process.wait()
        if process.stdout is not None:
            process.stdout.close()


def serve(values: dict[str, Any]) -> None:
    """The child's side: do the task and write the outcome."""
    pipe = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)  # what libraries print

    def send(**message: Any) -> None:
        pipe.write(json.dumps(message) + "\n")
        pipe.flush()

    task = _task_from_dict(values)
    BACKENDS[task.backend] = values["module"]
    try:
        outcome = _do(task, lambda done, total: send(done=done, total=total))
    except NOT_THE_CARDS_FAULT as error:
        lasting = not isinstance(error, OutOfDeviceMemory | BudgetTooSmall)
        outcome = FormOutcome(task.limits.form, refusal=str(error), lasting=lasting)
    except I2LError as error:
        outcome = FormOutcome(task.limits.form, failure=str(error))
    send(outcome=asdict(outcome))
    pipe.close()
    sys.stdout.flush()
    os._exit(0)  # what a driver does at the interpreter's end is not the proof's


def _do(task: Task, tell: Tell) -> FormOutcome:
    manifest = read_manifest(task.engines)
    if task.time_only:
        return time_cpu(task.engines, manifest, task.limits)
    return Trial(task.engines, manifest, task.backend, task.limits, tell, task.software).run()


def _task_to_dict(task: Task) -> dict[str, Any]:
    module = BACKENDS[task.backend]
    limits = {**vars(replace(task.limits)), "vram": asdict(task.limits.vram)}
    del limits["report"], limits["before_card"]
    return {
        "path": sys.path, "root": str(ROOT), "init": str(ROOT / "__init__.py"), "module": module,
        "engines": str(task.engines.absolute()), "backend": task.backend, "limits": limits,
        "software": task.software, "time_only": task.time_only,
    }  # fmt: skip


def _task_from_dict(values: dict[str, Any]) -> Task:
    limits = {**values["limits"], "vram": VramBudget(**values["limits"]["vram"])}
    return Task(Path(values["engines"]), values["backend"], Limits(**limits), values["software"], values["time_only"])


def _read(stream: IO[str], put: Callable[[str | None], None]) -> None:
    try:
        for line in stream:
            put(line)
    except (OSError, ValueError):  # closed, as the child was ended
        pass
    put(None)


def _ending(code: int) -> str:
    """How a process ended, in words."""
    if code < 0:
        try:
            return f"it crashed ({signal.Signals(-code).name})"
        except ValueError:
            return f"it crashed (signal {-code})"
    return f"it ended with exit code {code if code < 256 else hex(code)}"


def _last_words(text: str) -> str:
    """The last line that says something."""
    lines = [line.strip() for line in io.StringIO(text) if line.strip()]
    return lines[-1][-LAST_WORDS:] if lines else "without a word"
