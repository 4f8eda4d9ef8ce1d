"""Who may import whom (docs/architecture.md), and what stays unloaded until it is needed."""

import ast
import json
import subprocess
import sys
from collections.abc import Iterable, Iterator, Sequence
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

import i2l
from conftest import MakeEngines
from i2l.engines.backends import BACKENDS

ROOT = Path(i2l.__file__).parent
DISK = {"specs", "machine", "engines.errors", "engines.directory"}
"""What knows the engines directory as files."""
COMPUTING = DISK | {"engines.base", "engines.replay", "engines.device"}
"""What a backend may use: the protocol, and what backends on a device share."""
RUNNING = COMPUTING | {"engines.backends", "lora", "runtime.pictures"}
MAY_IMPORT: dict[str, set[str]] = {
    "specs": set(),
    "machine": set(),
    "runtime.pictures": {"machine"},
    "engines.errors": {"machine"},
    "engines.directory": {"specs", "machine", "engines.errors"},
    "engines.base": DISK,
    "engines.replay": DISK | {"engines.base"},
    "engines.device": DISK | {"engines.base", "engines.replay"},
    "engines.cpu": COMPUTING,
    "engines.cuda": COMPUTING,
    "engines.plugin": COMPUTING,
    "engines.tensorrt": COMPUTING,
    "engines.backends": COMPUTING | {"engines.cpu", "engines.cuda", "engines.plugin", "engines.tensorrt"},
    "lora": DISK | {"engines.base"},
    "runtime.streamer": {"engines.base", "engines.directory", "engines.errors"},
    "runtime.proof": COMPUTING | {"engines.backends", "runtime.streamer"},
    "runtime": RUNNING | {"runtime.streamer", "runtime.proof"},
    "export.checkpoints": DISK,
    "export.precisions": DISK | {"engines.cpu", "export.checkpoints"},
    "export.graphs": DISK | {"export.checkpoints", "export.precisions"},
    "export.packs": DISK | {"export.checkpoints", "export.precisions", "export.graphs"},
    "export.backends": DISK
    | {"engines.cpu", "engines.cuda", "engines.plugin", "engines.tensorrt"}
    | {"export.checkpoints", "export.precisions", "export.graphs", "export.packs"},
    "export": DISK
    | {"engines.cpu", "engines.plugin"}
    | {"export.checkpoints", "export.precisions", "export.graphs", "export.packs", "export.backends"},
    "look": RUNNING
    | {
        "runtime",
        "runtime.proof",
        "runtime.streamer",
        "engines.cpu",
        "engines.cuda",
        "engines.tensorrt",
        "export.checkpoints",
        "export",
    },
    "cluster": RUNNING | {"runtime"},
    "serve": RUNNING | {"runtime"},
    "serve.http": RUNNING | {"runtime", "look", "serve"},
    "comfy_host": DISK | {"engines.base", "engines.backends", "lora", "runtime", "export.checkpoints", "export"},
    "comfy_host.pictures": {"machine", "runtime.pictures", "comfy_host"},
    "comfy_nodes": {"machine", "lora", "comfy_host", "comfy_host.pictures"},
    "commands": RUNNING
    | {"runtime", "runtime.proof", "look", "engines.tensorrt", "serve", "serve.http", "cluster"}
    | {"export.checkpoints", "export.precisions", "export.packs", "export.backends", "export"},
    "cli": {"machine", "commands"},
}
"""``room -> the rooms that it may use``, which stand above it in this table: so nothing goes up or in a circle."""
DOORS = {"", "errors"}
"""Open onto any room, and nobody inside goes through them: the public names."""
ONLY_IN = {
    "torch": {"export", "comfy_nodes", "comfy_host.tensors"},
    "onnx": {"export"},
    "onnxscript": {"export"},
    "onnx_ir": {"export"},
    "matplotlib": {"look.plotting", "look.trace_picture"},
    "comfy": {"comfy_nodes", "comfy_host"},
    "comfy_execution": {"comfy_host.node_text"},
    "folder_paths": {"comfy_host"},
    "nodes": {"comfy_host.pictures.profiles"},
    "server": {"comfy_host.node_text"},
    "tensorrt": {"engines.tensorrt"},
    "tensorrt_rtx": {"engines.tensorrt"},
    "cuda": {"engines.device.calls"},
    "pynvml": {"runtime.proof.card_memory"},
    "pillow_heif": {"runtime.pictures.files.formats"},
    "pillow_jxl": {"runtime.pictures.files.formats"},
    "rich": {"machine.progress"},
    "filelock": {"machine.locks"},
    "click": {"cli", "commands"},
    "fastapi": {"serve.http"},
    "starlette": {"serve.http"},
    "uvicorn": {"serve.http"},
    "h11": {"serve.http.protocol"},
    "anyio": {"serve.http"},
    "python_multipart": {"serve.http.forms"},
    "prometheus_client": {"serve.metrics"},
    "ray": {"cluster.crew"},
}
CORE_DEPENDENCIES = {"numpy", "onnxruntime", "safetensors", "PIL", "click", "rich", "filelock"}
"""What a machine that only runs has installed (pyproject.toml, dependencies)."""


