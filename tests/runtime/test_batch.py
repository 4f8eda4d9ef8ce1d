"""Many LoRAs: what is planned, what is shared, what is skipped, and what one bad image does."""

import json
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner, Result
from hypothesis import given
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.numpy import load_file, save_file

from conftest import MakeEngines, picture
from i2l.cli import main
from i2l.engines.base import BackendStatus, CardFacts
from i2l.engines.cpu import backend as cpu_backend
from i2l.errors import DiskFull, FolderEmpty
from i2l.lora.lora import Lora
from i2l.lora.reading import describe_lora
from i2l.runtime import making
from i2l.runtime.jobs import STAGE, BatchProgress, Job, plan_jobs
from i2l.runtime.making import run_jobs
from i2l.runtime.passes import IMAGES_PER_PASS
from i2l.runtime.pictures.sources import load_squares
from i2l.runtime.pipeline import Pipeline, open_engines


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    made = tmp_path / "in"
    (made / "cats").mkdir(parents=True)
    (made / "empty").mkdir()
    for index in range(3):
        picture(80, 60, seed=index).save(made / f"{index}.png")
        picture(60, 90, seed=10 + index).save(made / "cats" / f"{index}.png")
    return made


@pytest.fixture
def pipeline(engines: MakeEngines) -> Iterator[Pipeline]:
    with open_engines(engines("tiny", "fp32")) as opened:
        yield opened


def i2l_batch(folder: Path, engines: Path, *more: object) -> tuple[Result, dict[str, Any]]:
    arguments = ["batch", folder, "--engines", engines, "--output-dir", folder.parent / "out", "--json", *more]
    result = CliRunner().invoke(main, [str(argument) for argument in arguments], catch_exceptions=False)
    return result, json.loads(result.stdout) if result.stdout else {}


# --- planning ----------------------------------------------------------------------------------------------------


def test_one_job_per_image_or_folder(folder: Path, tmp_path: Path) -> None:
    plan = plan_jobs(folder, tmp_path, "image")
    assert [job.output.name for job in plan.jobs] == ["0.safetensors", "1.safetensors", "2.safetensors"]
    assert [path.name for path in plan.skipped] == ["cats", "empty"]
    plan = plan_jobs(folder, tmp_path, "folder")
    cats = tuple(folder / "cats" / f"{index}.png" for index in range(3))
    assert plan.jobs == (Job(cats, tmp_path / "cats.safetensors"),)
    assert [path.name for path in plan.skipped] == ["0.png", "1.png", "2.png", "empty"]


def test_equal_stems_keep_their_suffix(folder: Path, tmp_path: Path) -> None:
    picture(64, 64).save(folder / "1.jpg")
    names = [job.output.name for job in plan_jobs(folder, tmp_path, "image").jobs]
    assert names == ["0.safetensors", "1.jpg.safetensors", "1.png.safetensors", "2.safetensors"]


