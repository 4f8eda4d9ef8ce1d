"""What docs/architecture.md draws and says, against the files and their imports; and the sizes of the house."""

import re
from functools import cache
from pathlib import Path
from statistics import median

import pytest
from test_imports import DOORS, MAY_IMPORT, ROOT, imports, module_of, room, sources

from i2l.engines.backends import BACKENDS

PAGE = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
WAYS = {"i2l build-engines": "commands.build_engines", "i2l run": "commands.run"}
SAME_JOB = {
    "__init__.py": "a package",
    "backend.py": "a backend, for each kind",
    "base.py": "a protocol: of a backend, of a precision",
    "errors.py": "what can go wrong, for each room",
    "progress.py": "progress shown, on the terminal and in ComfyUI",
}
"""Names that several folders have."""


@cache
def uses(module: str) -> frozenset[str]:
    """The modules of ours that a module imports, and those that the registry imports for it."""
    path = ROOT / f"{module.replace('.', '/')}.py"
    if not path.is_file():
        return frozenset()
    names = [name for name, ours, _ in imports(path.read_text(encoding="utf-8"), module, is_package=False) if ours]
    if module == "engines.backends":
        names += [f"engines{place}.OFFER" for place in BACKENDS.values()]
    modules = {module_of(source) for source in sources()} - {""}
    return frozenset(name if name in modules else name.rpartition(".")[0] for name in names) & modules


def reached(module: str) -> set[str]:
    """Everything that a module imports, whether itself or through others."""
    seen: set[str] = set()
    waiting = [module]
    while waiting:
        if (here := waiting.pop()) not in seen:
            seen.add(here)
            waiting += uses(here)
    return seen


def drawn_from_imports() -> list[str]:
    """The arrows between rooms that no others imply."""
    rooms: dict[str, set[str]] = {name: set() for name in MAY_IMPORT}
    for module in map(module_of, sources()):
        if (here := room(module)) not in DOORS:
            rooms[here] |= {room(name) for name in uses(module)} - {here}
    implied = {name: set[str]() for name in rooms}
    for name, used in rooms.items():  # the table goes one way, so what a room uses is done
        implied[name] = used.union(*(implied[other] for other in used))
    direct = {
        name: sorted(other for other in used if not any(other in implied[between] for between in used))
        for name, used in rooms.items()
    }
    return [f"{name} --> {' & '.join(direct[name])}" for name in reversed(MAY_IMPORT) if direct[name]]


def test_the_picture_of_the_rooms_is_what_the_imports_say() -> None:
    (picture,) = re.findall(r"```mermaid\ngraph TD\n(.*?)```", PAGE, re.DOTALL)
    assert picture.splitlines() == drawn_from_imports()


def test_the_way_of_the_data_goes_through_files_that_the_command_reaches() -> None:
    (text,) = re.findall(r"```text\n(.*?)```", PAGE, re.DOTALL)
    command, lines = "", 0
    for line in text.splitlines():
        if not line.startswith(" "):
            command = WAYS[line]
            continue
        (path,) = re.findall(r"\S+\.py", line)
        assert module_of(path) in reached(command), f"{command} does not reach {path}"
        lines += 1
    assert lines > 10


@pytest.mark.parametrize("thing", ["backend", "precision", "model", "command"])
def test_adding_takes_five_steps_with_files_that_are_there(thing: str) -> None:
    (section,) = re.findall(rf"## To add a {thing}\n(.*?)(?=\n## |\Z)", PAGE, re.DOTALL)
    assert len(re.findall(r"^\d\. ", section, re.MULTILINE)) == 5
    paths = [path for path in re.findall(r"`([\w/]+\.(?:py|md|toml))`", section) if "NAME" not in path]
    assert paths
    assert [path for path in paths if not (ROOT / path).is_file()] == []


PAGES = [*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md"), *(ROOT / "benchmarks").glob("*.md")]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_files_that_pages_name_are_there(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    names = re.findall(r"`((?:[\w.]+/)+\w+\.(?:py|md|c))`", text)
    links = re.findall(r"\]\(([^)#:]+)\)", text)
    missing = [name for name in names if "NAME" not in name and not (ROOT / name).exists()]
    assert missing + [link for link in links if not (page.parent / link).exists()] == []


def test_the_page_is_short() -> None:
    assert len(PAGE.splitlines()) < 140


def test_every_file_is_short() -> None:
    lengths = {path: len((ROOT / path).read_text(encoding="utf-8").splitlines()) for path in sources()}
    assert {path: lines for path, lines in lengths.items() if lines >= 300} == {}
    assert median(lengths.values()) < 130


def test_every_folder_can_be_looked_over() -> None:
    """At most 12 files in a row, the root by name; the same for the tests."""
    root = {"__init__.py", "__main__.py", "cli.py", "comfy_nodes.py", "errors.py", "specs.py"}
    assert {path for path in sources() if "/" not in path} == root
    tests = (path.relative_to(ROOT).as_posix() for path in (ROOT / "tests").rglob("*.py"))
    count: dict[str, int] = {}
    for path in (*sources(), *tests):
        folder = Path(path).parent.as_posix()
        count[folder] = count.get(folder, 0) + 1
    del count["."]
    assert {folder: files for folder, files in count.items() if files > 12} == {}


def test_a_name_is_used_once_unless_it_is_the_same_job() -> None:
    names = [Path(path).name for path in sources()]
    assert {name for name in names if names.count(name) > 1} == SAME_JOB.keys()


def test_every_folder_is_packaged_and_the_licence_is_there() -> None:
    project = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    folders = {Path(path).parent.as_posix() for path in sources()}
    folders -= {"comfy_host", "comfy_host/pictures"}  # the wheel has no nodes
    names = {"i2l" if folder == "." else f"i2l.{folder.replace('/', '.')}" for folder in folders}
    (listed,) = re.findall(r"^packages = \[(.*?)\]", project, re.DOTALL | re.MULTILINE)
    assert sorted(re.findall(r'"(.*?)"', listed)) == sorted(names)
    assert 'license = "Apache-2.0"\nlicense-files = ["LICENSE", "NOTICE"]\n' in project
    assert (ROOT / "NOTICE").is_file()
    assert "Apache License" in (ROOT / "LICENSE").read_text(encoding="utf-8")
