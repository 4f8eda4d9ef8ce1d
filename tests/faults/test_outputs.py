"""Nothing is written over what is not its own (faults 1, 3, 4, 5, 6, 14, 15, 16, 20 of the first injection)."""

import json
import os
import secrets
import shutil
import stat
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from safetensors.numpy import load_file, save_file

from conftest import MakeEngines, MakeModels, picture
from i2l.engines.directory.manifest import read_manifest
from i2l.errors import (
    CheckpointMissing,
    FolderInUse,
    FolderNotEngines,
    OutputMisnamed,
    OutputTaken,
    OutputUnwritable,
)
from i2l.export.build import build_engines
from i2l.export.checkpoints.synthetic import make_checkpoints
from i2l.look.plotting import plot_loras
from i2l.look.trace_picture import draw_trace
from i2l.lora.reading import read_lora
from i2l.machine import files
from i2l.machine.files import atomic_path, remove_leftovers
from i2l.runtime.jobs import output_names
from i2l.runtime.trace import Trace
from injectors import i2l_process, names, run_python, small_lora

DEAD = 2**22 + 7
"""A process that cannot be there: beyond Linux's largest number."""


# --- 1: checkpoints ----------------------------------------------------------------------------------------------


def test_real_checkpoints_are_never_replaced_by_random_ones(models: MakeModels, tmp_path: Path) -> None:
    own = Path(shutil.copytree(models("tiny"), tmp_path / "own"))
    encoder = own / "CLIPS" / "SigLIP2-G384.safetensors"
    save_file(load_file(encoder), encoder)  # as a user's: without our mark
    before = encoder.read_bytes()
    with pytest.raises(FolderInUse, match="a folder of its own"):
        make_checkpoints(own, "tiny")
    assert encoder.read_bytes() == before


def test_random_checkpoints_are_not_advised_to_somebody_who_has_real_ones(models: MakeModels, tmp_path: Path) -> None:
    own = Path(shutil.copytree(models("tiny"), tmp_path / "own"))
    next((own / "Z-Image").iterdir()).unlink()
    with pytest.raises(CheckpointMissing) as caught:
        build_engines(own, tmp_path / "engines")
    assert "make-checkpoints" not in str(caught.value)


# --- 3: temporary files ------------------------------------------------------------------------------------------


def test_a_link_in_the_way_of_the_temporary_file_is_not_followed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    victim = tmp_path / "victim"
    victim.write_text("mine")
    monkeypatch.setattr(secrets, "token_hex", lambda count: "0" * 2 * count)
    files.temporary_path(tmp_path).symlink_to(victim)
    with pytest.raises(OutputUnwritable):
        small_lora().save(tmp_path / "out.safetensors")
    assert victim.read_text() == "mine"


def test_temporary_names_cannot_be_guessed_and_leave_nothing(tmp_path: Path) -> None:
    seen = set()
    for _ in range(20):
        with atomic_path(tmp_path / "x") as temporary:
            temporary.write_text("whole")
            seen.add(temporary.name)
    assert len(seen) == 20
    assert names(tmp_path) == ["x"]


@pytest.mark.parametrize("function", ["atomic_path", "require_writable"])
def test_ctrl_c_between_any_two_lines_leaves_nothing(function: str, tmp_path: Path) -> None:
    """But at the line that removes the file itself: the next writer removes it then."""
    command = [sys.executable, str(Path(__file__).with_name("interrupter.py")), str(tmp_path), function]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=120)
    assert not done.stderr
    assert int(done.stdout) > 20


# --- 4: the one rule ---------------------------------------------------------------------------------------------


def foreign_lora(path: Path) -> Path:
    tensors = load_file(small_lora().save(path))
    path.unlink()
    save_file(tensors, path)
    return path


def photo_at(path: Path) -> Path:
    picture(40, 40).save(path, format="PNG")
    return path


def write_lora(path: Path) -> None:
    small_lora(1).save(path)


def force_lora(path: Path) -> None:
    small_lora(1).save(path, force=True)


def write_trace(path: Path) -> None:
    Trace().save(path)


def draw(path: Path) -> None:
    source = path.with_name("source.safetensors")
    plot_loras([read_lora(small_lora().save(source))], path)


def draw_a_trace(path: Path) -> None:
    source = path.with_name("source.json")
    Trace().save(source)
    draw_trace(source, path)


