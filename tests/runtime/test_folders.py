"""Folders as input: which files, in which order, and what the command line makes of them."""

import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner, Result
from hypothesis import given
from hypothesis import strategies as st

from conftest import MakeEngines, picture
from i2l.cli import main
from i2l.errors import FolderEmpty
from i2l.runtime.jobs import Per, plan_jobs
from i2l.runtime.pictures.listing import list_images, natural_key, skipped_line
from i2l.runtime.pipeline import open_engines


def i2l(*arguments: object) -> Result:
    return CliRunner().invoke(main, [str(argument) for argument in arguments], catch_exceptions=False)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Two pictures of different aspect ratios, and things that are no pictures."""
    made = tmp_path / "photos"
    (made / "more").mkdir(parents=True)
    picture(120, 90, seed=1).save(made / "p10.png")
    picture(90, 160, seed=2).save(made / "P2.JPG")
    (made / "notes.txt").write_text("no picture")
    (made / ".hidden.png").write_bytes(b"")
    return made


def test_images_come_in_natural_order_and_the_rest_is_named(folder: Path, tmp_path: Path) -> None:
    single = tmp_path / "named-anyhow"
    found = list_images([single, folder])
    assert [path.name for path in found.images] == ["named-anyhow", "P2.JPG", "p10.png"]
    assert [path.name for path in found.skipped] == ["more", "notes.txt"]
    assert skipped_line(found.skipped) == (
        "skipped 1 that is not a picture: notes.txt; 1 folder, which --recursive looks into: more"
    )


def test_recursive_takes_what_lies_deeper_once(folder: Path) -> None:
    """Whatever links say: one leads back up, so a walk that followed it blindly would never end."""
    picture(60, 60, seed=3).save(folder / "more" / "deep.png")
    (folder / "more" / "again").symlink_to(folder)
    (folder / ".hidden").mkdir()
    picture(60, 60, seed=4).save(folder / ".hidden" / "secret.png")
    found = list_images([folder], recursive=True)
    assert [path.name for path in found.images] == ["P2.JPG", "p10.png", "deep.png"]
    assert [path.name for path in found.skipped] == ["notes.txt"]
    assert list_images([folder]).images == found.images[:2]


@pytest.mark.parametrize(
    ("per", "recursive", "outputs"),
    [
        ("image", False, ["P2", "p10"]),
        ("image", True, ["P2", "p10", "more/deep", "more/most/deepest"]),
        ("folder", False, ["more"]),
        ("folder", True, ["more", "more/most"]),
    ],
)
def test_jobs_of_folders(folder: Path, per: Per, recursive: bool, outputs: list[str]) -> None:
    """The LoRAs may go into the folder itself: what lies there is no input."""
    (folder / "more" / "most").mkdir()
    picture(60, 60, seed=3).save(folder / "more" / "deep.png")
    picture(60, 60, seed=4).save(folder / "more" / "most" / "deepest.png")
    loras = folder / "loras"
    loras.mkdir()
    picture(60, 60, seed=5).save(loras / "drawn.plot.png")
    plan = plan_jobs(folder, loras, per, recursive=recursive)
    assert [str(job.output.relative_to(loras)) for job in plan.jobs] == [f"{o}.safetensors" for o in outputs]


def test_a_folder_without_images_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("x")
    with pytest.raises(FolderEmpty, match="holds no image"):
        list_images([tmp_path])


@given(st.lists(st.integers(0, 10**6), unique=True))
def test_numbers_in_names_count_as_numbers(numbers: Sequence[int]) -> None:
    paths = sorted((Path(f"IMG_{n}.jpg") for n in numbers), key=natural_key)
    assert paths == [Path(f"IMG_{n}.jpg") for n in sorted(numbers)]


@given(st.lists(st.text(st.characters(codec="utf-8", exclude_characters="/\0"), min_size=1), unique=True))
def test_any_names_have_one_order(names: list[str]) -> None:
    paths = [Path(f"x{name}") for name in names]
    backwards = list(reversed(paths))
    assert sorted(paths, key=natural_key) == sorted(backwards, key=natural_key)


def test_a_folder_with_weights_is_its_images_with_weights(folder: Path, engines: MakeEngines, tmp_path: Path) -> None:
    output = tmp_path / "lora.safetensors"
    arguments = ("run", folder, "--engines", engines("tiny", "fp32"), "--output", output, "--dtype", "fp32", "--json")
    result = i2l(*arguments, "--weight", "0.7", "--weight", "-0.3")
    assert result.exit_code == 0, result.stderr
    assert "notes.txt" in result.stderr
    assert [Path(name).name for name in json.loads(result.stdout)["images"]] == ["P2.JPG", "p10.png"]
    with open_engines(engines("tiny", "fp32")) as pipeline:
        wanted = pipeline.lora_from_images([folder / "P2.JPG", folder / "p10.png"], weights=[0.7, -0.3])
    from safetensors.numpy import load_file

    found = load_file(output)
    for module, (a, b) in wanted.factors.items():
        np.testing.assert_array_equal(found[f"diffusion_model.{module}.lora_A.weight"], a)
        np.testing.assert_array_equal(found[f"diffusion_model.{module}.lora_B.weight"], b)


@pytest.mark.parametrize("extra", [["--weight", "1"], ["--weight", "nan"] * 2, ["--strength", "inf"]])
def test_wrong_weights_are_wrong_usage(folder: Path, tmp_path: Path, extra: list[str]) -> None:
    """Exit 2 before the engines are looked at: there are none."""
    result = i2l("run", folder, "--engines", tmp_path / "none", "--output", tmp_path / "x.safetensors", *extra)
    assert result.exit_code == 2
    assert "weight" in result.stderr or "strength" in result.stderr
