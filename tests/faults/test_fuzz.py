"""Random damage: a few cases here, thousands by ``make fuzz``, each in a process of bounded memory."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from conftest import MakeEngines, MakeModels
from injectors import small_lora

LONG = os.environ.get("I2L_FAULTS") == "long"
SEED = int(os.environ.get("I2L_SEED", "0"))
HERE = Path(__file__).parent


@pytest.fixture
def prepared(engines: MakeEngines, models: MakeModels, tmp_path: Path, kind: str) -> Path:
    """What a kind of damage is done to."""
    if kind in {"manifests", "flips"}:
        return Path(shutil.copytree(engines("tiny", "int8"), tmp_path / "engines"))
    folder = tmp_path / "sources"
    folder.mkdir()
    if kind == "headers":
        for path in models("tiny").rglob("*.safetensors"):
            shutil.copy(path, folder)
        for key_format in ("comfyui", "diffsynth", "kohya", "peft"):
            small_lora().save(folder / f"{key_format}.safetensors", key_format=key_format)
    return folder


@pytest.mark.parametrize(
    ("kind", "bounded", "long"),
    [("manifests", 24, 2000), ("headers", 60, 2000), ("pictures", 60, 500), ("flips", 16, 500)],
)
def test_random_damage_is_refused_or_harmless(
    prepared: Path, kind: str, bounded: int, long: int, capsys: pytest.CaptureFixture[str]
) -> None:
    count = long if LONG else bounded
    command = [sys.executable, str(HERE / "fuzzers.py"), kind, str(count), str(SEED), str(prepared)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment, timeout=3000)
    assert done.returncode == 0, done.stderr[-3000:]
    outcomes = json.loads(done.stdout)
    if LONG:
        with capsys.disabled():
            sys.stdout.write(f"\n{kind}, {count} cases, seed {SEED}: {json.dumps(outcomes)}\n")
    assert [outcome for outcome in outcomes if "bad:" in outcome] == []
