"""Who may import whom (docs of the design: the house), and what stays unloaded until it is needed."""

import ast
import json
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest

import i2l
from conftest import MakeEngines

ROOT = Path(i2l.__file__).parent
BASE = {"specs", "errors", "machine"}
MAY_IMPORT = {
    "base": {"base"},
    "engines": {"base", "engines"},
    "lora": {"base", "engines", "lora"},
    "runtime": {"base", "engines", "lora", "runtime"},
    "export": {"base", "engines", "export"},
    "command line": {"base", "engines", "lora", "runtime", "export", "command line"},
}
"""Which layers a layer may use; a module at the root that is not in BASE belongs to the command line's layer."""
ONLY_IN = {
    "torch": {"export", "comfy_nodes"},
    "onnx": {"export"},
    "onnxscript": {"export"},
    "onnx_ir": {"export"},
    "matplotlib": {"look"},
    "comfy": {"comfy_nodes", "comfy_host"},
    "folder_paths": {"comfy_host"},
    "tensorrt": {"engines"},
    "cuda": {"engines"},
    "tensorrt_rtx": {"engines"},
}
CORE_DEPENDENCIES = {"numpy", "onnxruntime", "safetensors", "PIL", "click", "rich", "filelock"}
"""What a machine that only runs has installed (pyproject.toml, dependencies)."""


def sources() -> list[str]:
    """Every module of the package as a path from the root."""
    folders = ("comfy_host", "commands", "engines", "export", "look", "lora", "machine", "runtime")
    paths = [*ROOT.glob("*.py"), *(path for folder in folders for path in (ROOT / folder).rglob("*.py"))]
    return sorted(path.relative_to(ROOT).as_posix() for path in paths)


def layer(module: str) -> str:
    """The layer of a module of ours, such as ``engines.ort``."""
    first = module.split(".", maxsplit=1)[0]
    return first if first in MAY_IMPORT else "base" if first in BASE else "command line"


def imports(source: str, module: str, *, is_package: bool) -> Iterator[tuple[str, bool, bool]]:
    """``(imported module, ours, written as relative)`` for every import statement, also inside functions."""
    package = module.split(".") if is_package else module.split(".")[:-1]
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield alias.name.removeprefix("i2l."), alias.name.split(".")[0] == "i2l", False
        elif isinstance(node, ast.ImportFrom) and not node.level:
            name = node.module or ""
            yield name.removeprefix("i2l."), name.split(".")[0] == "i2l", False
        elif isinstance(node, ast.ImportFrom):
            start = [part for part in package[: len(package) - node.level + 1] if part]
            for alias in node.names:  # `from .export import reference` may name a module or a thing in the package
                yield ".".join([*start, *([node.module] if node.module else []), alias.name]), True, True


def violations(source: str, path: str) -> list[str]:
    """What a file imports against the rules."""
    module = path.removesuffix(".py").replace("/", ".").removesuffix("__init__").rstrip(".")
    found = []
    for name, ours, relative in imports(source, module, is_package=path.endswith("__init__.py")):
        first = name.split(".")[0]
        if ours and not relative:
            found.append(f"{path} names {name} with the package's name: ComfyUI loads it under another")
        if ours and name != "__version__" and layer(name) not in MAY_IMPORT[layer(module)]:
            found.append(f"{path} ({layer(module)}) uses {name} ({layer(name)})")
        if not ours and first in ONLY_IN and not {module.split(".")[0]} & ONLY_IN[first]:
            found.append(f"{path} uses {first}, which belongs to {' or '.join(ONLY_IN[first])}")
    return found


@pytest.mark.parametrize("path", sources())
def test_imports_go_one_way(path: str) -> None:
    assert violations((ROOT / path).read_text(encoding="utf-8"), path) == []


