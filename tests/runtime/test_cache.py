"""The embedding cache: what hits, what misses, what is damaged, and that a hit leaves the encoders shut."""

import dataclasses
import json
import logging
import shutil
import sys
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner
from PIL import Image

from conftest import MakeEngines, picture
from i2l.cli import main
from i2l.engines.base import Array
from i2l.engines.cpu.backend import CpuBackend
from i2l.engines.directory.hashing import FileFacts
from i2l.engines.directory.manifest import content_id, read_manifest
from i2l.runtime.cache import FOLDER_VARIABLE, EmbeddingCache, default_cache_folder, encoders_id
from i2l.runtime.passes import ENCODERS, IMAGES_PER_PASS
from i2l.runtime.pictures.pixels import square_image
from i2l.runtime.pipeline import Pipeline, open_engines
from i2l.specs import Family

PICTURES = [picture(90, 60 + 10 * seed, seed) for seed in range(3)]


@pytest.fixture(autouse=True)
def quiet_log() -> Iterator[None]:
    yield
    logging.getLogger("i2l").handlers.clear()


@pytest.fixture
def cached(engines: MakeEngines, tmp_path: Path) -> Iterator[Pipeline]:
    with open_engines(engines("tiny", "int8"), cache=tmp_path / "cache") as pipeline:
        yield pipeline


def entries(pipeline: Pipeline) -> list[Path]:
    assert pipeline.cache is not None
    return sorted(pipeline.cache.folder.iterdir())


