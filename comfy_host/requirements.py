"""What ComfyUI's Python must have, looked up before any work, and the command that installs it.

onnxruntime comes in several packages (onnxruntime, onnxruntime-gpu, onnxruntime-directml ...) that put their files into
the same folder: installing one over another replaces its libraries, and other node packs lose their GPU without a word.
pip cannot say "any of these", so requirements.txt has none of them, and the one that is there is taken if it is new
enough. Which one it is, is asked of the module itself.
"""

import importlib
import re
import shlex
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib.metadata import packages_distributions
from importlib.util import find_spec
from pathlib import Path, PurePath

from .errors import NodePackIncomplete

MODULES = ("numpy", "safetensors", "PIL", "filelock", "onnx", "onnxscript", "onnx_ir")
"""What computing and building import, besides torch and onnxruntime."""
ONNXRUNTIME_FROM = "1.23"
REQUIREMENTS = Path(__file__).parents[1] / "requirements.txt"


def absent_packages() -> list[str]:
    """Modules that are not installed; none is imported, so that starting ComfyUI does not pay for it."""
    return [name for name in (*MODULES, "onnxruntime") if find_spec(name) is None]


def require_packages() -> None:
    """Raise :class:`NodePackIncomplete` unless all packages are there and onnxruntime is new enough."""
    if absent := absent_packages():
        is_absent = "is" if len(absent) == 1 else "are"
        raise NodePackIncomplete(f"{' and '.join(absent)} {is_absent} not installed", install_command(absent))
    try:
        found = str(importlib.import_module("onnxruntime").__version__)
    except ImportError as error:
        reason = f"onnxruntime is installed, but cannot be imported ({error})"
        raise NodePackIncomplete(reason, install_command(["onnxruntime"], again=True)) from error
    if _numbers(found) < _numbers(ONNXRUNTIME_FROM):
        reason = f"onnxruntime {found} is older than {ONNXRUNTIME_FROM}"
        raise NodePackIncomplete(reason, install_command(["onnxruntime"]))


def install_command(modules: Sequence[str], *, again: bool = False) -> str:
    """The command that installs modules into ComfyUI's Python, for a terminal of this system.

    Args:
        modules: absent, too old or broken.
        again: also if pip takes it for installed.
    """
    words = ["-m", "pip", "install", *(["--force-reinstall", "--no-deps"] if again else [])]
    if any(name != "onnxruntime" for name in modules):
        words += ["-r", str(REQUIREMENTS)]
    if "onnxruntime" in modules:  # the package that is there grows; another beside it would overwrite its files
        package = (packages_distributions().get("onnxruntime") or ["onnxruntime"])[0]
        words.append(f"{package}>={ONNXRUNTIME_FROM}")
    return shell_command(Path(sys.executable), words, windows=sys.platform == "win32")


def shell_command(program: PurePath, words: Sequence[str], *, windows: bool) -> str:
    """A command that can be pasted: into sh, or on Windows into both cmd.exe and PowerShell.

    PowerShell takes a quoted program for a text. So where its path needs quotes, the command goes to its folder first,
    by ``pushd``, which both have and which changes the drive, too.
    """
    if not windows:
        return " ".join(map(shlex.quote, [str(program), *words]))
    quoted = [word if re.fullmatch(r"[\w.:\\/+-]+", word) else f'"{word}"' for word in words]
    if re.fullmatch(r"[\w.:\\-]+", str(program)):
        return " ".join([str(program), *quoted])
    return f'pushd "{program.parent}"\n' + " ".join([f".\\{program.name}", *quoted])


@contextmanager
def pack_requirements() -> Iterator[None]:
    """Turn the import error of what a required package itself needs into the command that installs it."""
    require_packages()
    try:
        yield
    except ModuleNotFoundError as error:
        name = error.name or str(error)
        raise NodePackIncomplete(f"{name} is not installed", install_command([name])) from error


def _numbers(version: str) -> tuple[int, ...]:
    """``(1, 23)`` of ``1.23.0rc1``."""
    return tuple(int(number) for number in re.findall(r"\d+", version)[:2])