FOLDERS = ("cluster", "comfy_host", "commands", "engines", "export", "look", "lora", "machine", "runtime", "serve")


def sources() -> list[str]:
    """Every module of the package as a path from the root."""
    root = (path for path in ROOT.glob("*.py") if path.name != "setup.py")  # builds the wheel, and is not in it
    paths = [*root, *(path for folder in FOLDERS for path in (ROOT / folder).rglob("*.py"))]
    return sorted(path.relative_to(ROOT).as_posix() for path in paths)


def module_of(path: str) -> str:
    """``engines.cpu.backend`` of ``engines/cpu/backend.py``; the root's own is empty."""
    return path.removesuffix(".py").replace("/", ".").removesuffix("__init__").rstrip(".")


def within(name: str, places: Iterable[str]) -> bool:
    """Whether a module is one of these, or inside one."""
    return any(name == place or name.startswith(f"{place}.") for place in places)


def room(module: str) -> str:
    """The room of a module: the longest name in the table that it begins with, or a door."""
    rooms = [name for name in MAY_IMPORT if within(module, [name])]
    return max(rooms, key=len, default="errors" if within(module, ["errors"]) else "")


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
    module = module_of(path)
    here = room(module)
    found = []
    for name, ours, relative in imports(source, module, is_package=path.endswith("__init__.py")):
        first, there = name.split(".")[0], room(name)
        if ours and not relative:
            found.append(f"{path} names {name} with the package's name: ComfyUI loads it under another")
        elif ours and name != "__version__" and here not in DOORS and there not in {here, *MAY_IMPORT[here]}:
            found.append(f"{path} ({here}) uses {name} ({there or 'a door'})")
        if not ours and first in ONLY_IN and not within(module, ONLY_IN[first]):
            found.append(f"{path} uses {first}, which belongs to {' or '.join(ONLY_IN[first])}")
        if name == "machine.progress.show_progress" and here != "commands":
            found.append(f"{path} draws on the terminal, which is the commands' to do")
    return found


def test_the_table_goes_one_way() -> None:
    """A room uses only rooms that stand above it, so there is no way up and no circle; and every folder is in it."""
    order = list(MAY_IMPORT)
    for index, (name, used) in enumerate(MAY_IMPORT.items()):
        assert used <= set(order[:index]), f"{name} uses {used - set(order[:index])}, below it"
    doors = {"__init__.py", "__main__.py", "errors.py", "engines/__init__.py"}
    assert {path for path in sources() if room(module_of(path)) in DOORS} == doors


def test_no_two_modules_import_each_other() -> None:
    """Not even inside a room, and not inside functions."""
    modules = {module_of(path): path for path in sources()}
    uses: dict[str, set[str]] = {}
    for module, path in modules.items():
        source = (ROOT / path).read_text(encoding="utf-8")
        names = [name for name, ours, _ in imports(source, module, is_package=path.endswith("__init__.py")) if ours]
        uses[module] = {name if name in modules else name.rpartition(".")[0] for name in names} - {module, ""}
    TopologicalSorter(uses).prepare()  # raises at a circle


def test_a_backend_knows_neither_the_others_nor_what_runs_it() -> None:
    backends = {f"engines{place.rpartition('.')[0]}" for place in BACKENDS.values()}
    assert all((ROOT / name.replace(".", "/") / "backend.py").is_file() for name in backends)
    for name in backends:
        assert MAY_IMPORT[name] & {"runtime", "engines.backends", "look", "export", *backends} == set()
    assert MAY_IMPORT["runtime"] & backends == set()


