"""What ComfyUI's Python must have: nothing is replaced, and the command that installs the rest can be pasted."""

import importlib
import re
import shlex
import sys
from importlib.metadata import requires
from pathlib import Path, PureWindowsPath
from types import ModuleType

import pytest

from comfy_standins import Host
from i2l.comfy_host import requirements
from i2l.comfy_host.errors import NodePackIncomplete
from i2l.comfy_host.requirements import REQUIREMENTS, install_command, require_packages, shell_command

ROOT = Path(__file__).parents[2]


def listed() -> list[str]:
    lines = REQUIREMENTS.read_text().splitlines()
    return [line for line in lines if line and not line.startswith("#")]


def test_requirements_are_the_project_s_without_torch_and_onnxruntime() -> None:
    project = (ROOT / "pyproject.toml").read_text()
    blocks = [
        re.search(rf"^{name} = \[(.*?)\]", project, re.MULTILINE | re.DOTALL)
        for name in ("dependencies", "cpu", "pictures", "export")
    ]
    wanted = [name for block in blocks if block for name in re.findall(r'"(.+?)"', block[1])]
    assert {"torch>=2.9", f"onnxruntime>={requirements.ONNXRUNTIME_FROM}"} <= set(wanted)
    assert listed() == [line for line in wanted if not line.startswith(("torch", "onnxruntime"))]


def test_no_requirement_brings_an_onnxruntime_along() -> None:
    """It would be installed over onnxruntime-gpu, whose files are in the same folder."""
    waiting, seen = [re.split(r"[>=<\[ ;]", line)[0] for line in listed()], set[str]()
    while waiting:
        if (name := waiting.pop().lower().replace("_", "-")) not in seen:
            seen.add(name)
            needed = [line for line in requires(name) or [] if "extra ==" not in line and "sys_platform" not in line]
            waiting += [re.split(r"[>=<!~\[( ;]", line)[0] for line in needed]
    assert {"numpy", "onnx", "protobuf"} <= seen
    assert not {name for name in seen if name.startswith(("onnxruntime", "torch"))}


def test_what_is_here_is_enough() -> None:
    require_packages()


def test_what_is_absent_is_asked_for_in_one_command(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(requirements, "find_spec", lambda name: None if name in {"onnx", "onnxruntime"} else object())
    monkeypatch.setattr(requirements, "packages_distributions", dict)
    with pytest.raises(NodePackIncomplete, match="onnx and onnxruntime are not installed") as caught:
        require_packages()
    command = shlex.split(str(caught.value).splitlines()[-1])
    assert command == [sys.executable, "-m", "pip", "install", "-r", str(REQUIREMENTS), "onnxruntime>=1.23"]


@pytest.mark.parametrize(("version", "fits"), [("1.22.1", False), ("1.23.0", True), ("1.9.0", False), ("2.0.0", True)])
def test_any_onnxruntime_that_is_new_enough_will_do(monkeypatch: pytest.MonkeyPatch, version: str, fits: bool) -> None:
    other = ModuleType("onnxruntime")
    vars(other).update(__version__=version)
    monkeypatch.setattr(importlib, "import_module", lambda _: other)
    monkeypatch.setattr(requirements, "packages_distributions", lambda: {"onnxruntime": ["onnxruntime-gpu"]})
    if fits:
        require_packages()
        return
    with pytest.raises(NodePackIncomplete, match=rf"^onnxruntime {version} is older than 1\.23") as caught:
        require_packages()
    assert str(caught.value).endswith("-m pip install 'onnxruntime-gpu>=1.23'")  # not another one over it


def test_an_onnxruntime_that_does_not_import_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(name: str) -> ModuleType:
        raise ImportError(f"DLL load failed while importing {name}")

    monkeypatch.setattr(importlib, "import_module", broken)
    with pytest.raises(NodePackIncomplete, match=r"DLL load failed.*\n.*--force-reinstall --no-deps '?onnxruntime"):
        require_packages()


@pytest.mark.parametrize("folder", ["/opt/ComfyUI", "/home/a b/it's $HOME", "/home/me/Comfy (new)"])
def test_the_command_can_be_pasted_into_sh(folder: str) -> None:
    words = ["-m", "pip", "install", "-r", f"{folder}/requirements.txt", "onnxruntime>=1.23"]
    command = shell_command(Path(folder) / "bin" / "python", words, windows=False)
    assert shlex.split(command) == [f"{folder}/bin/python", *words]
    assert "~" not in command


def test_the_command_can_be_pasted_on_windows() -> None:
    """By the rules of cmd.exe and PowerShell: double quotes only, and never around the program. Nothing ran there."""
    words = ["-m", "pip", "install", "-r", r"D:\Comfy UI\requirements.txt", "onnxruntime>=1.23"]
    plain = PureWindowsPath(r"C:\ComfyUI\python_embeded\python.exe")
    line = r'-m pip install -r "D:\Comfy UI\requirements.txt" "onnxruntime>=1.23"'
    assert shell_command(plain, words, windows=True) == rf"C:\ComfyUI\python_embeded\python.exe {line}"
    spaced = PureWindowsPath(r"D:\Comfy UI\.venv\Scripts\python.exe")
    assert shell_command(spaced, words, windows=True) == f'pushd "D:\\Comfy UI\\.venv\\Scripts"\n.\\python.exe {line}'


def test_a_start_without_packages_is_told_in_the_log(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    for name, module in Host(tmp_path).install().items():
        monkeypatch.setitem(sys.modules, name, module)
    for name in [name for name in sys.modules if name.startswith("i2l.comfy_") and "errors" not in name]:
        monkeypatch.delitem(sys.modules, name)
    real = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *more: None if name == "onnx" else real(name, *more))
    importlib.import_module("i2l.comfy_nodes")
    assert f"i2l: onnx not installed; close ComfyUI and run: {install_command(['onnx'])}" in caplog.text
    assert (tmp_path / "models" / "I2L" / "CLIPS").is_dir()  # made at start, so that nobody has to type their names
    assert (tmp_path / "models" / "I2L" / "Z-Image").is_dir()
