"""``i2l doctor --engines``: it finds what a run would find, and says it."""

import json
import logging
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from conftest import MakeEngines
from i2l.cli import main
from i2l.engines.cpu.converted import CPU_FOLDER
from i2l.engines.directory.generations import FP8_FOLDER
from i2l.engines.directory.integrity import file_facts
from i2l.engines.directory.manifest import MANIFEST, read_manifest
from i2l.engines.tensorrt.plans import FACTS, PlanFacts, plans_folder, plans_to_json, wanted_key
from i2l.look.checkup import check_engines
from i2l.runtime.pipeline import Pipeline


@pytest.fixture(autouse=True)
def quiet_log() -> Iterator[None]:
    yield
    logging.getLogger("i2l").handlers.clear()


@pytest.fixture
def int8(engines: MakeEngines, tmp_path: Path) -> Path:
    return Path(shutil.copytree(engines("tiny", "int8"), tmp_path / "engines"))


@pytest.fixture
def fp8(engines: MakeEngines, tmp_path: Path) -> Path:
    """FP8 engines that no CPU has run."""
    source = engines("tiny", "fp8")
    return Path(shutil.copytree(source, tmp_path / "fp8", ignore=shutil.ignore_patterns(CPU_FOLDER)))


def doctor(directory: Path, *options: str) -> Result:
    return CliRunner().invoke(main, ["doctor", "--engines", str(directory), *options], catch_exceptions=False)


def add_plans(engines: Path, sm: int) -> Path:
    """What stands for plans: the checks look at keys and contents, only TensorRT at the plans themselves."""
    manifest = read_manifest(engines)
    folder = plans_folder(engines, sm, manifest.precision)
    folder.mkdir(parents=True)
    plans = {}
    for graph, path in manifest.graphs.items():
        shutil.copy(engines / manifest.build / path, folder / f"{graph}.onnx")
        (folder / f"{graph}.plan").write_bytes(graph.encode())
        made = file_facts(folder / f"{graph}.plan")
        spec = manifest.models[graph.split(".")[0]].spec  # type: ignore[index]
        key = wanted_key(engines, graph, spec, manifest.precision, "tensorrt_rtx", "1.7.1", sm)
        plans[graph] = PlanFacts(key, made.sha256, made.nbytes, 0)
    (folder / FACTS).write_text(plans_to_json(plans), encoding="utf-8")
    return folder


def test_a_directory_for_every_machine(int8: Path, fp8: Path) -> None:
    shutil.copytree(fp8, int8 / FP8_FOLDER)
    add_plans(int8, 86)
    add_plans(int8 / FP8_FOLDER, 89)
    facts = check_engines(int8)
    assert facts["problem"] is None
    assert facts["leftovers"] == []
    assert [(gpu["sm"], gpu["precision"], gpu["problem"]) for gpu in facts["gpus"]] == [
        (86, "int8", None),
        (89, "fp8", None),
    ]
    result = doctor(int8)
    assert result.exit_code == 0
    lines = result.stdout.splitlines()
    assert any(line.startswith(f"engines {int8}: usable on this CPU (int8, packs of ") for line in lines)
    assert any(line.startswith("  sm89 (RTX 40), fp8: 8 plans by tensorrt_rtx 1.7.1, ") for line in lines)


def test_stale_plans_are_named(int8: Path) -> None:
    folder = add_plans(int8, 86)
    (folder / "dinov3.block.plan").write_bytes(b"other")
    (gpu,) = check_engines(int8)["gpus"]
    assert "dinov3.block.plan" in gpu["problem"]
    (folder / "adapter.attention.plan").unlink()
    (gpu,) = check_engines(int8)["gpus"]
    assert "i2l build-engines" in gpu["problem"]
    assert gpu["problem"] in doctor(int8).stdout  # the CPU runs all the same
    assert doctor(int8).exit_code == 0


def test_the_cpus_form_of_fp8(fp8: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    needed = check_engines(fp8)["convert_bytes"]
    assert "the first run converts them to int8, once: " in doctor(fp8).stdout
    with monkeypatch.context() as patch:
        patch.setattr("i2l.machine.files.free_bytes", lambda _: 1000)
        result = doctor(fp8, "--json")
        assert result.exit_code == 1
        assert "1000 B free" in json.loads(result.stdout)["engines"]["problem"]
        assert result.stderr.count("error: no room on the disk") == 1
    assert not (fp8 / CPU_FOLDER).exists()
    Pipeline(fp8, backend="cpu").close()
    packs = [path.stat().st_size for path in (fp8 / CPU_FOLDER).rglob("*.safetensors")]
    assert needed == sum(packs)
    assert check_engines(fp8)["convert_bytes"] == 0
    assert "int8 form is there" in doctor(fp8).stdout


def test_what_nothing_uses_is_named(int8: Path, fp8: Path) -> None:
    shutil.copytree(fp8, int8 / FP8_FOLDER)
    manifest = json.loads((int8 / FP8_FOLDER / MANIFEST).read_text())
    manifest["models"]["dinov3"]["checkpoint"]["mtime_ns"] += 1
    (int8 / FP8_FOLDER / MANIFEST).write_text(json.dumps(manifest))
    (int8 / "build-dead").mkdir()
    (int8 / "plans" / "sm89-fp8").mkdir(parents=True)
    facts = check_engines(int8)
    assert facts["gpus"] == []
    assert [leftover.split(",")[0] for leftover in facts["leftovers"]] == [
        str(int8 / name) for name in ("build-dead", "plans/sm89-fp8", FP8_FOLDER)
    ]


@pytest.mark.parametrize("damage", ["truncated pack", "no manifest"])
def test_a_directory_that_no_run_would_take(int8: Path, damage: str) -> None:
    if damage == "no manifest":
        (int8 / MANIFEST).unlink()
    else:
        pack = int8 / read_manifest(int8).build / "siglip2" / "weights.safetensors"
        pack.write_bytes(pack.read_bytes()[:-1])
    result = doctor(int8)
    assert result.exit_code == 1
    assert "backend cpu: works" in result.stdout  # the rest is said all the same
    assert result.stdout.endswith(f"engines {int8}: no\n")
    (line,) = result.stderr.splitlines()
    assert line.startswith("error: ")
    assert "i2l build-engines" in line
