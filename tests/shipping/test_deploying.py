"""deploy/: the container's file and its locks, and the systemd unit, as far as they can be checked without either."""

import os
import re
import shlex
import shutil
import subprocess
from pathlib import Path

import pytest
from click.testing import CliRunner

import i2l
from i2l.cli import main

ROOT = Path(i2l.__file__).parent
DEPLOY = ROOT / "deploy"
EXPOSURE = 2.0
"""Of what ``systemd-analyze security`` calls exposure; 1.2 with version 252."""


def instructions() -> list[tuple[str, str]]:
    """``(instruction, its arguments)`` of the Containerfile, lines joined."""
    text = re.sub(r"\\\n", " ", (DEPLOY / "Containerfile").read_text(encoding="utf-8"))
    lines = [line for line in text.splitlines() if line.strip() and not line.startswith("#")]
    return [(name, rest.strip()) for name, _, rest in (line.strip().partition(" ") for line in lines)]


def test_the_container_copies_what_is_there_and_runs_as_a_user_of_its_own() -> None:
    steps = instructions()
    last = max(index for index, (name, _) in enumerate(steps) if name == "FROM")
    copied = [arguments.split()[:-1] for name, arguments in steps if name == "COPY" and "--from" not in arguments]
    sources = [source for each in copied for source in each]
    for variant in ("cpu", "cuda"):
        missing = [s for s in sources if not (ROOT / s.replace("${VARIANT}", variant)).exists()]
        assert missing == []
    names = [name for name, _ in steps[last:]]
    assert names.index("USER") < names.index("ENTRYPOINT")
    assert dict(steps[last:])["USER"].isdecimal()  # a number, so that an orchestrator sees that it is not root
    assert "HEALTHCHECK" in names


def test_the_command_of_the_container_is_one_of_ours() -> None:
    given = dict(instructions())["CMD"]
    command = re.findall(r'"([^"]*)"', given[given.index("[") :])
    result = CliRunner().invoke(main, [*command, "--help"])
    assert result.exit_code == 0
    assert [word for word in command if word.startswith("--") and word not in result.stdout] == []


@pytest.mark.parametrize("variant", ["cpu", "cuda"])
def test_every_dependency_is_locked_by_its_hash_as_it_is_tested(variant: str) -> None:
    """No line without a hash, no version that constraints.txt does not have, and all that pyproject asks for."""
    text = (DEPLOY / f"requirements-{variant}.txt").read_text(encoding="utf-8")
    entries = re.findall(
        r"^([\w.-]+)==([^\s;\\]+)[^\n]*\\\n((?:    --hash=sha256:[0-9a-f]{64}(?: \\)?\n)+)", text, re.MULTILINE
    )
    locked = {name: version for name, version, _ in entries}
    assert len(entries) == len([line for line in text.splitlines() if not line.startswith((" ", "#"))])
    pinned = dict(
        line.split("==") for line in (ROOT / "constraints.txt").read_text(encoding="utf-8").split() if "==" in line
    )
    assert {name: version for name, version in locked.items() if pinned.get(name, version) != version} == {}
    wanted = {"numpy", "pillow", "safetensors", "click", "rich", "filelock", "fastapi", "uvicorn", "matplotlib"}
    wanted |= {"onnxruntime"} if variant == "cpu" else {"onnxruntime-gpu", "cuda-bindings", "nvidia-cudnn-cu13"}
    assert wanted <= locked.keys()
    assert len({"onnxruntime", "onnxruntime-gpu"} & locked.keys()) == 1  # the two share a folder


def test_the_unit_starts_a_command_of_ours() -> None:
    unit = (DEPLOY / "i2l.service").read_text(encoding="utf-8")
    (line,) = re.findall(r"^ExecStart=(.*)$", unit, re.MULTILINE)
    _, *arguments = shlex.split(line)
    result = CliRunner().invoke(main, [*arguments, "--help"])
    assert result.exit_code == 0
    assert [word for word in arguments if word.startswith("--") and word not in result.stdout] == []
    (limit,) = re.findall(r"^TimeoutStopSec=(\d+)$", unit, re.MULTILINE)
    assert int(limit) > 60, "longer than --stop-limit"


@pytest.mark.skipif(shutil.which("systemd-analyze") is None, reason="needs systemd-analyze: apt-get install systemd")
def test_the_unit_is_hardened() -> None:
    command = ["systemd-analyze", "security", "--offline=true", "--no-pager", str(DEPLOY / "i2l.service")]
    told = subprocess.run(command, capture_output=True, text=True, check=False, env=os.environ | {"LC_ALL": "C"})
    (exposure,) = re.findall(r"Overall exposure level for i2l.service: ([\d.]+)", told.stdout)
    assert float(exposure) < EXPOSURE, told.stdout
