"""Damage is found before it is used, and hashing is paid once."""

import errno
import json
import logging
import os
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from conftest import MakeEngines, picture
from i2l.engines.directory import integrity
from i2l.engines.directory.hashing import FileFacts
from i2l.engines.directory.integrity import CHECKED, check_files
from i2l.engines.directory.manifest import Manifest, read_manifest
from i2l.errors import EngineFileDamaged
from i2l.machine import files
from i2l.runtime.pipeline import open_engines

PACKS = ["siglip2/weights.safetensors", "dinov3/weights.safetensors", "adapter/weights.safetensors"]
FILES = [*PACKS, "graphs/dinov3.block.onnx", "adapter/adapter.layers.01.attention.onnx"]


@pytest.fixture
def own(engines: MakeEngines, tmp_path: Path) -> Path:
    """A tiny engines directory that a test may damage, checked and noted as good."""
    directory = Path(shutil.copytree(engines("tiny", "fp32"), tmp_path / "engines"))
    check_files(directory, read_manifest(directory))
    return directory


@pytest.fixture
def hashed(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The names of the files hashed since the test began."""
    names: list[str] = []
    real = integrity.file_facts

    def file_facts(path: Path) -> FileFacts:
        if path.parent.name != "graphs":  # those are small, and hashed at every opening
            names.append(path.name)
        return real(path)

    monkeypatch.setattr(integrity, "file_facts", file_facts)
    return names


def file(directory: Path, name: str) -> Path:
    return directory / read_manifest(directory).build / name


def flip(path: Path, position: int) -> None:
    """Change one bit, as a failing disk does."""
    with path.open("r+b") as stream:
        stream.seek(position)
        value = stream.read(1)[0]
        stream.seek(position)
        stream.write(bytes([value ^ 1]))


def truncate(path: Path) -> None:
    os.truncate(path, path.stat().st_size - 1)


def grow(path: Path) -> None:
    os.truncate(path, path.stat().st_size + 1)


def become_folder(path: Path) -> None:
    path.unlink()
    path.mkdir()


DAMAGE: dict[str, tuple[Callable[[Path], None], str]] = {
    "first byte": (lambda path: flip(path, 0), "content hash"),
    "last byte": (lambda path: flip(path, path.stat().st_size - 1), "content hash"),
    "truncated": (truncate, "bytes, not"),
    "longer": (grow, "bytes, not"),
    "gone": (Path.unlink, "it is gone"),
    "a folder": (become_folder, "it is gone"),
}


@pytest.mark.parametrize("kind", DAMAGE)
@pytest.mark.parametrize("name", FILES)
def test_damage_is_named_with_the_command_that_mends_it(own: Path, name: str, kind: str) -> None:
    damage, reason = DAMAGE[kind]
    damage(file(own, name))
    with pytest.raises(EngineFileDamaged) as caught:
        open_engines(own)
    message = str(caught.value)
    assert str(file(own, name)) in message
    assert reason in message
    assert f"i2l build-engines --models MODELS --engines {own} --force" in message


def test_damage_is_still_damage_at_the_second_look(own: Path) -> None:
    flip(file(own, PACKS[0]), 5000)
    for _ in range(2):
        with pytest.raises(EngineFileDamaged):
            open_engines(own)


def test_a_copy_elsewhere_is_hashed_once(own: Path, tmp_path: Path, hashed: list[str]) -> None:
    copy = Path(shutil.copytree(own, tmp_path / "elsewhere" / "engines"))
    count = len(read_manifest(copy).files) - len(read_manifest(copy).graphs)
    open_engines(copy).close()
    assert len(hashed) == count
    open_engines(copy).close()
    assert len(hashed) == count


def test_a_fresh_build_is_not_hashed_again(engines: MakeEngines, hashed: list[str]) -> None:
    open_engines(engines("tiny", "fp32")).close()
    assert hashed == []


def test_only_what_changed_is_hashed(own: Path, hashed: list[str]) -> None:
    os.utime(file(own, PACKS[2]))
    open_engines(own).close()
    assert hashed == ["weights.safetensors"]


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"null", b"\xff\xfe\x80", b'{"graphs/dinov3.block.onnx": 7}'])
def test_notes_that_cannot_be_read_are_made_anew(own: Path, hashed: list[str], content: bytes) -> None:
    (own / CHECKED).write_bytes(content)
    open_engines(own).close()
    count = len(hashed)
    assert count == len(read_manifest(own).files) - len(read_manifest(own).graphs)
    open_engines(own).close()
    assert len(hashed) == count


def test_a_folder_in_place_of_the_notes(own: Path) -> None:
    (own / CHECKED).unlink()
    (own / CHECKED).mkdir()
    with open_engines(own) as pipeline:
        assert pipeline.lora_from_images([picture(64, 64)]).rank == 4


@pytest.fixture
def read_only(own: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A directory that nobody may write, without notes; root may write anywhere, so the system is made to refuse."""
    (own / CHECKED).unlink()

    def create(path: Path) -> None:
        raise OSError(errno.EROFS, os.strerror(errno.EROFS), str(path))

    if sys.platform == "win32" or os.geteuid() == 0:
        monkeypatch.setattr(files, "create_temporary", create)
    own.chmod(0o555)
    return own


def test_a_read_only_directory_works_and_says_what_it_costs(read_only: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING, "i2l"), open_engines(read_only) as pipeline:
        assert pipeline.lora_from_images([picture(64, 64)]).rank == 4
    assert "hashed again at the next start" in caplog.text
    read_only.chmod(0o755)
    assert not (read_only / CHECKED).exists()


def test_notes_name_every_file(own: Path) -> None:
    manifest: Manifest = read_manifest(own)
    marks = json.loads((own / CHECKED).read_text(encoding="utf-8"))["files"]
    assert marks.keys() == manifest.files.keys()
