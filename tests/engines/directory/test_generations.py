"""One engines directory for several generations of GPUs: which packs for whom, and what a rebuild keeps."""

import importlib.util
import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from conftest import MakeEngines, MakeModels
from i2l.cli import main
from i2l.engines.directory.generations import FP8_FOLDER, engines_for, fp8_engines, remove_fp8_engines
from i2l.engines.directory.hashing import FileFacts
from i2l.engines.directory.manifest import read_manifest
from i2l.engines.tensorrt.plans import planned_generations
from i2l.errors import EnginesMissing, PrecisionUnsupported
from i2l.export import build, build_folder
from i2l.export.backends.cards import require_precision
from i2l.export.build import build_engines
from i2l.export.packs.packs import write_pack
from i2l.export.parts import Part, PlannedBuild, build_parts, peak_bytes, plan_parts
from i2l.look.inspection import inspect_path
from i2l.machine import files

BOTH = plan_parts("auto", [86, 89])


@pytest.fixture
def own(engines: MakeEngines, tmp_path: Path) -> Path:
    """Engines of the tiny checkpoints for sm86 and sm89, as the build makes them, without plans."""
    directory = Path(shutil.copytree(engines("tiny", "int8"), tmp_path / "engines"))
    shutil.copytree(engines("tiny", "fp8"), directory / FP8_FOLDER)
    return directory


def times(directory: Path) -> dict[Path, int]:
    return {path: path.stat().st_mtime_ns for path in directory.rglob("*") if path.is_file()}


# --- which packs for whom ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("precision", "sms", "parts"),
    [
        ("auto", [], [("auto", (), ".")]),
        ("auto", [86], [("int8", (86,), ".")]),
        ("auto", [120, 89], [("fp8", (120, 89), ".")]),
        ("auto", [89, 86, 120, 75], [("int8", (86, 75), "."), ("fp8", (89, 120), FP8_FOLDER)]),
        ("int8", [86, 89], [("int8", (86, 89), ".")]),
        ("bf16", [80, 120], [("bf16", (80, 120), ".")]),
    ],
)
def test_the_parts(precision: str, sms: list[int], parts: list[tuple[str, tuple[int, ...], str]]) -> None:
    assert [(part.precision, part.sms, part.folder) for part in plan_parts(precision, sms)] == parts


def test_which_precision_for_which_generation() -> None:
    for sm, precision in [(75, "bf16"), (80, "fp8"), (120, "fp32")]:
        with pytest.raises(PrecisionUnsupported):
            require_precision(sm, precision)
    for sm, precision in [(75, "int8"), (80, "bf16"), (89, "fp8"), (120, "int8")]:
        require_precision(sm, precision)
    with pytest.raises(PrecisionUnsupported, match="sm86 cannot compute with fp8 packs"):
        plan_parts("fp8", [89, 86])


@pytest.mark.parametrize(
    ("builds", "peak"),
    [
        ([], 0),
        ([(9, 0), (9, 0)], 18),
        ([(9, 9), (9, 9)], 9),  # a new one beside the old one, twice
        ([(9, 0), (9, 9)], 18),
        ([(9, 18), (9, 0)], 9),
    ],
)
def test_disk_needed_by_builds_in_a_row(builds: list[tuple[int, int]], peak: int) -> None:
    assert peak_bytes([PlannedBuild("int8", new, old) for new, old in builds]) == peak


# --- which engines serve a card ----------------------------------------------------------------------------------


@pytest.mark.parametrize(("sm", "inner"), [(75, False), (86, False), (89, True), (120, True)])
def test_the_engines_of_a_generation(own: Path, sm: int, inner: bool) -> None:
    assert engines_for(own, sm) == (own / FP8_FOLDER if inner else own)


def test_engines_of_one_precision_serve_all(engines: MakeEngines, tmp_path: Path) -> None:
    for precision in ("int8", "fp8"):
        assert engines_for(engines("tiny", precision), 89) == engines("tiny", precision)
    with pytest.raises(EnginesMissing):
        engines_for(tmp_path, 89)


def test_inner_engines_of_other_checkpoints_serve_nobody(own: Path, models: MakeModels, tmp_path: Path) -> None:
    """Neither if they could not be removed, nor are they left on the disk."""
    mine = Path(shutil.copytree(models("tiny"), tmp_path / "models"))
    for path in mine.rglob("DINOv3*"):
        path.touch()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(build_folder, "remove_fp8_engines", lambda _: 0)
        build_engines(mine, own, precision="int8")
    assert (engines_for(own, 89), fp8_engines(own)) == (own, None)
    build_engines(mine, own, precision="int8", force=True)
    assert not (own / FP8_FOLDER).exists()


