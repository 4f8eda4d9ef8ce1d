"""What is shipped: a wheel without nodes and tests, an sdist with everything, and what README says of the extras."""

import re
import shutil
import subprocess
import sys
import tarfile
import tomllib
import zipfile
from pathlib import Path

import pytest
from test_imports import ROOT, sources

PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
README = (ROOT / "README.md").read_text(encoding="utf-8")
NOT_OURS = [".git", *(line.strip("/") for line in (ROOT / ".gitignore").read_text(encoding="utf-8").split())]
BUILD = "import setuptools.build_meta as backend; backend.build_wheel('{0}'); backend.build_sdist('{0}')"


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the wheel and the sdist, and ``source``, the copy that they were built from."""
    folder = tmp_path_factory.mktemp("built")
    shutil.copytree(ROOT, folder / "source", ignore=shutil.ignore_patterns(*NOT_OURS))
    before = sorted(path for path in (folder / "source").rglob("*") if path.is_file())
    (folder / "before").write_text("\n".join(path.relative_to(folder / "source").as_posix() for path in before))
    command = [sys.executable, "-c", BUILD.format(folder)]
    subprocess.run(command, cwd=folder / "source", check=True, capture_output=True)
    return folder


def test_the_wheel_is_the_package_without_nodes_and_tests(built: Path) -> None:
    (wheel,) = built.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        names = {name for name in archive.namelist() if ".dist-info/" not in name}
        archive.extractall(built / "installed")
    ours = {path for path in sources() if not path.startswith("comfy_")}
    page = {f"i2l/{path.relative_to(ROOT).as_posix()}" for path in (ROOT / "serve" / "page").iterdir()}
    assert names == {f"i2l/{path}" for path in ours} | page | {"i2l/py.typed"}
    code = "import i2l.cli, i2l.errors; from i2l import Lora, open_engines; print(i2l.__file__)"
    run = subprocess.run(
        [sys.executable, "-c", code], cwd=built / "installed", check=True, capture_output=True, text=True
    )
    assert Path(run.stdout.strip()) == built / "installed" / "i2l" / "__init__.py"


def test_the_sdist_is_whole(built: Path) -> None:
    (sdist,) = built.glob("*.tar.gz")
    with tarfile.open(sdist) as archive:
        names = {member.name.partition("/")[2] for member in archive.getmembers() if member.isfile()}
    assert set((built / "before").read_text().splitlines()) - names == set()


def test_the_description_has_no_dead_links(built: Path) -> None:
    (wheel,) = built.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        (name,) = [name for name in archive.namelist() if name.endswith("METADATA")]
        _, _, description = archive.read(name).decode().partition("\n\n")
    assert description.startswith("# i2l")
    assert [link for link in re.findall(r"\]\(([^)]*)\)", description) if not link.startswith("https:")] == []


def test_the_extras_are_in_the_readme() -> None:
    """One row for each, by what a user wants; ``dev`` is for whoever changes i2l."""
    rows = re.findall(r"^\| `(\w+)` \|", README, re.MULTILINE)
    extras = PROJECT["optional-dependencies"].keys() - {"dev"}
    assert extras <= set(rows)
    named = re.findall(r"\[([a-z,]+)\]['\"]", README)
    assert {extra for names in named for extra in names.split(",")} <= extras


def test_the_pythons_are_the_same_everywhere() -> None:
    versions = [name.rpartition(" ")[2] for name in PROJECT["classifiers"] if "Python :: 3." in name]
    assert PROJECT["requires-python"] == f">={versions[0]}"
    assert f"Python {versions[0]} to {versions[-1]}" in README
