"""Pictures of LoRAs: the numbers that are drawn, and that something is."""

from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner
from PIL import Image

from conftest import MakeEngines
from i2l.cli import main
from i2l.look.contact_sheet import pictures_of
from i2l.look.plotting import shortened, similarities, similarity_scale
from i2l.lora.lora import Lora
from i2l.lora.norms import components, norm_table, split_module
from i2l.lora.reading import read_factors

MODULES = [
    *(f"layers.{i}.attention.to_q" for i in (10, 2)),
    *(f"layers.{i}.feed_forward.w1" for i in (10, 2)),
    "noise_refiner.0.attention.to_q",
]


def lora(seed: int = 0, size: float = 1.0) -> Lora:
    generator = np.random.default_rng(seed)

    def normal(*shape: int) -> np.ndarray:
        return (generator.standard_normal(shape) * size).astype(np.float32)

    return Lora({module: (normal(2, 5), normal(6, 2)) for module in MODULES})


def test_norms_stand_at_their_block_and_target() -> None:
    table = norm_table(lora())
    assert table.blocks == ("layers.2", "layers.10", "noise_refiner.0")
    assert table.targets == ("attention.to_q", "feed_forward.w1")
    a, b = lora().factors["layers.10.feed_forward.w1"]
    assert table.norms[1, 1] == pytest.approx(np.linalg.norm(b @ a), rel=1e-5)
    assert np.isnan(table.norms[1, 2])
    assert list(components(table.blocks)) == [("layers", 0, 1), ("noise_refiner", 2, 2)]


def test_names() -> None:
    assert split_module("transformer_blocks.7.img_mlp.net.2") == ("transformer_blocks.7", "img_mlp.net.2")
    assert len(shortened("x" * 200)) <= 32
    assert shortened("a$b") == r"a\$b"


def test_similarities_are_cosines() -> None:
    values = similarities([lora(0), lora(0, 3.0), lora(1)])
    np.testing.assert_allclose(values, values.T)
    np.testing.assert_allclose(np.diag(values), 1)
    assert values[0, 1] == pytest.approx(1)
    assert abs(values[0, 2]) < 0.9


def test_pictures_are_drawn(tmp_path: Path) -> None:
    paths = [str(lora(seed).save(tmp_path / f"{seed} $cats$.safetensors")) for seed in range(3)]
    assert CliRunner().invoke(main, ["plot", *paths], catch_exceptions=False).exit_code == 0
    one = str(tmp_path / "one.png")
    assert CliRunner().invoke(main, ["plot", paths[0], "--output", one], catch_exceptions=False).exit_code == 0
    with Image.open(tmp_path / "0 $cats$.plot.png") as several, Image.open(one) as single:
        assert several.height > 2 * single.height
        assert len(single.convert("RGB").getcolors(1 << 20) or []) > 50  # axes, letters, a colour bar
    assert CliRunner().invoke(main, ["plot", paths[0], "--output", str(tmp_path / "x.txt")]).exit_code == 2


def test_a_default_name_replaces_nothing(tmp_path: Path) -> None:
    path = str(lora().save(tmp_path / "a.safetensors"))
    for name in ("a.plot.png", "a-2.plot.png", "a-3.plot.png"):
        result = CliRunner().invoke(main, ["plot", path], catch_exceptions=False)
        assert (result.exit_code, result.stdout) == (0, f"drawn: {tmp_path / name}\n")


def test_similarities_are_coloured_by_what_differs() -> None:
    alike = np.array([[1, 0.97, 0.98], [0.97, 1, 0.99], [0.98, 0.99, 1]])
    assert similarity_scale(alike) == (0.97, 0.99)
    lowest, highest = similarity_scale(np.array([[1, 0.5], [0.5, 1]]))
    assert (lowest, highest) == pytest.approx((0.48, 0.5))


def test_a_contact_sheet_shows_what_a_lora_was_made_from(engines: MakeEngines, tmp_path: Path) -> None:
    """Found by content, wherever it lies and whatever it is called: red made the first LoRA, blue the second."""
    photos, loras = tmp_path / "photos", tmp_path / "loras"
    for name, colour in (("deep/red", "#d01020"), ("blue", "#1020d0"), ("green", "#10d020")):
        (photos / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (40, 30), colour).save(photos / f"{name}.png")
    arguments = ["batch", str(photos), "--recursive", "--engines", str(engines("tiny", "fp32")), "--output-dir"]
    assert CliRunner().invoke(main, [*arguments, str(loras)], catch_exceptions=False).exit_code == 0
    files = [read_factors(loras / name, allow=frozenset()) for name in ("deep/red.safetensors", "blue.safetensors")]
    found = pictures_of(files, [photos / "blue.png", photos / "green.png", photos / "deep" / "red.png"])
    assert [[picture.getpixel((0, 0)) for picture in found[file.path]] for file in files] == [
        [(0xD0, 0x10, 0x20)],
        [(0x10, 0x20, 0xD0)],
    ]
    drawn = tmp_path / "sheet.png"
    plot = ["plot", *(str(file.path) for file in files), "--output", str(drawn), "--contact-sheet"]
    result = CliRunner().invoke(main, [*plot, str(photos)], catch_exceptions=False)
    assert (result.exit_code, result.stderr) == (0, "")
    with Image.open(drawn) as image:
        colours = {colour for _, colour in image.convert("RGB").getcolors(1 << 24) or []}
    assert {(0xD0, 0x10, 0x20), (0x10, 0x20, 0xD0)} <= colours
    assert (0x10, 0xD0, 0x20) not in colours
    result = CliRunner().invoke(main, [*plot, str(photos / "deep")], catch_exceptions=False)
    assert result.stderr == f"no picture in {photos / 'deep'} is what made blue.safetensors\n"