def test_a_folder_of_somebody_else_stays(own: Path) -> None:
    assert remove_fp8_engines(own) > 100_000
    (own / FP8_FOLDER).mkdir()
    (own / FP8_FOLDER / "notes.txt").write_text("mine")
    assert remove_fp8_engines(own) == 0
    assert (own / FP8_FOLDER / "notes.txt").read_text() == "mine"


# --- building ----------------------------------------------------------------------------------------------------


@pytest.fixture
def dying(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[], None]]:
    """``dying()``: from now on Ctrl-C comes in the second pack of FP8 values."""

    def install() -> None:
        def interrupted(path: Path, *arguments: Any) -> FileFacts:
            if FP8_FOLDER in path.parts and path.parent.name == "dinov3":
                raise KeyboardInterrupt
            return write_pack(path, *arguments)

        monkeypatch.setattr(build, "write_pack", interrupted)

    yield install
    monkeypatch.undo()


def test_a_build_goes_on_where_it_was_stopped(
    models: MakeModels, tmp_path: Path, dying: Callable[[], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    engines = tmp_path / "engines"
    dying()
    with pytest.raises(KeyboardInterrupt):
        build_parts(models("tiny"), engines, BOTH)
    assert engines_for(engines, 89) == engines  # int8 is whole, fp8 is not there
    assert read_manifest(engines).precision == "int8"
    assert not list((engines / FP8_FOLDER).glob("build-*"))
    monkeypatch.setattr(build, "write_pack", write_pack)
    assert [result.rebuilt for result in build_parts(models("tiny"), engines, BOTH)] == [False, True]
    assert engines_for(engines, 89) == engines / FP8_FOLDER
    before = times(engines)
    assert [result.rebuilt for result in build_parts(models("tiny"), engines, BOTH)] == [False, False]
    assert times(engines) == before


def test_a_disk_too_small_for_both_is_found_before_any_work(
    models: MakeModels, engines: MakeEngines, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    one = max(sum(facts.nbytes for facts in read_manifest(engines("tiny", p)).files.values()) for p in ("int8", "fp8"))
    monkeypatch.setattr(files, "free_bytes", lambda _: one)  # enough for either
    with pytest.raises(OSError, match="no room on the disk"):
        build_parts(models("tiny"), tmp_path / "engines", BOTH)
    assert not (tmp_path / "engines").exists()
    build_parts(models("tiny"), tmp_path / "engines", [Part("int8", "", (86,))])


# --- the commands ------------------------------------------------------------------------------------------------


def invoke(*arguments: str) -> str:
    result = CliRunner().invoke(main, arguments, catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return result.output


@pytest.mark.skipif(
    importlib.util.find_spec("tensorrt_rtx") is None,
    reason="tensorrt_rtx is not installed: it has wheels for Linux and Windows on x86-64",
)
def test_the_commands(models: MakeModels, tmp_path: Path) -> None:
    engines = tmp_path / "engines"
    inner = engines / FP8_FOLDER
    command = ["build-engines", "--models", str(models("tiny")), "--engines", str(engines)]
    with_plans = [*command, "--backend", "tensorrt"]
    both = [*with_plans, "--sm", "86", "--sm", "89"]

    said = invoke(*both)
    for words in (
        "precision int8 for sm86 (auto: no FP8 products on sm86)",
        "precision fp8 for sm89 (auto: FP8 products on sm89)",
        "precision int8 (auto: no FP8 products on sm86)",
        "precision fp8 (auto: FP8 products on sm89)",
        "sm86 (RTX 30): 8 plans by tensorrt_rtx",
        "sm89 (RTX 40): 8 plans by tensorrt_rtx",
    ):
        assert words in said
    for sm, precision in ((86, "int8"), (89, "fp8")):
        directory = engines_for(engines, sm)
        assert read_manifest(directory).precision == precision
        assert {sm: len(plans) for sm, plans in planned_generations(directory, precision).items()} == {sm: 8}

    facts = inspect_path(engines)
    assert (facts["precision"], [part["precision"] for part in facts["engines"]]) == ("int8", ["fp8"])
    said = invoke("inspect", str(engines))
    assert "sm86: 8 plans by tensorrt_rtx" in said
    assert "sm89: 8 plans by tensorrt_rtx" in said
    plan = ["plan", "--engines", str(engines), "--vram-budget", "2GiB"]
    assert [row["precision"] for row in json.loads(invoke(*plan, "--json"))] == ["int8", "fp8"]
    assert "int8 engines:" in invoke(*plan)

    before = times(engines)
    assert invoke(*both).count("nothing to do") == 4  # twice packs, twice plans
    changed = {path.name for path, at in times(engines).items() if before.get(path) != at}
    assert changed <= {"plans.json"}

    assert f"kept {inner}" in invoke(*command)
    assert inner.is_dir()
    assert f"removed {inner}" in invoke(*with_plans, "--sm", "86")
    assert not inner.exists()
    assert engines_for(engines, 89) == engines
