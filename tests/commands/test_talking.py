"""What the commands say and leave unsaid: remarks, forecasts, where a value came from, what was meant instead."""

import json
import logging
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from conftest import MakeEngines, MakeModels, picture
from i2l.cli import main
from i2l.engines.directory.manifest import read_manifest
from i2l.export.packs.planning import planned_model
from i2l.look.forecast import build_seconds, lora_bytes, roughly, seconds_per_image
from i2l.lora.lora import Lora
from i2l.lora.reading import read_lora
from i2l.machine import files
from i2l.machine.progress import LINE_SECONDS, log_lines
from i2l.specs import PRESETS


@pytest.fixture(autouse=True)
def quiet_log() -> Iterator[None]:
    yield
    logging.getLogger("i2l").handlers.clear()


def i2l(*arguments: object, **environment: str) -> Result:
    return CliRunner().invoke(main, [str(a) for a in arguments], catch_exceptions=False, env=environment)


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    """Two pictures, and what is none."""
    folder = tmp_path / "photos"
    (folder / "summer").mkdir(parents=True)
    for seed in range(2):
        picture(64, 64, seed).save(folder / f"{seed}.png")
    (folder / "notes.txt").write_text("no picture")
    return folder


def loras_of(folder: Path, engines: Path, photos: Path) -> list[Path]:
    assert i2l("batch", photos, "--engines", engines, "--output-dir", folder).exit_code == 0
    return sorted(folder.glob("*.safetensors"))


@pytest.mark.parametrize("command", ["run", "batch", "embed"])
def test_quiet_leaves_errors_alone(command: str, photos: Path, engines: MakeEngines, tmp_path: Path) -> None:
    output = {"run": ["--output", tmp_path / "x.safetensors"], "batch": ["--output-dir", tmp_path / "x"], "embed": []}
    directory = engines("tiny", "fp32")
    loud = i2l(command, photos, "--engines", directory, *output[command])
    assert "notes.txt" in loud.stderr
    assert loud.stdout
    quiet = i2l(command, photos, "--engines", directory, *output[command], "--quiet")
    assert (quiet.exit_code, quiet.stdout, quiet.stderr) == (0, "", "")
    wrong = i2l(command, photos, "--engines", tmp_path, *output[command], "--quiet")
    assert wrong.exit_code == 1
    assert wrong.stderr.startswith("error: ")
    assert wrong.stderr.count("\n") == 1


def test_engines_from_the_environment_are_said(photos: Path, engines: MakeEngines, tmp_path: Path) -> None:
    directory = str(engines("tiny", "fp32"))
    arguments = ("run", photos / "0.png", "--output", tmp_path / "x.safetensors")
    result = i2l(*arguments, I2L_ENGINES=directory)
    assert (result.exit_code, result.stderr) == (0, f"--engines {directory} ($I2L_ENGINES)\n")
    assert i2l(*arguments, "--quiet", I2L_ENGINES=directory).stderr == ""
    assert i2l(*arguments, "--engines", directory, I2L_ENGINES="elsewhere").stderr == ""
    assert "I2L_ENGINES" in i2l(*arguments, I2L_ENGINES="").stderr  # names what would mend it
    planned = i2l("plan", "--vram-budget", "4GiB", I2L_ENGINES=directory)
    assert (planned.exit_code, planned.stderr) == (0, f"--engines {directory} ($I2L_ENGINES)\n")
    preset = i2l("plan", "--preset", "tiny", "--vram-budget", "4GiB", I2L_ENGINES=directory)
    assert (preset.exit_code, preset.stderr) == (0, "")


def test_the_backend_takes_one_short_line(photos: Path, engines: MakeEngines, tmp_path: Path) -> None:
    arguments = ("run", photos / "0.png", "--engines", engines("tiny", "fp32"), "--output", tmp_path / "x.safetensors")
    assert i2l(*arguments).stdout.splitlines()[-1].endswith("backend cpu (auto: see i2l doctor)")
    assert i2l(*arguments, "--backend", "cpu").stdout.splitlines()[-1].endswith(", backend cpu")


