"""Pictures of LoRAs: the numbers that are drawn, and that something is."""

from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner
from PIL import Image

from i2l.cli import main
from i2l.look.plotting import shortened, similarities
from i2l.lora.lora import Lora
from i2l.lora.norms import components, norm_table, split_module

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