def test_nothing_to_do_is_an_error(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(FolderEmpty, match="no image"):
        plan_jobs(folder / "empty", tmp_path, "image")
    with pytest.raises(FolderEmpty, match="no folder with images"):
        plan_jobs(folder / "cats", tmp_path, "folder")


def test_what_cannot_be_read_is_a_failed_item_each(folder: Path, engines: MakeEngines) -> None:
    """What looks like a picture is never dropped; a film beside them is counted in one line."""
    (folder / "a.psd").write_bytes(b"8BPS" + bytes(40))
    (folder / "b.jpg").write_bytes(b"\xff\xd8\xff" + bytes(40))
    (folder / "c.bak").write_bytes(b"\x89PNG\r\n\x1a\n" + bytes(40))  # a picture by its content
    (folder / "d.mov").write_bytes(b"\0\0\0\x14ftypqt  \0\0\0\0qt  ")
    result, facts = i2l_batch(folder, engines("tiny", "fp32"))
    assert result.exit_code == 1
    assert len(facts["written"]) == 3
    assert [Path(failed["output"]).name for failed in facts["failed"]] == [f"{n}.safetensors" for n in "abc"]
    for name in ("a.psd", "b.jpg", "c.bak"):
        assert sum(f"{name} cannot be read as an image" in line for line in result.stderr.splitlines()) == 1
    assert "error: 3 of 6 LoRAs were not made" in result.stderr
    assert "skipped 1 that is not a picture: d.mov; 2 folders" in result.stderr


@given(st.lists(st.tuples(st.integers(1, 6), st.booleans()), min_size=1, max_size=12))
def test_progress_never_goes_back_and_ends_at_the_total(jobs: list[tuple[int, bool]]) -> None:
    told: list[tuple[int, int]] = []
    progress = BatchProgress(lambda _, done, total: told.append((done, total)))
    progress.begin(sum(images for images, _ in jobs))
    for images, needed in jobs:
        if not needed:
            progress.leave_out(images)
            continue
        progress.begin_pass(images)
        for stage in ("siglip2", "dinov3", "adapter"):
            for done in range(4):
                progress(stage, done, 3)
        progress.end_pass()
    parts = [part for part, _ in told]
    assert parts == sorted(parts)
    assert all(part <= total for part, total in told)
    if told:
        assert told[-1][0] == told[-1][1] or not jobs[-1][1]


def test_what_opening_takes_is_told_too() -> None:
    """The first opening of fp8 engines converts 8.9 GiB: a batch must be seen to move, too."""
    told: list[tuple[str, int, int]] = []
    progress = BatchProgress(lambda *facts: told.append(facts))
    progress("converting", 3, 10)
    progress.begin(2)
    progress.begin_pass(2)
    progress("siglip2", 1, 2)
    assert told == [("converting", 3, 10), (STAGE, 50, 200)]


# --- doing -------------------------------------------------------------------------------------------------------


def test_each_output_is_what_run_makes(folder: Path, engines: MakeEngines, pipeline: Pipeline) -> None:
    for per in ("image", "folder"):
        result, facts = i2l_batch(folder, engines("tiny", "fp32"), "--per", per, "--dtype", "fp32", "--strength", "0.5")
        assert result.exit_code == 0, result.stderr
        for path in map(Path, facts["written"]):
            images = sorted((folder / "cats").iterdir()) if per == "folder" else [folder / f"{path.stem}.png"]
            wanted = pipeline.lora_from_images(images, strength=0.5)
            found = load_file(path)
            for module, (a, b) in wanted.factors.items():
                # float32: a batch sums in another order than a single image
                np.testing.assert_allclose(found[f"diffusion_model.{module}.lora_A.weight"], a, rtol=0, atol=1e-5)
                np.testing.assert_allclose(found[f"diffusion_model.{module}.lora_B.weight"], b, rtol=0, atol=1e-5)


def test_images_of_several_jobs_share_passes(
    pipeline: Pipeline, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Jobs of 1, 1, 3, 6 and 1 images: [1 + 1], [3], [6, in two pieces], [1]."""
    jobs = []
    for index, images in enumerate((1, 1, 3, IMAGES_PER_PASS + 2, 1)):
        paths = tuple(tmp_path / f"{index}-{image}.png" for image in range(images))
        for path in paths:
            picture(32, 32, seed=10 * index + int(path.stem[-1])).save(path)
        jobs.append(Job(paths, tmp_path / f"{index}.safetensors"))
    passes: list[tuple[str, int]] = []

    def watched(name: str, real: Callable[[Any], Any]) -> Callable[[Any], Any]:
        def call(items: Any) -> Any:
            passes.append((name, len(items)))
            return real(items)

        return call

    monkeypatch.setattr(pipeline, "embed", watched("embed", pipeline.embed))
    monkeypatch.setattr(pipeline, "factors", watched("adapter", pipeline.factors))
    result = run_jobs(pipeline, jobs)
    assert passes == [
        ("embed", 2), ("adapter", 2), ("embed", 3), ("adapter", 3),
        ("embed", 4), ("embed", 2), ("adapter", 6), ("embed", 1), ("adapter", 1),
    ]  # fmt: skip
    assert result.written == [job.output for job in jobs]
    assert [describe_lora(job.output)["rank"] for job in jobs] == [4 * len(job.images) for job in jobs]


def test_finished_outputs_are_skipped_and_changed_ones_redone(folder: Path, engines: MakeEngines) -> None:
    directory = engines("tiny", "fp32")
    _, first = i2l_batch(folder, directory)
    stamps = {path: Path(path).stat().st_mtime_ns for path in first["written"]}
    _, second = i2l_batch(folder, directory)
    assert (second["written"], second["finished_before"]) == ([], first["written"])
    assert {path: Path(path).stat().st_mtime_ns for path in stamps} == stamps
    picture(80, 60, seed=99).save(folder / "1.png")
    _, third = i2l_batch(folder, directory)
    assert [Path(path).name for path in third["written"]] == ["1.safetensors"]
    assert third["from_cache"] == 0
    for changed in (["--strength", "0.9"], ["--strength", "0.9", "--dtype", "fp16"]):
        _, facts = i2l_batch(folder, directory, *changed)
        assert len(facts["written"]) == facts["from_cache"] == 3
    _, other = i2l_batch(folder, engines("tiny", "int8"), "--strength", "0.9", "--dtype", "fp16")
    assert len(other["written"]) == 3


def test_one_bad_image_does_not_stop_the_rest(folder: Path, engines: MakeEngines) -> None:
    (folder / "1.png").write_bytes(b"not a picture")
    result, facts = i2l_batch(folder, engines("tiny", "fp32"))
    assert result.exit_code == 1
    assert [Path(path).name for path in facts["written"]] == ["0.safetensors", "2.safetensors"]
    (failure,) = facts["failed"]
    assert "1.png cannot be read" in failure["error"]
    assert "failed: 1.safetensors" in result.stderr
    assert result.stderr.endswith("error: 1 of 3 LoRAs were not made\n")


def test_a_file_of_somebody_else_is_not_replaced(folder: Path, engines: MakeEngines) -> None:
    out = folder.parent / "out"
    out.mkdir()
    save_file({"diffusion_model.m.lora_A.weight": np.ones((1, 2)), "diffusion_model.m.lora_B.weight": np.ones((2, 1))},
              out / "0.safetensors")  # fmt: skip
    (out / "2.safetensors").write_bytes(b"notes")
    before = {path.name: path.read_bytes() for path in out.iterdir()}
    result, facts = i2l_batch(folder, engines("tiny", "fp32"))
    assert result.exit_code == 1
    assert len(facts["failed"]) == 2
    assert {name: (out / name).read_bytes() for name in before} == before


@pytest.mark.parametrize("names", [["one"], ["one", "two"]])
def test_cards_that_stay_idle_are_spoken_of(
    folder: Path, engines: MakeEngines, monkeypatch: pytest.MonkeyPatch, names: list[str]
) -> None:
    """The CPU plays the cards, and a renderer in software beside them."""
    cards = (*map(CardFacts, names), CardFacts("a renderer", software=True))
    status = BackendStatus("cpu", works=True, reason="it is played", cards=cards)
    monkeypatch.setattr(cpu_backend, "OFFER", replace(cpu_backend.OFFER, find=lambda: status))
    result, _ = i2l_batch(folder, engines("tiny", "fp32"), "--backend", "cpu")
    assert ("one of the 2 cards of this machine works" in result.stderr) == (len(names) == 2)


SLOW = """
import sys, time
from i2l.cli import main
from i2l.lora.lora import Lora
from i2l.lora import lora as module
real = module.converted
def slow(*arguments):
    print("saving", flush=True)
    time.sleep(0.05)
    return real(*arguments)
module.converted = slow
main(sys.argv[1:])
"""


@pytest.mark.skipif(sys.platform == "win32", reason="signals")
def test_ctrl_c_leaves_whole_files_only(folder: Path, engines: MakeEngines) -> None:
    out = folder.parent / "out"
    arguments = ["batch", str(folder), "--engines", str(engines("tiny", "fp32")), "--output-dir", str(out)]
    run = subprocess.Popen([sys.executable, "-c", SLOW, *arguments], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
    assert run.stdout is not None
    for _ in range(3):
        run.stdout.readline()
    time.sleep(0.05)
    run.send_signal(signal.SIGINT)
    run.stdout.close()
    assert run.wait(30) != 0
    assert [path.name for path in out.iterdir() if path.suffix != ".safetensors"] == []
    for path in out.iterdir():
        load_file(path)


def test_a_disk_that_fills_up_is_told_as_json_with_what_is_made(
    folder: Path, engines: MakeEngines, monkeypatch: pytest.MonkeyPatch
) -> None:
    save = Lora.save

    def full(self: Lora, path: Path, **options: Any) -> Path:
        if path.name == "1.safetensors":
            raise DiskFull(path, None, 0)
        return save(self, path, **options)

    monkeypatch.setattr(Lora, "save", full)
    result, facts = i2l_batch(folder, engines("tiny", "fp32"))
    assert result.exit_code == 1
    assert [Path(path).name for path in facts["written"]] == ["0.safetensors", "2.safetensors"]
    assert result.stderr.splitlines()[-1] == f"error: {facts['error']}"
    assert "no room on the disk" in facts["error"]


# --- reading ahead, writing behind -------------------------------------------------------------------------------


def pictures_of(folder: Path, count: int) -> list[Job]:
    folder.mkdir()
    for index in range(count):
        picture(60, 50, seed=index).save(folder / f"{index}.png")
    (folder.parent / "out").mkdir()
    return list(plan_jobs(folder, folder.parent / "out", "image").jobs)


def test_the_next_group_is_read_and_the_last_one_written_while_one_is_computed(
    pipeline: Pipeline, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    jobs = pictures_of(tmp_path / "in", 3 * IMAGES_PER_PASS)
    read: list[Path] = []
    save, load, embed = Lora.save, load_squares, pipeline.embed
    second_read, third_begun = threading.Event(), threading.Event()

    def loading(images: Sequence[Path], **options: Any) -> Any:
        read.extend(images)
        if len(read) > IMAGES_PER_PASS:
            second_read.set()
        return load(images, **options)

    def embedding(squares: Any) -> Any:
        assert second_read.wait(60), "the second group is read once the first is made"
        if embedding.calls:  # type: ignore[attr-defined]
            third_begun.set()
        embedding.calls += 1  # type: ignore[attr-defined]
        return embed(squares)

    def saving(self: Lora, path: Path, **options: Any) -> Path:
        assert third_begun.wait(60), "the second group is made once the first is written"
        return save(self, path, **options)

    embedding.calls = 0  # type: ignore[attr-defined]
    monkeypatch.setattr(making, "load_squares", loading)
    monkeypatch.setattr(pipeline, "embed", embedding)
    monkeypatch.setattr(Lora, "save", saving)
    assert run_jobs(pipeline, jobs).written == [job.output for job in jobs]


def test_a_header_names_the_engines_that_made_it_in_the_end(
    pipeline: Pipeline, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    jobs, embed = pictures_of(tmp_path / "in", 2 * IMAGES_PER_PASS), pipeline.embed
    origin = pipeline.origin

    def failing(squares: Any) -> Any:  # as a card does in whose place the CPU goes on with engines of its own
        monkeypatch.setattr(Pipeline, "origin", replace(origin, precision="int8", engines="others"))
        return embed(squares)

    monkeypatch.setattr(pipeline, "embed", failing)
    run_jobs(pipeline, jobs)
    for job in jobs:
        with safe_open(job.output, "np") as file:
            said = file.metadata()
        assert (said["i2l.precision"], said["i2l.engines"]) == ("int8", "others")