@pytest.mark.parametrize("path", sources())
def test_imports_go_one_way(path: str) -> None:
    assert violations((ROOT / path).read_text(encoding="utf-8"), path) == []


@pytest.mark.parametrize(
    ("path", "source"),
    [
        ("specs.py", "from .engines.directory import manifest"),
        ("machine/files.py", "from ..specs import Family"),
        ("machine/files.py", "from ..errors import DiskFull"),
        ("machine/sizes.py", "from .. import I2LError"),
        ("engines/directory/manifest.py", "from ..base import Array"),
        ("engines/base.py", "from .device.slots import Slot"),
        ("engines/device/slots.py", "from ..cuda.session import OrtDeviceEngine"),
        ("engines/cpu/backend.py", "from ..cuda.session import OrtDeviceEngine"),
        ("engines/cuda/backend.py", "def late():\n    from ..cpu.backend import CpuBackend"),
        ("engines/tensorrt/backend.py", "from ..cuda import graph_files"),
        ("engines/tensorrt/backend.py", "from ..backends import BACKENDS"),
        ("engines/tensorrt/backend.py", "from ...lora.lora import Lora"),
        ("engines/cuda/backend.py", "import tensorrt"),
        ("engines/device/slots.py", "import cuda.core"),
        ("runtime/opening.py", "from ..engines.cpu.backend import CpuBackend"),
        ("runtime/opening.py", "from ..machine.progress import show_progress"),
        ("export/checkpoints/recognise.py", "from ..packs.packs import plan_pack"),
        ("export/packs/packs.py", "from ..build import build_engines"),
        ("export/backends/cpu.py", "from ..parts import plan_parts"),
        ("comfy_host/folders.py", "from ..commands.run import run"),
        ("runtime/jobs.py", "import click"),
        ("engines/cpu/backend.py", "from ...runtime.pipeline import Pipeline"),
        ("engines/cpu/backend.py", "def late():\n    from ...export.graphs import graphs"),
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
        ("serve/worker.py", "from .http.routes import routes"),
        ("serve/jobbook.py", "import fastapi"),
        ("runtime/jobs.py", "from ..serve.jobbook import JobBook"),
        ("cli.py", "import i2l"),
        ("cli.py", "from i2l.errors import I2LError"),
    ],
)
def test_a_planted_import_is_found(path: str, source: str) -> None:
    assert violations(source, path)


@pytest.mark.parametrize("path", [path for path in sources() if not path.startswith("export/")])
def test_what_runs_needs_core_dependencies_only(path: str) -> None:
    allowed = CORE_DEPENDENCIES | set(sys.stdlib_module_names)
    allowed |= {name for name, homes in ONLY_IN.items() if within(module_of(path), homes)}
    source = (ROOT / path).read_text(encoding="utf-8")
    foreign = {name.split(".")[0] for name, ours, _ in imports(source, path, is_package=False) if not ours}
    assert foreign <= allowed


def loaded_after(code: str, *arguments: str) -> set[str]:
    """Names of the modules that are loaded once ``code`` has run in a fresh interpreter."""
    report = "\nimport json, sys\nprint('\\n' + json.dumps(sorted(sys.modules)))"
    run = subprocess.run([sys.executable, "-c", code + report, *arguments], capture_output=True, text=True, check=True)
    return set(json.loads(run.stdout.splitlines()[-1]))


COMMANDS = (
    "run",
    "batch",
    "serve",
    "embed",
    "merge",
    "convert",
    "plot",
    "build-engines",
    "inspect",
    "verify",
    "prove",
    "doctor",
)


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
    from i2l.lora.lora import Lora
    from i2l.runtime.pipeline import open_engines

    assert (i2l.I2LError, i2l.open_engines, i2l.Lora) == (I2LError, open_engines, Lora)
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = i2l.nothing


def test_every_error_is_at_the_door() -> None:
    """What users catch is found in one place, whichever room raises it; the nodes' stay in ComfyUI, as the nodes do."""
    from i2l import errors

    named = {
        node.name
        for path in sources()
        if path.endswith("errors.py") and not path.startswith("comfy_host/")
        for node in ast.parse((ROOT / path).read_text(encoding="utf-8")).body
        if isinstance(node, ast.ClassDef)
    }
    assert named == set(errors.__all__)
    assert all(issubclass(getattr(errors, name), errors.I2LError) for name in named)


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