def watched_batches(pipeline: Pipeline, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The sizes of the batches that go through the encoders."""
    sizes: list[int] = []
    real = pipeline.embed_pixels

    def embed_pixels(pixels: Mapping[Family, Array]) -> Array:
        sizes.append(len(pixels["dinov3"]))
        return real(pixels)

    monkeypatch.setattr(pipeline, "embed_pixels", embed_pixels)
    return sizes


def test_a_hit_is_what_was_computed(cached: Pipeline) -> None:
    first = cached.embed(PICTURES)
    assert cached.from_cache == [False] * 3
    second = cached.embed(PICTURES[::-1])
    assert cached.from_cache == [True] * 3
    np.testing.assert_array_equal(second, first[::-1])
    assert len(entries(cached)) == 3


def test_only_the_unknown_are_computed_and_equal_images_once(cached: Pipeline, monkeypatch: pytest.MonkeyPatch) -> None:
    cached.embed(PICTURES[:1])
    batches = watched_batches(cached, monkeypatch)
    mixed = cached.embed([PICTURES[1], PICTURES[0], PICTURES[1], PICTURES[2]])
    assert cached.from_cache == [False, True, False, False]
    assert batches == [2]
    np.testing.assert_array_equal(mixed[0], mixed[2])


def test_all_cached_leaves_the_encoders_shut(
    engines: MakeEngines, cached: Pipeline, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    wanted = cached.lora_from_images(PICTURES, strength=0.5)
    opened: list[str] = []

    def watched(real: Callable[[CpuBackend, str], Any]) -> Callable[[CpuBackend, str], Any]:
        def call(self: CpuBackend, what: str) -> Any:
            opened.append(what)
            return real(self, what)

        return call

    for name in ("store", "engine"):
        monkeypatch.setattr(CpuBackend, name, watched(getattr(CpuBackend, name)))
    with open_engines(engines("tiny", "int8"), cache=tmp_path / "cache") as pipeline:
        found = pipeline.lora_from_images(PICTURES, strength=0.5)
    assert {name.split(".")[0] for name in opened} == {"adapter"}
    assert found.metadata == wanted.metadata
    for module, pair in wanted.factors.items():
        np.testing.assert_array_equal(found.factors[module][0], pair[0])


@pytest.mark.parametrize("damage", ["truncated", "flipped bit", "empty", "foreign"])
def test_damage_is_computed_again_and_said(cached: Pipeline, damage: str, caplog: pytest.LogCaptureFixture) -> None:
    first = cached.embed(PICTURES[:1])
    (path,) = entries(cached)
    data = bytearray(path.read_bytes())
    if damage == "flipped bit":
        data[-1] ^= 1
    damaged = {"truncated": data[:-5], "flipped bit": data, "empty": bytearray(), "foreign": bytearray(b"x" * 100)}
    path.write_bytes(damaged[damage])
    again = cached.embed(PICTURES[:1])
    assert "damaged" in caplog.text
    assert cached.from_cache == [False]
    np.testing.assert_array_equal(again, first)
    cached.embed(PICTURES[:1])
    assert cached.from_cache == [True]


def test_a_place_that_cannot_be_written_costs_only_the_cache(
    engines: MakeEngines, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "file").write_text("not a folder")
    with open_engines(engines("tiny", "int8"), cache=tmp_path / "file" / "cache") as pipeline:
        pipeline.embed(PICTURES)
    assert caplog.text.count("not kept") == 1


def test_the_key_is_the_content_of_image_and_encoders(engines: MakeEngines, tmp_path: Path) -> None:
    """Another precision, backend or file misses, even a copy of it, and the square decides of the image."""
    directory = engines("tiny", "int8")
    contents = content_id(read_manifest(directory), ENCODERS)
    again = shutil.copytree(directory, tmp_path / "copy")
    assert content_id(read_manifest(again), ENCODERS) == contents
    others = {encoders_id(contents, "cpu", "1"), encoders_id(contents, "cuda", "1"), encoders_id(contents, "cpu", "2")}
    others.add(encoders_id(content_id(read_manifest(engines("tiny", "fp32")), ENCODERS), "cpu", "1"))
    assert len(others) == 4
    with open_engines(directory) as first, open_engines(again) as second:
        assert first._encoders_id() != second._encoders_id()
    cache = EmbeddingCache(tmp_path, lambda: encoders_id(contents, "cpu", "1"))
    square = square_image(PICTURES[0])
    assert cache.path(square) == cache.path(square_image(square))
    assert cache.path(square) != cache.path(square.transpose(Image.Transpose.FLIP_LEFT_RIGHT))


def test_only_contents_and_precision_make_the_content_id(engines: MakeEngines) -> None:
    manifest = read_manifest(engines("tiny", "int8"))
    again = dataclasses.replace(manifest, build="build-2", build_key="2", created="later", versions={})
    assert content_id(again, ENCODERS) == content_id(manifest, ENCODERS)
    pack = manifest.models["dinov3"].pack
    files = {**manifest.files, pack: FileFacts(1, "0" * 64)}
    assert content_id(dataclasses.replace(manifest, files=files), ENCODERS) != content_id(manifest, ENCODERS)
    assert content_id(manifest, ["adapter"]) == content_id(dataclasses.replace(manifest, files=files), ["adapter"])


def test_no_pass_has_more_images_than_fit(cached: Pipeline, monkeypatch: pytest.MonkeyPatch) -> None:
    cached.cache = None
    batches = watched_batches(cached, monkeypatch)
    cached.embed([picture(32, 32, seed) for seed in range(IMAGES_PER_PASS + 2)])
    assert batches == [IMAGES_PER_PASS, 2]


def test_what_is_computed_is_kept_pass_by_pass(cached: Pipeline, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ctrl-C in the second pass: the first one is not lost."""
    pictures = [picture(32, 32, seed) for seed in range(IMAGES_PER_PASS + 1)]
    batches, real = watched_batches(cached, monkeypatch), cached.embed_pixels

    def interrupted(pixels: Mapping[Family, Array]) -> Array:
        if batches:
            raise KeyboardInterrupt
        return real(pixels)

    monkeypatch.setattr(cached, "embed_pixels", interrupted)
    with pytest.raises(KeyboardInterrupt):
        cached.embed(pictures)
    monkeypatch.setattr(cached, "embed_pixels", real)
    cached.embed(pictures)
    assert cached.from_cache == [True] * IMAGES_PER_PASS + [False]
    assert batches == [IMAGES_PER_PASS, 1]


@pytest.mark.parametrize(
    ("platform", "variables", "wanted"),
    [
        ("linux", {FOLDER_VARIABLE: "/x"}, "/x/embeddings"),
        ("linux", {"XDG_CACHE_HOME": "/xdg"}, "/xdg/i2l/embeddings"),
        ("linux", {"XDG_CACHE_HOME": "relative"}, "/home/me/.cache/i2l/embeddings"),
        ("linux", {}, "/home/me/.cache/i2l/embeddings"),
        ("darwin", {"XDG_CACHE_HOME": "/xdg"}, "/home/me/Library/Caches/i2l/embeddings"),
        ("win32", {"LOCALAPPDATA": "/local"}, "/local/i2l/embeddings"),
    ],
)
def test_where_the_cache_lies(
    platform: str, variables: dict[str, str], wanted: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in (FOLDER_VARIABLE, "XDG_CACHE_HOME", "LOCALAPPDATA"):
        monkeypatch.delenv(name, raising=False)
    for name, value in ({"HOME": "/home/me"} | variables).items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(sys, "platform", platform)
    assert default_cache_folder() == Path(wanted)


def test_embed_keeps_what_can_be_read_and_lists_the_rest(engines: MakeEngines, tmp_path: Path) -> None:
    """A folder of six: the passes are of what can be read, one of the six again under another name."""
    folder = tmp_path / "pictures"
    folder.mkdir()
    for seed in range(IMAGES_PER_PASS):
        picture(32, 32, seed).save(folder / f"{seed}.png")
    shutil.copyfile(folder / "0.png", folder / "again.png")
    (folder / "broken.jpg").write_bytes(b"")
    arguments = ["embed", str(folder), "--engines", str(engines("tiny", "int8"))]
    result = CliRunner().invoke(main, [*arguments, "--json"])
    facts = json.loads(result.stdout)
    assert [Path(row["image"]).name for row in facts["embeddings"]] == ["0.png", "1.png", "2.png", "3.png", "again.png"]
    assert [row["from_cache"] for row in facts["embeddings"]] == [False] * IMAGES_PER_PASS + [True]
    assert [Path(row["image"]).name for row in facts["failed"]] == ["broken.jpg"]
    assert result.exit_code == 1
    assert result.stderr.splitlines()[1:] == ["error: 1 of 6 images cannot be used"]
    again = CliRunner().invoke(main, arguments)
    assert again.stdout.count("was there") == IMAGES_PER_PASS + 1
    assert again.exit_code == 1


def test_embed_then_run(engines: MakeEngines, photo: Path, tmp_path: Path) -> None:
    common = [str(photo), "--engines", str(engines("tiny", "fp32"))]
    run = ["run", *common, "--output", str(tmp_path / "x.safetensors"), "--json"]

    def json_of(*arguments: str) -> dict[str, Any]:
        result = CliRunner().invoke(main, arguments, catch_exceptions=False)
        assert result.exit_code == 0, result.stderr
        facts: dict[str, Any] = json.loads(result.stdout)
        return facts

    (first,) = json_of("embed", *common, "--json")["embeddings"]
    assert first["from_cache"] is False
    assert Path(first["embedding"]).is_file()
    assert json_of("embed", *common, "--json")["embeddings"][0]["from_cache"] is True
    assert json_of(*run)["from_cache"] == 1
    facts = json_of(*run, "--no-cache")
    assert facts["from_cache"] == 0
    assert "dinov3" in facts["seconds"]
    text = CliRunner().invoke(main, run[:-1], catch_exceptions=False).stdout
    assert "1 of 1 embeddings came from" in text