@pytest.mark.parametrize(
    ("write", "name"),
    [
        (write_lora, "x.safetensors"),
        (write_trace, "x.json"),
        (draw, "x.png"),
        (draw, "x.svg"),
        (draw, "x.pdf"),
        (draw_a_trace, "x.png"),
    ],
)
def test_ours_is_replaced_and_a_photograph_never(write: Callable[[Path], None], name: str, tmp_path: Path) -> None:
    path = tmp_path / name
    write(path)
    write(path)
    before = photo_at(path).read_bytes()
    with pytest.raises(OutputTaken, match="choose another place"):
        write(path)
    assert path.read_bytes() == before


@pytest.mark.parametrize("write", [write_lora, write_trace, draw, draw_a_trace])
def test_a_name_of_another_format_is_refused(write: Callable[[Path], None], tmp_path: Path) -> None:
    before = photo_at(tmp_path / "photo.jpg").read_bytes()
    with pytest.raises(OutputMisnamed, match="give it a name that ends in"):
        write(tmp_path / "photo.jpg")
    assert (tmp_path / "photo.jpg").read_bytes() == before


def test_a_lora_of_somebody_else_is_replaced_on_request_and_a_checkpoint_never(
    models: MakeModels, tmp_path: Path
) -> None:
    path = foreign_lora(tmp_path / "x.safetensors")
    with pytest.raises(OutputTaken, match="force"):
        write_lora(path)
    force_lora(path)
    for checkpoint in sorted(models("tiny").rglob("*.safetensors")):
        before = Path(shutil.copy(checkpoint, path)).read_bytes()
        with pytest.raises(OutputTaken):
            force_lora(path)
        assert path.read_bytes() == before


def test_the_commands_spare_their_inputs(engines: MakeEngines, tmp_path: Path) -> None:
    from click.testing import CliRunner

    from i2l.cli import main

    def refused(*arguments: object) -> None:
        result = CliRunner().invoke(main, [*map(str, arguments)])
        assert result.exit_code in {1, 2}, result.output
        assert "Traceback" not in result.output

    png = photo_at(tmp_path / "photo.png")
    a, b = (small_lora(seed).save(tmp_path / f"{seed}.safetensors") for seed in (1, 2))
    before = {path: path.read_bytes() for path in (png, a, b)}
    run = ("run", png, "--engines", engines("tiny", "fp32"), "--no-cache", "--output")
    refused(*run, tmp_path / "out.safetensors", "--trace", png)
    refused(*run, tmp_path / "g.json", "--trace", tmp_path / "g.json")
    refused(*run, png)
    refused("merge", a, b, "--output", a, "--force")
    refused("convert", a, "--output", a, "--force")
    refused("plot", a, "--output", png)
    assert {path: path.read_bytes() for path in before} == before
    assert names(tmp_path) == ["1.safetensors", "2.safetensors", "photo.png"]


@pytest.mark.parametrize("name", ["manifest.json", "build-notes.txt", "photo.jpg"])
def test_engines_are_not_built_among_other_files(models: MakeModels, tmp_path: Path, name: str) -> None:
    folder = tmp_path / "folder"
    folder.mkdir()
    (folder / name).write_text('{"manifest_version": 3}')
    with pytest.raises(FolderNotEngines, match="a folder of its own"):
        build_engines(models("tiny"), folder, precision="int8")
    assert names(folder) == [name]


# --- 5, 20: names of a batch -------------------------------------------------------------------------------------


@given(st.lists(st.text(st.sampled_from("aA.é-"), min_size=1, max_size=8), unique=True, max_size=8))
def test_names_of_a_batch_are_distinct_short_and_stable(stems: list[str]) -> None:
    paths = [Path(f"{stem}{suffix}") for stem in stems for suffix in (".jpg", ".png", ".jpg.webp")]
    found = output_names(paths)
    assert len({name.casefold() for name in found}) == len(found)
    assert found == output_names(paths)
    assert output_names(paths[::-1])[::-1] == found


def test_names_that_collide_and_names_that_are_too_long() -> None:
    assert output_names([Path("a.jpg"), Path("a.png"), Path("a.jpg.webp"), Path("b.jpg")]) == [
        "a.jpg.safetensors",
        "a.png.safetensors",
        "a.jpg.webp.safetensors",
        "b.safetensors",
    ]
    long = [Path("ü" * 125 + end) for end in ("a.jpg", "b.jpg")]
    found = output_names(long)
    assert len(set(found)) == 2
    assert all(len(os.fsencode(name)) <= 255 for name in found)


