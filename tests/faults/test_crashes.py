"""Killed at any file-system call: the old engines or the new, the next build right, nothing left for ever.

A sample of the calls here, every one by ``make soak``.
"""

import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from conftest import MakeEngines, MakeModels

LONG = os.environ.get("I2L_FAULTS") == "long"
HERE = Path(__file__).parent


@pytest.mark.parametrize(
    ("kind", "precision", "step", "number"),
    [
        ("rebuild", "int8", 150, signal.SIGKILL),
        ("first build", "int8", 150, signal.SIGKILL),
        ("conversion", "fp8", 80, signal.SIGKILL),
        ("save", "int8", 3, signal.SIGTERM),
        ("batch", "int8", 130, signal.SIGKILL),
    ],
)
def test_killed_at_any_call(
    engines: MakeEngines,
    models: MakeModels,
    tmp_path: Path,
    kind: str,
    precision: str,
    step: int,
    number: int,
) -> None:
    good = Path(shutil.copytree(engines("tiny", precision), tmp_path / "engines"))
    first = 1 if LONG or kind == "save" else 7
    arguments = [kind, models("tiny"), good, 1 if LONG else step, first, int(number)]
    command = [sys.executable, str(HERE / "crasher.py"), *map(str, arguments)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment, timeout=3000)
    assert done.returncode == 0, done.stderr[-3000:]
    outcomes = json.loads(done.stdout)
    if LONG:
        sys.__stdout__.write(f"\n{kind}, every call: {json.dumps(outcomes)}\n")  # type: ignore[union-attr]
    assert [outcome for outcome in outcomes if outcome.startswith("bad")] == []
    assert sum(count for outcome, count in outcomes.items() if not outcome.startswith("calls")) >= 2
