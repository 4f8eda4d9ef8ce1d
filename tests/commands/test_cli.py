"""The command line as a user meets it: exit codes, one error line, JSON, and nothing lost on any failure."""

import dataclasses
import errno
import importlib.util
import json
import logging
import math
import os
import shlex
import shutil
import signal
import struct
import subprocess
import sys
import time
import tomllib
import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

import click
import numpy as np
import pytest
import safetensors.torch
import torch
from click.testing import CliRunner, Result
from safetensors import safe_open
from safetensors.numpy import load_file

from conftest import MakeEngines, MakeModels, picture
from i2l.cli import main
from i2l.engines.backends import BACKENDS
from i2l.engines.cpu import backend as ort
from i2l.engines.directory.integrity import CHECKED
from i2l.engines.directory.manifest import MANIFEST, read_manifest
from i2l.engines.directory.tensorfile import LayoutWriter
from i2l.export.checkpoints.shapes import shape_hash
from i2l.look.diagnosis import EXTRAS
from i2l.lora.lora import Lora
from i2l.machine import files, progress
from i2l.runtime.pipeline import open_engines
from i2l.specs import PRESETS

TINY = PRESETS["tiny"]
SEED_LAYOUT = {
    "siglip2": "CLIPS/SigLIP2-G384.safetensors",
    "dinov3": "CLIPS/DINOv3-7B.safetensors",
    "adapter": "Z-Image/Z-Image-i2L.safetensors",
}


@pytest.fixture(autouse=True)
def quiet_log() -> Iterator[None]:
    """The command line's log handler keeps the stream it was made with, which here ends with the test."""
    yield
    logging.getLogger("i2l").handlers.clear()


def i2l(*arguments: object) -> Result:
    """Run a command; anything but an explained error ends the test."""
    return CliRunner().invoke(main, [str(argument) for argument in arguments], catch_exceptions=False)


def error_line(result: Result) -> str:
    """The one ``error:`` line of a command that failed as it should."""
    assert result.exit_code == 1
    (line,) = [line for line in result.stderr.splitlines() if line.startswith("error:")]
    assert result.stderr.endswith(f"{line}\n")
    assert "Traceback" not in result.stderr
    return line


Arguments: TypeAlias = list[Path | str]


@dataclass(frozen=True)
class Place:
    """Where a case is set up: a folder of its own, and good inputs that it must not change."""

    folder: Path
    models: Path
    engines: Path
    photo: Path

    @property
    def output(self) -> Path:
        return self.folder / "out" / "lora.safetensors"

    def run(self, *, image: Path | None = None, engines: Path | None = None, output: Path | None = None) -> Arguments:
        return ["run", image or self.photo, "--engines", engines or self.engines, "--output", output or self.output]

    def build(self, models: Path) -> Arguments:
        return ["build-engines", "--models", models, "--engines", self.folder / "engines"]

    def file(self, name: str, content: bytes = b"") -> Path:
        (self.folder / name).write_bytes(content)
        return self.folder / name

    def own_engines(self) -> Path:
        return Path(shutil.copytree(self.engines, self.folder / "own-engines"))

    def own_models(self) -> Path:
        return Path(shutil.copytree(self.models, self.folder / "own-models"))


def lora_of_zeros() -> Lora:
    return Lora({"zero": (np.zeros((1, 8), np.float32), np.zeros((8, 1), np.float32))})


@pytest.fixture
def place(models: MakeModels, engines: MakeEngines, photo: Path, tmp_path: Path) -> Place:
    """Good inputs, and an output file that is there already."""
    place = Place(tmp_path, models("tiny"), engines("tiny", "fp32"), photo)
    place.output.parent.mkdir()
    lora_of_zeros().save(place.output)
    return place


# --- what goes wrong ---------------------------------------------------------------------------------------------

Case = Callable[[Place], Arguments]