@pytest.mark.parametrize(
    ("path", "source"),
    [
        ("specs.py", "from .engines import manifest"),
        ("errors.py", "from .cli import main"),
        ("engines/cpu/backend.py", "from ...runtime.pipeline import Pipeline"),
        ("engines/cpu/backend.py", "def late():\n    from ...export import graphs"),
        ("engines/cpu/backend.py", "from ...look import verification"),
        ("engines/cpu/backend.py", "import onnx"),
        ("lora/lora.py", "if True:\n    from ..export.packs.packs import plan_pack"),
        ("lora/lora.py", "import torch.nn as nn"),
        ("lora/lora.py", "from tensorrt import Logger"),
        ("export/build.py", "from ..lora import lora"),
        ("export/build.py", "from ..look.checkup import check_engines"),
        ("export/__init__.py", "from ..lora import lora"),
        ("export/build.py", "import tensorrt_rtx"),
        ("cli.py", "def run():\n    import torch"),
        ("comfy_host/folders.py", "import torch"),
        ("runtime/pipeline.py", "import comfy.utils"),
        ("export/build.py", "from ..comfy_host.progress import comfy_report"),
        ("cli.py", "import i2l"),
        ("cli.py", "from i2l.errors import I2LError"),
    ],
)
def test_a_planted_import_is_found(path: str, source: str) -> None:
    assert violations(source, path)


@pytest.mark.parametrize("path", [path for path in sources() if not path.startswith("export/")])
def test_what_runs_needs_core_dependencies_only(path: str) -> None:
    home = Path(path).parts[0].removesuffix(".py")
    allowed = CORE_DEPENDENCIES | set(sys.stdlib_module_names)
    allowed |= {name for name, homes in ONLY_IN.items() if home in homes}
    source = (ROOT / path).read_text(encoding="utf-8")
    foreign = {name.split(".")[0] for name, ours, _ in imports(source, path, is_package=False) if not ours}
    assert foreign <= allowed


def loaded_after(code: str, *arguments: str) -> set[str]:
    """Names of the modules that are loaded once ``code`` has run in a fresh interpreter."""
    report = "\nimport json, sys\nprint('\\n' + json.dumps(sorted(sys.modules)))"
    run = subprocess.run([sys.executable, "-c", code + report, *arguments], capture_output=True, text=True, check=True)
    return set(json.loads(run.stdout.splitlines()[-1]))


COMMANDS = ("run", "batch", "embed", "merge", "plot", "build-engines", "inspect", "verify", "doctor")


@pytest.mark.parametrize("command", [[], *([name] for name in COMMANDS)])
def test_help_answers_at_once(command: Sequence[str]) -> None:
    code = f"from i2l.cli import main\nmain({[*command, '--help']!r}, standalone_mode=False)"
    loaded = loaded_after(code)
    assert "i2l.cli" in loaded
    assert not loaded & {"numpy", "onnxruntime", "torch", "rich", "PIL", "safetensors", "onnx", "matplotlib"}


def test_importing_the_package_loads_nothing_heavy() -> None:
    loaded = loaded_after("import i2l\nassert i2l.__version__")
    assert {name for name in loaded if name.startswith("i2l.")} == set()
    assert not loaded & {"numpy", "onnxruntime", "torch", "rich", "PIL", "safetensors", "click"}


def test_public_names_are_what_they_say() -> None:
    from i2l.errors import I2LError
    from i2l.runtime.pipeline import open_engines

    assert (i2l.I2LError, i2l.open_engines) == (I2LError, open_engines)
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = i2l.nothing


RUN = """
import sys
import i2l
with i2l.open_engines(sys.argv[1]) as pipeline:
    pipeline.lora_from_images([sys.argv[2]]).save(sys.argv[3])
"""


def test_running_loads_neither_torch_nor_onnx(engines: MakeEngines, photo: Path, tmp_path: Path) -> None:
    loaded = loaded_after(RUN, str(engines("tiny", "fp32")), str(photo), str(tmp_path / "lora.safetensors"))
    assert (tmp_path / "lora.safetensors").is_file()
    assert not loaded & {"torch", "onnx", "onnxscript", "onnx_ir", "click", "rich"}
    assert {name for name in loaded if name.startswith("i2l.export")} == set()