def test_a_log_gets_a_line_now_and_then(capsys: pytest.CaptureFixture[str]) -> None:
    now = 0.0
    report = log_lines(lambda: now)
    for second in range(3 * LINE_SECONDS):
        now = float(second)
        report("dinov3", second, 100)
    assert capsys.readouterr().err == "dinov3: 10 %\ndinov3: 20 %\n"


def test_progress_in_a_log_is_there_at_once() -> None:
    """Not when the process ends: what is written before it is killed has arrived."""
    code = (
        "import os, sys; from i2l.cli import lenient_streams; lenient_streams(); "
        "sys.stderr.write('dinov3: 10 %\\n'); os._exit(0)"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert result.stderr == "dinov3: 10 %\n"


def test_completion_knows_commands_and_options() -> None:
    """As README says; asked as a shell asks."""
    command = str(Path(sys.executable).with_name("i2l"))
    asked = {"_I2L_COMPLETE": "bash_complete", "COMP_WORDS": "i2l batch --dry", "COMP_CWORD": "2"}
    answers = [
        subprocess.run([command], env=os.environ | more, capture_output=True, text=True, check=False).stdout
        for more in ({"_I2L_COMPLETE": "bash_source"}, asked)
    ]
    assert "_i2l_completion i2l" in answers[0]
    assert answers[1].strip() == "plain,--dry-run"


# --- what was meant ----------------------------------------------------------------------------------------------


def test_a_web_address_is_no_path(tmp_path: Path) -> None:
    result = i2l("run", "https://example.org/a.jpg", "--engines", tmp_path, "--output", tmp_path / "x.safetensors")
    assert result.exit_code == 2
    assert "https://example.org/a.jpg is a web address: download it" in result.stderr.replace("\n", " ")


def test_a_batch_of_a_file_or_of_nothing(photos: Path, engines: MakeEngines, tmp_path: Path) -> None:
    options = ("--engines", engines("tiny", "fp32"), "--output-dir", tmp_path / "x")
    assert "0.png is a file, not a folder: give a folder" in i2l("batch", photos / "0.png", *options).stderr
    assert "no is not there: check the name" in i2l("batch", photos / "no", *options).stderr
    assert not (tmp_path / "x").exists()


def test_inspecting_a_folder_tells_loras_from_other_files(photos: Path, engines: MakeEngines, tmp_path: Path) -> None:
    directory = engines("tiny", "fp32")
    first, _ = loras_of(tmp_path / "loras", directory, photos)
    facts = json.loads(i2l("inspect", tmp_path / "loras", "--json").stdout)
    assert facts["kind"] == "loras"
    assert [Path(lora["path"]).name for lora in facts["loras"]] == ["0.safetensors", "1.safetensors"]
    assert facts["problems"] == facts["others"] == []
    assert "problems" not in i2l("inspect", tmp_path / "loras").stdout
    pack = directory / read_manifest(directory).build / "siglip2" / "weights.safetensors"
    (tmp_path / "loras" / "pack.safetensors").write_bytes(pack.read_bytes())
    facts = json.loads(i2l("inspect", tmp_path / "loras", "--json").stdout)
    assert (len(facts["loras"]), facts["others"], facts["problems"]) == (2, ["pack.safetensors"], [])
    assert str(first) in i2l("inspect", tmp_path / "loras").stdout


def test_merging_a_folder_is_merging_its_files(photos: Path, engines: MakeEngines, tmp_path: Path) -> None:
    """Merged into the folder itself, a second time too: the result is no input."""
    folder = tmp_path / "loras"
    loras = loras_of(folder, engines("tiny", "fp32"), photos)
    assert i2l("merge", *loras, "--output", tmp_path / "files.safetensors").exit_code == 0
    for _ in range(2):
        assert i2l("merge", folder, "--output", folder / "all.safetensors").exit_code == 0
        assert read_lora(folder / "all.safetensors").lora.rank == 8
    assert i2l("merge", photos, "--output", tmp_path / "x.safetensors").exit_code == 1
    loras[1].unlink()
    alone = i2l("merge", folder, "--output", folder / "all.safetensors")
    assert alone.exit_code == 2
    assert "two LoRA files or more" in alone.stderr


# --- forecasts ---------------------------------------------------------------------------------------------------


def test_a_batch_is_forecast_and_nothing_is_made(photos: Path, engines: MakeEngines, tmp_path: Path) -> None:
    directory, output = engines("tiny", "int8"), tmp_path / "loras"
    arguments = ("batch", photos, "--engines", directory, "--output-dir", output)
    result = i2l(*arguments, "--dry-run")
    assert result.exit_code == 0
    assert not output.exists()
    first, *named, last = result.stdout.splitlines()
    assert first.startswith(f"2 LoRAs from 2 pictures to {output}, 0 there already")
    assert named == [f"  {output / '0.safetensors'}", f"  {output / '1.safetensors'}"]
    assert "predicted" in last
    facts = json.loads(i2l(*arguments, "--dry-run", "--json").stdout)
    assert facts["outputs"] == [line.strip() for line in named]
    assert 0 < facts["bytes"] < facts["free_bytes"]
    assert facts["predicted_seconds"] > 0
    assert i2l(*arguments).exit_code == 0
    bytes_forecast = lora_bytes(PRESETS["tiny"].adapter, [1, 1], "bf16")
    header = 20_000  # at most, of each
    assert bytes_forecast < sum(path.stat().st_size for path in output.iterdir()) < bytes_forecast + 2 * header
    assert "0 LoRAs from 0 pictures" in i2l(*arguments, "--dry-run").stdout


@pytest.mark.parametrize("options", [[], ["--json"]])
def test_a_batch_without_room_is_forecast_to_fail(
    photos: Path, engines: MakeEngines, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, options: list[str]
) -> None:
    monkeypatch.setattr(files, "free_bytes", lambda _: 1000)
    output = tmp_path / "loras"
    result = i2l("batch", photos, "--engines", engines("tiny", "int8"), "--output-dir", output, "--dry-run", *options)
    assert result.exit_code == 1
    assert result.stdout
    assert f"error: no room on the disk of {output}" in result.stderr


def test_the_size_of_a_lora_is_known_beforehand(tmp_path: Path, engines: MakeEngines, photos: Path) -> None:
    loras = loras_of(tmp_path / "loras", engines("tiny", "fp32"), photos)
    lora: Lora = read_lora(loras[0]).lora
    values = sum(a.size + b.size for a, b in lora.factors.values())
    assert lora_bytes(PRESETS["tiny"].adapter, [1], "bf16") == 2 * values
    assert lora_bytes(PRESETS["tiny"].adapter, [2, 1], "fp32") == 3 * 4 * values


def test_a_build_is_forecast_and_nothing_is_made(models: MakeModels, engines: MakeEngines, tmp_path: Path) -> None:
    arguments = ("build-engines", "--models", models("tiny"), "--precision", "fp32", "--dry-run", "--engines")
    result = i2l(*arguments, tmp_path / "engines")
    assert result.exit_code == 0
    assert not (tmp_path / "engines").exists()
    lines = result.stdout.splitlines()
    assert [line.split(":")[0] for line in lines[:3]] == ["from siglip2", "from dinov3", "from adapter"]
    assert lines[3].endswith(" in fp32")
    assert "of disk" in lines[4]
    assert "about 20 s" in lines[4]
    assert "nothing to do" in i2l(*arguments, engines("tiny", "fp32")).stdout


def test_times_are_those_that_were_measured() -> None:
    """At full size, on the machine of the measurement; and none for what was not measured."""
    full = {spec.family: planned_model(spec, "int8") for spec in PRESETS["full"]}
    assert seconds_per_image(full, "int8") == pytest.approx(40.02 / 4, rel=0.01)
    assert seconds_per_image(full, "bf16") is None
    assert build_seconds(round(8.92 * 2**30)) == pytest.approx(61.1)
    assert [roughly(seconds).split(" on ")[0] for seconds in (59.6, 3600)] == ["about 60 s", "about 60 min"]
    assert "not predicted" in roughly(None)