def huge_png(place: Place) -> Path:
    """A header of 20,000 x 20,000 pixels and hardly any data."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = chunk(b"IHDR", struct.pack(">IIBBBBB", 20_000, 20_000, 8, 2, 0, 0, 0))
    data = chunk(b"IDAT", zlib.compress(b"")) + chunk(b"IEND", b"")
    return place.file("huge.png", b"\x89PNG\r\n\x1a\n" + header + data)


def one_pixel(place: Place) -> Path:
    picture(1, 1).save(place.folder / "dot.png")
    return place.folder / "dot.png"


def truncated_jpeg(place: Place) -> Path:
    data = place.photo.read_bytes()
    return place.file("half.jpg", data[: len(data) // 2])


def damaged_engines(place: Place) -> Path:
    directory = place.own_engines()
    pack = directory / read_manifest(directory).build / "dinov3" / "weights.safetensors"
    data = bytearray(pack.read_bytes())
    data[-1] ^= 1
    pack.write_bytes(data)
    return directory


def engines_without_manifest(place: Place) -> Path:
    directory = place.own_engines()
    (directory / MANIFEST).unlink()
    return directory


def engines_with_garbage(place: Place) -> Path:
    directory = place.own_engines()
    (directory / MANIFEST).write_bytes(b"\xff\xfe\x00\x80garbage")
    return directory


def empty_folder(place: Place) -> Path:
    (place.folder / "nothing").mkdir()
    return place.folder / "nothing"


def pipe(place: Place) -> Path:
    if sys.platform == "win32":
        pytest.skip("Windows has no such call")
    os.mkfifo(place.folder / "pipe")
    return place.folder / "pipe"


RUN_FAILURES: dict[str, tuple[Case, Sequence[str]]] = {
    "absent image": (lambda p: p.run(image=p.folder / "no.jpg"), ["no.jpg is not there"]),
    "truncated JPEG": (lambda p: p.run(image=truncated_jpeg(p)), ["half.jpg", "truncated"]),
    "no picture": (lambda p: p.run(image=p.file("text.jpg", b"hello")), ["text.jpg", "no known picture format"]),
    "empty image": (lambda p: p.run(image=p.file("empty.jpg")), ["empty.jpg", "it is empty"]),
    "folder without images": (lambda p: p.run(image=p.folder), ["holds no image", ".jpg"]),
    "1 x 1": (lambda p: p.run(image=one_pixel(p)), ["1 x 1 pixels"]),
    "20000 x 20000": (lambda p: p.run(image=huge_png(p)), ["20000 x 20000 pixels", "resize or crop"]),
    "no such user": (
        lambda p: p.run(image=Path("~nobody-of-that-name.jpg")),
        ["~nobody-of-that-name.jpg is not there"],
    ),
    "absent engines": (lambda p: p.run(engines=p.folder / "no"), ["no manifest.json", "i2l build-engines"]),
    "no manifest": (lambda p: p.run(engines=engines_without_manifest(p)), ["no manifest.json", "i2l build-engines"]),
    "garbage manifest": (lambda p: p.run(engines=engines_with_garbage(p)), ["manifest.json", "i2l build-engines"]),
    "engines are a file": (lambda p: p.run(engines=p.photo), ["no manifest.json", "i2l build-engines"]),
    "damaged engines": (
        lambda p: p.run(engines=damaged_engines(p)),
        ["dinov3/weights.safetensors", "content hash differs", "i2l build-engines", "--force"],
    ),
    "output is a folder": (lambda p: p.run(output=p.folder), ["cannot write", "it is a folder"]),
    "output is empty": (lambda p: [*p.run()[:-1], ""], ["cannot write", "it is a folder"]),
    "output is the root": (lambda p: p.run(output=Path("/")), ["cannot write", "it is a folder"]),
    "output is a pipe": (lambda p: p.run(output=pipe(p)), ["cannot write", "not a file"]),
    "output under a file": (lambda p: p.run(output=p.photo / "lora"), ["cannot write", "Not a directory"]),
    "output far under a file": (lambda p: p.run(output=p.photo / "a" / "lora"), ["cannot write", "Not a directory"]),
    "output in /proc": (lambda p: p.run(output=Path("/proc/lora")), ["cannot write /proc/lora"]),
    "no cuda": (lambda p: [*p.run(), "--backend", "cuda"], ["backend cuda cannot run here"]),
    "no tensorrt": (lambda p: [*p.run(), "--backend", "tensorrt"], ["backend tensorrt cannot run here"]),
    "too strong": (lambda p: [*p.run(), "--strength", "1e9", "--dtype", "fp16"], ["too large for fp16", "fp32"]),
}


def without(family: str) -> Callable[[Place], Path]:
    def make(place: Place) -> Path:
        models = place.own_models()
        (models / SEED_LAYOUT[family]).unlink()
        return models

    return make


def truncated_models(place: Place) -> Path:
    models = place.own_models()
    path = models / SEED_LAYOUT["dinov3"]
    os.truncate(path, path.stat().st_size // 2)
    return models


def nearly_right_models(place: Place) -> Path:
    """One tensor missing, one too many, one of another shape."""
    models = place.own_models()
    path = models / SEED_LAYOUT["siglip2"]
    with safe_open(path, framework="pt") as file:
        metadata = file.metadata()
    tensors = safetensors.torch.load_file(path)
    del tensors["post_layernorm.bias"]
    tensors["logit_scale"] = torch.zeros(1)
    tensors["head.probe"] = torch.zeros(1, 2, 64)
    safetensors.torch.save_file(tensors, path, metadata)
    return models


def ambiguous_models(place: Place) -> Path:
    models = place.own_models()
    data = bytearray((models / SEED_LAYOUT["adapter"]).read_bytes())
    data[-1] ^= 1  # the same content twice would be one checkpoint
    (models / "copy.safetensors").write_bytes(data)
    return models


def foreign_file(place: Place) -> Path:
    folder = place.folder / "foreign"
    folder.mkdir()
    safetensors.torch.save_file({"weight": torch.zeros(2, 2)}, folder / "sdxl.safetensors")
    return folder / "sdxl.safetensors"


OTHER_FAILURES: dict[str, tuple[Case, Sequence[str]]] = {
    "absent models": (lambda p: p.build(p.folder / "no"), ["no checkpoint for siglip2 and dinov3 and adapter"]),
    "models are a photo": (lambda p: p.build(p.photo), ["photo.jpg is not a whole safetensors file"]),
    "no adapter": (lambda p: p.build(without("adapter")(p)), ["no checkpoint for adapter", "download it there"]),
    "foreign models": (lambda p: p.build(foreign_file(p).parent), ["no checkpoint for siglip2", "download it there"]),
    "truncated models": (lambda p: p.build(truncated_models(p)), ["DINOv3-7B.safetensors", "not a whole"]),
    "nearly right models": (
        lambda p: p.build(nearly_right_models(p)),
        [
            "looks like siglip2",
            "missing: post_layernorm.bias",
            "unexpected: logit_scale",
            "head.probe is [1, 2, 64], not [1, 1, 64]",
        ],
    ),
    "a model twice": (lambda p: p.build(ambiguous_models(p)), ["2 checkpoints are adapter", "copy.safetensors"]),
    "engines under a file": (
        lambda p: ["build-engines", "--models", p.models, "--engines", p.photo / "engines"],
        ["cannot write", "Not a directory"],
    ),
    "checkpoints under a file": (
        lambda p: ["make-checkpoints", p.photo / "models"],
        ["cannot write", "Not a directory"],
    ),
    "merge nothing": (
        lambda p: ["merge", p.folder / "a.safetensors", p.folder / "b.safetensors", "--output", p.output],
        ["a.safetensors is not there"],
    ),
    "inspect nothing": (lambda p: ["inspect", p.folder / "no"], ["no is not there: give a checkpoint"]),
    "inspect an empty folder": (lambda p: ["inspect", empty_folder(p)], ["neither a checkpoint"]),
    "inspect a photo": (lambda p: ["inspect", p.photo], ["photo.jpg is a picture: give a checkpoint"]),
    "inspect an empty file": (lambda p: ["inspect", p.file("empty")], ["shorter than a header"]),
    "inspect another model": (lambda p: ["inspect", foreign_file(p)], ["neither a checkpoint"]),
    "inspect damaged engines": (lambda p: ["inspect", damaged_engines(p)], ["content hash differs"]),
    "inspect a device": (lambda _: ["inspect", "/dev/null"], ["/dev/null"]),
    "verify without models": (
        lambda p: ["verify", "--models", p.folder / "no", "--engines", p.engines],
        ["no checkpoint for"],
    ),
    "verify without a picture": (
        lambda p: ["verify", "--models", p.models, "--engines", p.engines, "--image", p.folder / "no.jpg"],
        ["no.jpg"],
    ),
}
FAILURES = {**RUN_FAILURES, **OTHER_FAILURES}


@pytest.mark.parametrize("name", FAILURES)
def test_a_failure_is_one_line_with_the_facts(place: Place, name: str) -> None:
    case, fragments = FAILURES[name]
    result = i2l(*case(place))
    line = error_line(result)
    assert result.stdout == ""
    assert [fragment for fragment in fragments if fragment not in line] == []


@pytest.mark.parametrize("name", FAILURES)
def test_a_failure_shows_its_traceback_when_asked(place: Place, name: str) -> None:
    result = i2l(*FAILURES[name][0](place), "--debug")
    assert result.exit_code == 1
    assert "Traceback (most recent call last)" in result.stderr
    assert len([line for line in result.stderr.splitlines() if line.startswith("error:")]) == 1


def files_in(folder: Path) -> dict[Path, int]:
    """Everything below a folder and when it was changed; but for ``checked.json``, which a check may write."""
    paths = [path for path in folder.rglob("*") if path.name != CHECKED]
    return {path: 0 if path.is_dir() else path.stat().st_mtime_ns for path in paths}


@pytest.mark.parametrize("name", RUN_FAILURES)
def test_a_failed_run_changes_no_file(place: Place, name: str) -> None:
    arguments = RUN_FAILURES[name][0](place)
    before = files_in(place.folder), files_in(place.photo.parent)
    i2l(*arguments)
    assert (files_in(place.folder), files_in(place.photo.parent)) == before
    assert set(load_file(place.output)) == {f"diffusion_model.zero.lora_{side}.weight" for side in "AB"}


def test_a_failed_run_makes_no_folder(place: Place) -> None:
    i2l(*place.run(image=place.folder / "no.jpg", output=place.folder / "new" / "folder" / "lora.safetensors"))
    assert not (place.folder / "new").exists()


@pytest.mark.parametrize("output", ["lora.safetensors", "new.safetensors"])
def test_a_disk_that_fills_up_while_saving(place: Place, monkeypatch: pytest.MonkeyPatch, output: str) -> None:
    real = LayoutWriter.write

    def write(self: LayoutWriter, name: str, data: bytes) -> None:
        if "noise_refiner" in name:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        real(self, name, data)

    monkeypatch.setattr(LayoutWriter, "write", write)
    line = error_line(i2l(*place.run(output=place.output.with_name(output))))
    assert f"no room on the disk of {place.output.with_name(output)}" in line
    assert [path.name for path in place.output.parent.iterdir()] == ["lora.safetensors"]
    assert set(load_file(place.output)) == {f"diffusion_model.zero.lora_{side}.weight" for side in "AB"}


@pytest.mark.parametrize(("budget", "times"), [(["--vram-budget", "8GiB"], 1), (["--vram-budget", "auto"], 0), ([], 0)])
def test_a_vram_budget_without_a_gpu_is_said_once(place: Place, budget: list[str], times: int) -> None:
    result = i2l(*place.run(), *budget)
    assert result.exit_code == 0
    assert result.stderr.count("a VRAM budget of 8.00 GiB has no effect: the backend is cpu (auto: the best") == times
    assert result.stderr.count("VRAM") == times


def test_a_disk_too_small_for_the_engines(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(files, "free_bytes", lambda _: 1 << 20)
    line = error_line(i2l(*place.build(place.models), "--precision", "fp32"))
    assert "MiB needed, 1.0 MiB free" in line
    assert not (place.folder / "engines").exists()


@pytest.mark.parametrize("backend", ["cpu", "cuda"])
def test_a_refused_build_leaves_no_folder(place: Place, monkeypatch: pytest.MonkeyPatch, backend: str) -> None:
    engines = place.folder / "none"
    arguments = ["build-engines", "--engines", engines, "--backend", backend, "--models"]
    assert "no checkpoint for" in error_line(i2l(*arguments, place.folder / "no"))
    monkeypatch.setattr(files, "free_bytes", lambda _: 1 << 10)
    assert "no room on the disk" in error_line(i2l(*arguments, place.models))
    assert not engines.exists()


def test_ctrl_c_during_a_run(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*_: object) -> dict[str, Any]:
        raise KeyboardInterrupt

    monkeypatch.setattr(ort.OrtEngine, "run", interrupted)
    result = i2l(*place.run())
    assert (result.exit_code, result.stdout) == (130, "")
    assert "error" not in result.stderr
    assert set(load_file(place.output)) == {f"diffusion_model.zero.lora_{side}.weight" for side in "AB"}


def test_verify_against_other_checkpoints(place: Place, models: MakeModels) -> None:
    line = error_line(i2l("verify", "--models", models("small"), "--engines", place.engines))
    assert "built for another siglip2" in line
    assert "i2l build-engines --models" in line


@pytest.mark.parametrize(
    "arguments",
    [
        ["run", "--engines", "e", "--output", "o"],
        ["run", "photo.jpg", "--output", "o"],
        ["run", "photo.jpg", "--engines", "e"],
        ["run", "photo.jpg", "--engines", "e", "--output", "o", "--backend", "gpu"],
        ["run", "photo.jpg", "--engines", "e", "--output", "o", "--strength", "strong"],
        ["run", "photo.jpg", "--engines", "e", "--output", "o", "--dtype", "fp8"],
        ["run", "photo.jpg", "--engines", "e", "--output", "o", "--key-format", "kohya"],
        ["run", "photo.jpg", "--engines", "e", "--output", "o", "--nonsense"],
        ["run", "photo.jpg", "--engines", "e", "--output", "o", "--backend", "cpu", "--vram-budget", "8GiB"],
        ["batch", "photos", "--engines", "e", "--output-dir", "o", "--vram-budget", "8GiB", "--backend", "cpu"],
        ["run", "photo.jpg", "--engines", "x" * 300, "--output", "o"],
        ["build-engines", "--models", "m", "--engines", "e", "--precision", "int4"],
        ["build-engines", "--models", "m", "--engines", "e", "--blocks-per-chunk", "0"],
        ["build-engines", "--models", "m"],
        ["make-checkpoints", "m", "--preset", "huge"],
        ["inspect"],
        ["inspect", "x" * 300],
        ["verify", "--models", "m"],
        ["paint"],
    ],
    ids=lambda arguments: " ".join(arguments)[:70],
)
def test_wrong_usage(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, arguments: list[str]) -> None:
    monkeypatch.chdir(tmp_path)
    result = i2l(*arguments)
    assert result.exit_code == 2
    assert result.stderr.startswith("Usage: ")
    assert list(tmp_path.iterdir()) == []


def test_a_file_that_looks_like_an_option(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "-rf.jpg").touch()
    wanted = f"To name the file, write {tmp_path / '-rf.jpg'}"
    assert wanted in i2l("run", "-rf.jpg", "--engines", "e", "--output", "o").stderr
    assert "write" not in i2l("run", "-rg.jpg", "--engines", "e", "--output", "o").stderr


@pytest.mark.parametrize("spelling", ["photo.jpg", "./photo.jpg", "link.jpg"])
def test_the_output_is_an_input(place: Place, monkeypatch: pytest.MonkeyPatch, spelling: str) -> None:
    monkeypatch.chdir(place.folder)
    photo = Path(shutil.copy(place.photo, place.folder / "photo.jpg"))
    (place.folder / "link.jpg").symlink_to(photo)
    result = i2l(*place.run(image=photo, output=Path(spelling)))
    assert result.exit_code == 1
    assert "give it a name that ends in .safetensors" in result.stderr
    assert photo.read_bytes() == place.photo.read_bytes()


def test_no_image_says_how_to_call_it() -> None:
    result = i2l("run", "--engines", "e", "--output", "o")
    assert "i2l run PHOTO.jpg --engines DIR --output LORA.safetensors" in result.stderr


# --- what goes right ---------------------------------------------------------------------------------------------


def test_run_prints_one_json_object(place: Place) -> None:
    result = i2l(*place.run(), "--json")
    assert result.exit_code == 0
    assert result.stderr == ""
    facts = json.loads(result.stdout)
    assert facts["output"] == str(place.output)
    assert (facts["tensors"], facts["rank"]) == (56, 4)
    assert facts["seconds"].keys() == {"images", "siglip2", "dinov3", "adapter", "save", "total"}
    assert all(0 <= seconds < 60 for seconds in facts["seconds"].values())
    parts = sum(seconds for stage, seconds in facts["seconds"].items() if stage != "total")
    assert facts["seconds"]["total"] == pytest.approx(parts, abs=1e-3)
    assert 20e6 < facts["peak_resident_bytes"] < 100e9
    assert facts["backend"] == "cpu"
    assert "cuda" in facts["backend_reason"]
    assert facts["precision"] == "fp32"
    assert len(safetensors.torch.load_file(place.output)) == 56


@pytest.mark.parametrize("images", [1, 3])
def test_run_writes_the_lora_of_the_pipeline(place: Place, images: int) -> None:
    paths = [place.folder / f"{index}.png" for index in range(images)]
    for index, path in enumerate(paths):
        picture(64, 48, seed=index).save(path)
    options = ("--strength", "0.5", "--dtype", "fp32", "--key-format", "diffsynth")
    result = i2l("run", *paths, "--engines", place.engines, "--output", place.output, *options)
    assert result.exit_code == 0
    with open_engines(place.engines) as pipeline:
        lora: Lora = pipeline.lora_from_images(paths, strength=0.5)
    found = safetensors.torch.load_file(place.output)
    assert len(found) == 2 * len(lora.factors)
    for module, (a, b) in lora.factors.items():
        torch.testing.assert_close(found[f"{module}.lora_A.default.weight"], torch.from_numpy(a))
        torch.testing.assert_close(found[f"{module}.lora_B.default.weight"], torch.from_numpy(b))
    assert f"rank {4 * images}" in result.stdout


def test_run_makes_the_folder_of_its_output(place: Place) -> None:
    output = place.folder / "new" / "folder" / "lora.safetensors"
    assert i2l(*place.run(output=output)).exit_code == 0
    assert [path.name for path in output.parent.iterdir()] == ["lora.safetensors"]


def test_progress_goes_to_standard_error(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(progress, "LINE_SECONDS", 0)
    result = i2l(*place.run())
    assert "dinov3: 100 %" in result.stderr
    assert "%" not in result.stdout


def test_home_is_understood_in_paths(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(place.folder))
    shutil.copy(place.photo, place.folder / "photo.jpg")
    place.own_engines()
    result = i2l("run", "~/photo.jpg", "--engines", "~/own-engines", "--output", "~/lora.safetensors")
    assert result.exit_code == 0
    assert (place.folder / "lora.safetensors").is_file()
    assert result.stdout.startswith("~/lora.safetensors: 56 tensors")
    assert i2l("inspect", "~/lora.safetensors").exit_code == 0


def test_a_file_name_that_begins_with_a_tilde(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(place.folder)
    shutil.copy(place.photo, place.folder / "~photo.jpg")
    assert i2l(*place.run(image=Path("~photo.jpg"))).exit_code == 0


def test_building_again_says_that_nothing_is_to_do(place: Place) -> None:
    engines = place.own_engines()
    result = i2l("build-engines", "--models", place.models, "--engines", engines, "--precision", "fp32")
    assert result.exit_code == 0
    assert result.stdout.startswith(f"nothing to do: {engines} is up to date (5.5 MiB, precision fp32)")


def test_making_checkpoints_says_where(tmp_path: Path) -> None:
    result = i2l("make-checkpoints", tmp_path, "--preset", "tiny", "--dtype", "f16")
    assert result.exit_code == 0
    for path in SEED_LAYOUT.values():
        assert str(tmp_path / path) in result.stdout
        assert (tmp_path / path).is_file()


# --- inspect, verify, doctor -------------------------------------------------------------------------------------


def inspected(path: Path) -> dict[str, Any]:
    result = i2l("inspect", path, "--json")
    assert result.exit_code == 0
    assert result.stdout.count("\n") == 1
    facts: dict[str, Any] = json.loads(result.stdout)
    return facts


@pytest.mark.parametrize("family", SEED_LAYOUT)
def test_inspecting_a_checkpoint(place: Place, family: str) -> None:
    path = place.models / SEED_LAYOUT[family]
    (model,) = inspected(path)["models"]
    spec = dataclasses.asdict(getattr(TINY, family))
    assert {name: model[name] for name in spec if name in model} == {n: v for n, v in spec.items() if n in model}
    wanted = {"hidden", "depth", "heads", "intermediate", "patch", "image_size", "registers", "dtype", "shape_hash"}
    assert model.keys() >= {"family", *wanted}
    with safe_open(path, framework="pt") as file:
        shapes = {key: tuple(file.get_slice(key).get_shape()) for key in file.keys()}  # noqa: SIM118
    assert model["shape_hash"] == shape_hash(shapes)
    assert model["tensors"] == len(shapes)
    assert model["dtype"] == ("F32" if family == "siglip2" else "BF16")


def test_inspecting_a_folder_of_checkpoints(place: Place) -> None:
    facts = inspected(place.models)
    assert facts["kind"] == "checkpoints"
    assert {model["family"] for model in facts["models"]} == {"siglip2", "dinov3", "adapter"}
    assert facts["problems"] == []


def test_linked_folders_are_looked_into_once(place: Place) -> None:
    """Models often lie on another disk; and links may go round in circles."""
    folder = place.folder / "links"
    folder.mkdir()
    for name in ("CLIPS", "Z-Image"):
        (folder / name).symlink_to(place.models / name)
    (folder / "again").symlink_to(folder / "CLIPS")
    (folder / "circle").symlink_to(folder)
    assert sorted(model["family"] for model in inspected(folder)["models"]) == ["adapter", "dinov3", "siglip2"]


def test_inspecting_a_folder_names_what_is_wrong(place: Place) -> None:
    facts = inspected(truncated_models(place))
    assert {model["family"] for model in facts["models"]} == {"siglip2", "adapter"}
    (problem,) = facts["problems"]
    assert "DINOv3-7B.safetensors is not a whole safetensors file" in problem


def test_inspecting_an_engines_directory(place: Place) -> None:
    facts = inspected(place.engines)
    assert facts["kind"] == "engines"
    assert facts["precision"] == "fp32"
    assert {model["family"]: model["chunks"] for model in facts["models"]} == {"siglip2": 4, "dinov3": 5, "adapter": 4}
    for path in (*facts["graphs"].values(), *(model["pack"] for model in facts["models"])):
        assert (place.engines / path).is_file()


@pytest.mark.parametrize("key_format", ["comfyui", "diffsynth"])
def test_inspecting_a_lora(place: Place, key_format: str) -> None:
    i2l(*place.run(), "--key-format", key_format, "--dtype", "fp16")
    facts = inspected(place.output)
    assert facts["metadata"].pop("modelspec.title") == "lora"
    assert {name: facts[name] for name in ("kind", "tensors", "modules", "rank", "dtype", "key_format")} == {
        "kind": "lora",
        "tensors": 56,
        "modules": 28,
        "rank": 4,
        "dtype": "F16",
        "key_format": key_format,
    }


@pytest.mark.parametrize("what", ["models", "engines"])
def test_inspecting_for_people_tells_the_same(place: Place, what: str) -> None:
    path = getattr(place, what)
    text = i2l("inspect", path).stdout.splitlines()
    for model in inspected(path)["models"]:
        for name in ("family", "hidden", "depth", "image_size", "rank"):
            if model.get(name) is not None:
                assert f"{name}: {model[name]}" in text


def test_engines_of_other_values_are_wrong(place: Place, models: MakeModels) -> None:
    """Of the same architecture: nothing about the files tells."""
    for options in ([], ["--json"]):
        wrong = i2l("verify", "--models", models("tiny", seed=1), "--engines", place.engines, *options)
        assert "is allowed: give the --models that they were built from" in error_line(wrong)
    facts = json.loads(wrong.stdout)
    assert (facts["right"], facts["lora_bound"]) == (False, 0.001)
    assert facts["lora_worst"] > 1


@pytest.mark.parametrize(("precision", "smallest", "largest"), [("fp32", 0.0, 1e-5), ("int8", 1e-4, 0.12)])
def test_verify(place: Place, engines: MakeEngines, precision: str, smallest: float, largest: float) -> None:
    """fp32 differs by summation order, int8 by what eight bits lose: neither more nor, for int8, less."""
    directory = engines("tiny", precision)
    result = i2l("verify", "--models", place.models, "--engines", directory, "--image", place.photo, "--json")
    assert result.exit_code == 0
    facts = json.loads(result.stdout)
    assert (facts["precision"], facts["backend"]) == (precision, "cpu")
    models = (read_manifest(directory).models[family] for family in ("siglip2", "dinov3"))
    assert [step["step"] for step in facts["steps"]] == [s.name for m in models for c in m.chunks for s in c.steps]
    for step in facts["steps"]:
        assert step.keys() == {"step", "cosine", "relative_error", "worst_token"}
        assert 1 - largest <= step["cosine"] <= 1 + 1e-12
        assert 0 <= step["relative_error"] <= step["worst_token"] * (1 + 1e-9) < largest
    assert smallest < facts["lora_median"] <= facts["lora_worst"] < largest
    assert facts["right"] is True
    assert facts["lora_worst_module"].split(".")[0] in {"layers", "context_refiner", "noise_refiner"}


def test_verify_for_people(place: Place) -> None:
    result = i2l("verify", "--models", place.models, "--engines", place.engines)
    assert result.exit_code == 0
    lines = result.stdout.splitlines()
    for step in ("siglip2.embed", "siglip2.head", "dinov3.embed", "dinov3.head"):
        (line,) = [line for line in lines if line.startswith(step)]
        assert all(math.isfinite(float(value)) for value in line.split()[1:])
    assert lines[-2].startswith("LoRA, B @ A per module: median ")
    assert lines[-1] == "right: in the worst module 0.001 is allowed for fp32"


@pytest.mark.parametrize("options", [[], ["--json"]])
def test_doctor_names_every_backend(options: list[str]) -> None:
    result = i2l("doctor", *options)
    assert result.exit_code == 0
    if options:
        backends = {backend["name"]: backend for backend in json.loads(result.stdout)["backends"]}
        assert list(backends) == list(BACKENDS)
        assert backends["cpu"]["works"]
        assert all(backend["works"] or backend["remedy"] for backend in backends.values())
    else:
        lines = result.stdout.splitlines()
        assert len([line for line in lines if line.startswith("backend ")]) == len(BACKENDS)
        assert [line for line in lines if line.startswith("backend cpu: works (onnxruntime ")]


def test_doctor_names_what_is_not_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    lacking = {"matplotlib", "ray", "pillow_jxl"}
    real = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name in lacking else real(name))
    lines = i2l("doctor").stdout.splitlines()
    assert lines[-5:] == [
        "build-engines, verify, make-checkpoints: works",
        'plot, plot-trace: no (matplotlib missing); pip install "i2l-engines[plot]"',
        "serve: works",
        'batch --ray: no (ray missing); pip install "i2l-engines[ray]"',
        'HEIC and JPEG XL pictures: no (pillow_jxl missing); pip install "i2l-engines[pictures]"',
    ]


def test_doctor_looks_at_every_extra() -> None:
    """Those of a backend, and what computes at all, stand in the backends' rows."""
    packages = tomllib.loads((Path(__file__).parents[2] / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    assert packages["optional-dependencies"].keys() == {*EXTRAS, "cpu", "gpu", "rtx", "cuda", "tensorrt", "dev"}


def test_help_lists_the_commands_as_they_are_used() -> None:
    lines = i2l("--help").stdout.split("Commands:\n")[1].splitlines()
    assert [line.split()[0] for line in lines][:3] == ["build-engines", "run", "batch"]
    assert [line for line in lines if not line.endswith(".") or line.endswith("...")] == []  # nothing is cut off


def commands_of(page: Path) -> Iterator[list[str]]:
    """Every line of a page that is an ``i2l`` command, continued lines joined, without its comment."""
    for line in page.read_text(encoding="utf-8").replace("\\\n", "").splitlines():
        if line.strip().startswith("i2l "):
            yield shlex.split(line, comments=True)


@pytest.mark.parametrize("page", ["README.md", "docs/gpu.md"])
def test_the_commands_of_the_pages_exist(page: str) -> None:
    """Parsed, not run: an option that was renamed is found here."""
    lines = list(commands_of(Path(__file__).parents[2] / page))
    assert lines
    for _, name, *arguments in lines:
        main.commands[name].make_context(name, arguments)


@pytest.mark.parametrize("name", main.commands)
def test_every_option_is_explained(name: str) -> None:
    command = main.commands[name]
    options = [parameter for parameter in command.params if isinstance(parameter, click.Option)]
    assert [option.name for option in options if not option.help] == []
    help_text = i2l(name, "--help").stdout
    assert not any(word in help_text for word in ("INTEGER", "FLOAT", "TEXT", " PATH  "))


# --- as a process ------------------------------------------------------------------------------------------------


def process(*arguments: object, before: str = "") -> subprocess.CompletedProcess[str]:
    """The command in a process of its own, after the Python code ``before``."""
    code = f"import sys\n{before}\nfrom i2l.cli import main\nmain()"
    command = [sys.executable, "-c", code, *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def test_the_installed_command(place: Place) -> None:
    command = [str(Path(sys.executable).with_name("i2l")), *map(str, place.run(output=place.photo / "lora"))]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (result.returncode, result.stdout) == (1, "")
    assert result.stderr.startswith(f"error: cannot write {place.photo / 'lora'}")
    assert result.stderr.count("\n") == 1


def test_the_module_is_the_command() -> None:
    result = subprocess.run([sys.executable, "-m", "i2l.cli", "--help"], capture_output=True, text=True, check=False)
    assert result.returncode == 0
    assert "build-engines" in result.stdout


def test_wrong_usage_as_a_process() -> None:
    result = process("run", "--engines", "e", "--output", "o")
    assert result.returncode == 2
    assert "no image was given" in result.stderr


WITHOUT_TORCH = "for name in ('torch', 'onnx', 'onnxscript', 'onnx_ir'): sys.modules[name] = None"


@pytest.mark.parametrize("command", ["build-engines", "verify"])
def test_what_needs_torch_says_what_to_install(place: Place, command: str) -> None:
    result = process(command, "--models", place.models, "--engines", place.engines, before=WITHOUT_TORCH)
    assert result.returncode == 1
    assert f"error: i2l {command} needs " in result.stderr
    assert 'pip install "i2l-engines[export]"' in result.stderr
    assert "Traceback" not in result.stderr


def test_making_checkpoints_without_torch_says_what_to_install(tmp_path: Path) -> None:
    result = process("make-checkpoints", tmp_path, before=WITHOUT_TORCH)
    assert result.returncode == 1
    assert "error: i2l make-checkpoints needs torch" in result.stderr


def test_planning_needs_no_torch() -> None:
    arguments = ["plan", "--preset", "full", "--precision", "int8", "--vram-budget", "4GiB"]
    result = process(*arguments, before=WITHOUT_TORCH)
    assert result.returncode == 0, result.stderr
    assert planned_of_the_card(result.stdout) == planned_of_the_card(i2l(*arguments).stdout)


def planned_of_the_card(text: str) -> list[str]:
    """Without what follows from the machine's free memory, which changes from one command to the next."""
    lines = [line for line in text.splitlines() if not line.startswith(("RAM pinned", "link used"))]
    assert len(lines) > 4
    return lines


@pytest.mark.parametrize("what", ["models", "engines"])
def test_inspecting_needs_no_torch(place: Place, what: str) -> None:
    result = process("inspect", getattr(place, what), "--json", before=WITHOUT_TORCH)
    assert result.returncode == 0, result.stderr
    assert len(json.loads(result.stdout)["models"]) == 3


def test_file_names_that_are_no_text(place: Place) -> None:
    """Linux allows any bytes in a name; an old camera card has some."""
    image, output = place.folder / "caf\udce9.jpg", place.folder / "caf\udce9.safetensors"
    shutil.copy(place.photo, image)
    result = process(*place.run(image=image, output=output), "--json")
    assert result.returncode == 0, result.stderr
    assert json.loads(result.stdout)["output"] == str(output)
    assert output.is_file()


@pytest.mark.parametrize("unbuffered", ["", "1"])
@pytest.mark.parametrize("arguments", [["--help"], ["inspect", "MODELS"], ["doctor", "--json"], ["run", "--help"]])
def test_standard_output_on_a_full_disk(place: Place, arguments: list[str], unbuffered: str) -> None:
    command = [sys.executable, "-m", "i2l.cli", *(a.replace("MODELS", str(place.models)) for a in arguments)]
    with Path("/dev/full").open("wb") as full:
        environment = {**os.environ, "PYTHONUNBUFFERED": unbuffered}
        result = subprocess.run(command, stdout=full, stderr=subprocess.PIPE, text=True, check=False, env=environment)
    assert (result.returncode, result.stderr) == (
        1,
        "error: cannot write to standard output (No space left on device): send it to another place\n",
    )


@pytest.mark.parametrize("unbuffered", ["", "1"])
def test_standard_output_is_a_closed_pipe(place: Place, unbuffered: str) -> None:
    read, write = os.pipe()
    os.close(read)
    command = [sys.executable, "-m", "i2l.cli", "inspect", str(place.models)]
    environment = {**os.environ, "PYTHONUNBUFFERED": unbuffered}
    result = subprocess.run(command, stdout=write, stderr=subprocess.PIPE, text=True, check=False, env=environment)
    os.close(write)
    assert (result.returncode, result.stderr) == (1, "")


# Once so many files are whole, the next is written to its middle and waits there for Ctrl-C.
WAITING_WRITE = """
import pathlib, sys, time
import i2l.cli
from i2l.engines.directory.tensorfile import LayoutWriter
folder, whole, interrupted = pathlib.Path(sys.argv.pop(1)), int(sys.argv.pop(1)), []
def on_ctrl_c(*arguments, real=i2l.cli.on_ctrl_c):
    interrupted.append(True)  # an Event's lock may be held by whom a signal interrupts
    real(*arguments)
def wait(path):
    if path.parent == folder and len(list(folder.glob("[!.]*"))) == whole:
        end = time.monotonic() + 60
        while not interrupted and time.monotonic() < end:
            time.sleep(0.01)
def write(self, name, data, real=LayoutWriter.write):
    wait(pathlib.Path(self._file.name))
    real(self, name, data)
def write_bytes(self, data, real=pathlib.Path.write_bytes):
    real(self, data[:1000])
    wait(self)
    return real(self, data)
i2l.cli.on_ctrl_c, LayoutWriter.write, pathlib.Path.write_bytes = on_ctrl_c, write, write_bytes
i2l.cli.main()
"""
GOES_ON = "interrupted: the same command goes on with the LoRAs that are not there yet\n"


@pytest.mark.parametrize("command", ["batch", "run", "embed", "merge"])
def test_ctrl_c_leaves_whole_files(place: Place, monkeypatch: pytest.MonkeyPatch, command: str) -> None:
    cache, photos, loras = (place.folder / name for name in ("cache", "photos", "loras"))
    monkeypatch.setenv("I2L_CACHE_DIR", str(cache))
    photos.mkdir()
    for seed in range(3):
        picture(100, 80, seed).save(photos / f"{seed}.png")
    batch = ["batch", photos, "--engines", place.engines, "--output-dir", loras, "--quiet"]
    if command == "merge":
        assert i2l(*batch).exit_code == 0
    output = loras / "m.safetensors"
    arguments, folder, whole, most = {
        "batch": (batch, loras, 1, 3),  # what is computed may still be written
        "run": (["run", photos, "--engines", place.engines, "--output", output, "--quiet"], loras, 0, 0),
        "embed": (["embed", photos, "--engines", place.engines, "--quiet"], cache / "embeddings", 1, 1),
        "merge": (["merge", loras / "0.safetensors", loras / "1.safetensors", "--output", output], loras, 3, 3),
    }[command]
    line = [sys.executable, "-c", WAITING_WRITE, str(folder), str(whole), *map(str, arguments)]
    running = subprocess.Popen(line, stderr=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 60
    while len(list(folder.glob("[!.]*"))) < whole or not list(folder.glob(".*.part")):
        assert running.poll() is None, running.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.005)
    running.send_signal(signal.SIGINT)
    _, stderr = running.communicate(timeout=60)
    assert (running.returncode, stderr) == (130, GOES_ON if command == "batch" else "interrupted\n")
    left = list(folder.iterdir())
    assert whole <= len(left) <= most
    for path in left:
        with safe_open(path, framework="numpy") as file:  # checks the size
            assert list(file.keys())
    assert i2l(*arguments).exit_code == 0
    assert len(list(folder.iterdir())) == {"run": 1, "merge": 4}.get(command, 3)


# The real build but for the graphs, which take long to export; writing slowly, so that Ctrl-C comes in the middle. A
# background job of a shell ignores SIGINT, and so would its children.
SLOW_BUILD = """
import signal, time
from i2l.engines.directory.tensorfile import LayoutWriter
from i2l.export import build
signal.signal(signal.SIGINT, signal.default_int_handler)
def write_graphs(folder, checkpoints, *_):
    for family in checkpoints:
        (folder / family).mkdir()
    return {}
def write(self, name, data, real=LayoutWriter.write):
    time.sleep(0.1)
    real(self, name, data)
build.write_graphs, LayoutWriter.write = write_graphs, write
"""


def test_ctrl_c_during_a_build_leaves_the_previous_engines(place: Place) -> None:
    engines = place.own_engines()
    old = read_manifest(engines).build
    arguments = ["build-engines", "--models", str(place.models), "--engines", str(engines), "--precision", "int8"]
    command = [sys.executable, "-c", f"{SLOW_BUILD}\nfrom i2l.cli import main\nmain()", *arguments]
    build = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 60
    while len(list(engines.rglob("siglip2/weights.safetensors"))) < 2:
        assert build.poll() is None, build.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.01)
    build.send_signal(signal.SIGINT)
    stdout, stderr = build.communicate(timeout=60)
    assert (build.returncode, stdout) == (130, "")
    assert stderr.splitlines()[-1] == "interrupted"
    assert "Traceback" not in stderr
    assert [path.name for path in engines.glob("build-*")] == [old]
    assert i2l(*place.run(engines=engines)).exit_code == 0


# Ctrl-C where Python lets no error out, where a library makes another of it, and before and after a command's work.
CTRL_C_AT = {
    "in a callback": """
import weakref
def work(*_):
    class Gone: ...
    weakref.finalize(Gone(), signal.raise_signal, signal.SIGINT)
    time.sleep(60)
""",
    "in an import": """
import sys
def work(*_):
    sys.path.append(FOLDER)
    import odd
    time.sleep(60)
""",
    "before the work": "click.Context.scope = interrupted",
    "after the work": "click.Context.exit = interrupted",
}


ODD = """
import signal
lost = False
try:
    signal.raise_signal(signal.SIGINT)
except KeyboardInterrupt:
    lost = True
if lost:
    raise ImportError("as C libraries do, which print the reason and forget it")
"""


@pytest.mark.parametrize("moment", CTRL_C_AT)
def test_ctrl_c_at_any_moment_ends_quietly(place: Place, moment: str) -> None:
    (place.folder / "odd.py").write_text(ODD)
    before = f"""
FOLDER = {str(place.folder)!r}
import signal, time
import click
import i2l.look.diagnosis
def interrupted(*_, **__):
    signal.raise_signal(signal.SIGINT)
    time.sleep(60)
work = i2l.look.diagnosis.diagnose
{CTRL_C_AT[moment]}
i2l.look.diagnosis.diagnose = work
"""
    result = process("doctor", "--engines", place.engines, before=before)
    assert result.returncode in {130, -signal.SIGINT}
    assert result.stderr in {"interrupted\n", ""}