def test_a_batch_of_such_names_writes_all_and_is_finished_then(engines: MakeEngines, tmp_path: Path) -> None:
    folder = tmp_path / "pictures"
    folder.mkdir()
    for seed, name in enumerate(["a.jpg", "a.png", "a.jpg.webp", "x" * 250 + ".jpg"]):
        picture(40, 40, seed).save(folder / name)
    batch = ("batch", folder, "--engines", engines("tiny", "fp32"), "--output-dir", tmp_path / "out", "--json")
    for written, finished in ((4, 0), (0, 4)):
        done = i2l_process(*batch)
        assert done.returncode == 0, done.stderr
        facts = json.loads(done.stdout)
        assert (len(facts["written"]), len(facts["finished_before"])) == (written, finished)
    assert len(names(tmp_path / "out")) == 4


# --- 6: two threads, one path ------------------------------------------------------------------------------------


def test_threads_that_save_to_one_path_leave_one_whole_file(tmp_path: Path) -> None:
    path, failed = tmp_path / "x.safetensors", []
    wanted = [load_file(small_lora(seed, 40).save(tmp_path / f"{seed}.safetensors")) for seed in range(2)]

    def save(seed: int) -> None:
        try:
            for _ in range(6):
                small_lora(seed, 40).save(path)
        except OSError as error:
            failed.append(error)

    threads = [threading.Thread(target=save, args=(seed,)) for seed in range(2)]
    for thread in threads:
        thread.start()
    while any(thread.is_alive() for thread in threads):
        if path.exists():
            found = load_file(path)
            assert any(all(np.array_equal(found[k], lora[k]) for k in lora) for lora in wanted)
    assert failed == []


# --- 14, 15: leftovers -------------------------------------------------------------------------------------------


def test_leftovers_of_the_dead_go_and_those_of_the_living_stay(tmp_path: Path) -> None:
    mine = files.temporary_path(tmp_path)
    files.create_temporary(mine)
    dead = mine.with_name(mine.name.replace(f"-{os.getpid()}-", f"-{DEAD}-"))
    elsewhere = mine.with_name(dead.name.replace(files._host(), "abcdef"))
    old = mine.with_name(elsewhere.name.replace("abcdef", "abcde0"))
    for path in (dead, elsewhere, old, tmp_path / ".other.part"):
        path.touch()
    os.utime(old, (0, 0))
    remove_leftovers(tmp_path)
    assert set(names(tmp_path)) == {mine.name, elsewhere.name, ".other.part"}


def test_a_build_that_has_nothing_to_do_removes_what_dead_ones_left(
    models: MakeModels, engines: MakeEngines, tmp_path: Path
) -> None:
    own = Path(shutil.copytree(engines("tiny", "int8"), tmp_path / "engines"))
    shutil.copytree(own / read_manifest(own).build, own / "build-deadbeef")
    assert not build_engines(models("tiny"), own, precision="int8").rebuilt
    assert [path.name for path in own.glob("build-*")] == [read_manifest(own).build]


def test_what_is_killed_while_saving_is_cleared_up_by_the_next_save(tmp_path: Path) -> None:
    code = """
import os, signal, sys
from pathlib import Path
from i2l.machine.files import atomic_path
with atomic_path(Path(sys.argv[1])) as temporary:
    temporary.write_text("half")
    os.kill(os.getpid(), signal.SIGKILL)
"""
    killed = run_python(code, tmp_path / "x.safetensors")
    assert killed.returncode == -9
    assert len(names(tmp_path)) == 1
    small_lora().save(tmp_path / "x.safetensors")
    assert names(tmp_path) == ["x.safetensors"]


# --- 16: the power goes ------------------------------------------------------------------------------------------


def test_bytes_are_on_the_disk_before_the_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What a loss of power would undo is the order of these calls; that itself is not played here."""
    calls: list[str] = []
    real_sync, real_replace = os.fsync, Path.replace

    def fsync(descriptor: int) -> None:
        calls.append("folder" if stat.S_ISDIR(os.fstat(descriptor).st_mode) else "file")
        real_sync(descriptor)

    def replace(path: Path, target: Path) -> Path:
        calls.append("name")
        return real_replace(path, target)

    monkeypatch.setattr(os, "fsync", fsync)
    monkeypatch.setattr(Path, "replace", replace)
    small_lora().save(tmp_path / "x.safetensors")
    assert calls == ["file", "name", "folder"]


def test_a_build_is_on_the_disk_before_its_manifest(
    engines: MakeEngines, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from i2l.export import build_folder

    own = Path(shutil.copytree(engines("tiny", "int8"), tmp_path / "engines"))
    order: list[str] = []
    monkeypatch.setattr(build_folder, "sync_tree", lambda folder: order.append(folder.name))
    monkeypatch.setattr(build_folder, "record_checked", lambda *_: order.append("checked"))
    manifest = read_manifest(own)
    build_folder.commit(own, manifest)
    assert order == [manifest.build, "checked"]
