"""Each extra that brings an onnxruntime, installed by its name into an environment of its own: ``make test-extras``.

NVIDIA's own libraries are left out, 1.5 GB that nobody could load here: what pip would install of them is read from its
report. So the states that users meet are all here: no driver, a driver (the tests' stand-in) beside the build for the
CPU, and beside the build for CUDA whose libraries are missing.
"""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from test_imports import ROOT
from test_packaging import built  # noqa: F401 - a fixture

HOME = ROOT / ".extras"
PROVIDERS = "import onnxruntime; print(*onnxruntime.get_available_providers())"
pytestmark = pytest.mark.extras


@pytest.fixture(scope="module")
def driver(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the stand-in for CUDA's driver."""
    compiler = shutil.which("cc")
    if compiler is None or not sys.platform.startswith("linux"):
        pytest.skip("the stand-in for the driver needs Linux and a C compiler named cc")
    folder = tmp_path_factory.mktemp("driver")
    source = ROOT / "tests" / "engines" / "standin" / "driver.c"
    subprocess.run(
        [compiler, "-shared", "-fPIC", "-O1", "-o", folder / "libcuda.so.1", source, "-lpthread"], check=True
    )
    return folder


def pip(home: Path, *arguments: str) -> str:
    """pip of this environment, for another one."""
    command = [sys.executable, "-m", "pip", "--python", str(home / "bin" / "python"), *arguments]
    result = subprocess.run(command, check=False, capture_output=True, text=True, timeout=600)
    assert result.returncode == 0, result.stderr[-3000:]
    return result.stdout


def install(wheel: Path, extra: str) -> tuple[Path, dict[str, str]]:
    """A fresh environment, and ``package -> version`` of what its extra asks for."""
    home = HOME / extra
    shutil.rmtree(home, ignore_errors=True)
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", home], check=True)
    constraints = str(ROOT / "constraints.txt")
    wanted = ["install", "--quiet", "--constraint", constraints]
    report = json.loads(pip(home, *wanted, "--dry-run", "--report", "-", f"i2l-engines[{extra}] @ {wheel.as_uri()}"))
    rows = [row["metadata"] for row in report["install"]]
    packages = {row["name"]: row["version"] for row in rows}
    ours = packages.pop("i2l-engines")
    assert ours in wheel.name
    kept = [f"{name}=={version}" for name, version in packages.items() if not name.startswith("nvidia-")]
    pip(home, *wanted, "--no-deps", str(wheel), *kept)
    return home, packages


def doctor(home: Path, library: Path | None = None) -> dict[str, Any]:
    """``backend -> what i2l doctor says of it``."""
    environment = os.environ | ({"LD_LIBRARY_PATH": str(library)} if library else {})
    command = [str(home / "bin" / "i2l"), "doctor", "--json"]
    result = subprocess.run(command, env=environment, check=True, capture_output=True, text=True)
    return {row["name"]: row for row in json.loads(result.stdout)["backends"]}


def providers(home: Path) -> set[str]:
    command = [str(home / "bin" / "python"), "-c", PROVIDERS]
    return set(subprocess.run(command, check=True, capture_output=True, text=True).stdout.split())


@pytest.mark.parametrize("extra", ["cpu", "cuda", "tensorrt"])
def test_an_extra_brings_one_onnxruntime_that_has_what_it_is_for(built: Path, driver: Path, extra: str) -> None:  # noqa: F811
    (wheel,) = built.glob("*.whl")
    home, packages = install(wheel, extra)
    runtimes = {name for name in packages if name in {"onnxruntime", "onnxruntime-gpu"}}
    assert runtimes == {"onnxruntime-gpu" if extra == "cuda" else "onnxruntime"}
    assert ("nvidia-cublas" in packages) == (extra == "cuda")
    assert not any(name.startswith(("nvidia-cudnn", "torch")) for name in packages)  # gigabytes that nobody uses
    assert ("CUDAExecutionProvider" in providers(home)) == (extra == "cuda")
    found = doctor(home)
    assert found["cpu"]["works"]
    assert {found[name]["reason"] for name in ("cuda", "tensorrt")} == {"no NVIDIA driver on this machine"}
    found = doctor(home, driver)
    if extra == "cuda":
        reason = found["cuda"]["reason"]
        assert reason.startswith(f"CUDA's libraries are missing for onnxruntime-gpu {packages['onnxruntime-gpu']} (")
        assert "libcublasLt.so.13" in reason
        assert found["cuda"]["remedy"] == 'pip install "onnxruntime-gpu[cuda]" nvidia-cublas'
        needed = {name.partition(".")[0].removeprefix("lib") for name in re.findall(r"lib\w+\.so\.\d+", reason)}
        brought = {
            "nvidia-cublas": {"cublas", "cublasLt"},
            "nvidia-curand": {"curand"},
            "nvidia-cuda-runtime": {"cudart"},
        }
        assert needed <= set().union(*(brought.get(name, set()) for name in packages)), needed
    else:
        assert found["cuda"]["reason"] == "onnxruntime is the build for the CPU"
        assert found["cuda"]["remedy"].startswith("pip uninstall onnxruntime, then ")
    assert found["tensorrt"]["works"] == (extra == "tensorrt"), found["tensorrt"]
    if extra == "tensorrt":
        assert [card["name"] for card in found["tensorrt"]["cards"]] == ["stand-in 0"]
