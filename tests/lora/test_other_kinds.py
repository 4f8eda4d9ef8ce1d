"""LoHa, LoKr and OFT, to be drawn: against the change as their papers define it, made whole."""

from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner
from numpy.typing import NDArray
from safetensors.numpy import save_file

from i2l.cli import main
from i2l.errors import LoraNotASum, LoraUnreadable
from i2l.lora.other_kinds import read_changes

MODULES = ("layers.0.attention.to_q", "layers.11.feed_forward.w2")
Tensors = dict[str, NDArray[np.float32]]


def values(seed: int, **shapes: tuple[int, ...]) -> Tensors:
    generator = np.random.default_rng(seed)
    return {name: generator.standard_normal(shape).astype(np.float32) for name, shape in shapes.items()}


def saved(path: Path, parts: Tensors, form: str = "diffusion_model.{}.{}") -> Path:
    names = {form.format(module, part): module for module in MODULES for part in parts}
    if form.startswith("lora_unet_"):
        names = {form.format(m.replace(".", "_"), part): m for m in MODULES for part in parts}
    save_file({name: parts[name.rsplit(".", 1)[-1]] for name in names}, path)
    return path


LOHA: dict[str, tuple[int, ...]] = {
    "hada_w1_a": (12, 3), "hada_w1_b": (3, 8), "hada_w2_a": (12, 2), "hada_w2_b": (2, 8),
}  # fmt: skip


@pytest.mark.parametrize("form", ["diffusion_model.{}.{}", "lora_unet_{}.{}", "base_model.model.{}.{}"])
@pytest.mark.parametrize("alpha", [None, 6.0])
def test_a_loha_is_one_product_of_factors(alpha: float | None, form: str, tmp_path: Path) -> None:
    parts = values(0, **LOHA)
    wanted = (parts["hada_w1_a"] @ parts["hada_w1_b"]) * (parts["hada_w2_a"] @ parts["hada_w2_b"])
    if alpha is not None:
        parts["alpha"] = np.array(alpha, np.float32)
        wanted *= alpha / 3
    file = read_changes(saved(tmp_path / "x.safetensors", parts, form))
    assert file.kinds == ("LoHa",)
    assert set(file.lora.factors) == set(MODULES)
    for a, b in file.lora.factors.values():
        np.testing.assert_allclose(b @ a, wanted, atol=1e-5)


@pytest.mark.parametrize("whole", [("lokr_w1",), ("lokr_w2",), ("lokr_w1", "lokr_w2"), ()])
def test_the_norm_of_a_lokr(whole: tuple[str, ...], tmp_path: Path) -> None:
    sides = {"lokr_w1": (4, 3), "lokr_w2": (6, 5)}
    shapes: dict[str, tuple[int, ...]] = {}
    for name, (rows, columns) in sides.items():
        shapes |= {name: (rows, columns)} if name in whole else {f"{name}_a": (rows, 2), f"{name}_b": (2, columns)}
    parts = values(1, **shapes) | {"alpha": np.array(0.5, np.float32)}
    w1, w2 = (parts[n] if n in whole else parts[f"{n}_a"] @ parts[f"{n}_b"] for n in sides)
    scale = 1.0 if len(whole) == 2 else 0.25
    file = read_changes(saved(tmp_path / "x.safetensors", parts))
    assert file.kinds == ("LoKr",)
    wanted = scale * np.linalg.norm(np.kron(w1, w2))
    assert file.norms == pytest.approx(dict.fromkeys(MODULES, wanted), rel=1e-5)


@pytest.mark.parametrize("form", ["kohya", "kohya with a limit", "peft"])
def test_the_norm_of_an_oft_is_of_its_rotation(form: str, tmp_path: Path) -> None:
    upper = np.triu(values(2, q=(3, 4, 4))["q"] / 4, 1).astype(np.float32)
    skew = (upper - upper.transpose(0, 2, 1)).astype(np.float64)
    parts: Tensors = {"oft_blocks": upper}
    if form == "peft":
        rows, columns = np.triu_indices(4, 1)
        parts = {"oft_R": np.ascontiguousarray(upper[:, rows, columns])}
    if form == "kohya with a limit":
        parts["alpha"] = np.array(0.3, np.float32)
        skew *= np.float32(0.3) / np.linalg.norm(skew)
    turned = [(np.eye(4) + q) @ np.linalg.inv(np.eye(4) - q) for q in skew]
    np.testing.assert_allclose(turned[0] @ turned[0].T, np.eye(4), atol=1e-12)  # a rotation
    file = read_changes(saved(tmp_path / "x.safetensors", parts))
    wanted = np.linalg.norm([turn - np.eye(4) for turn in turned])
    assert file.norms == pytest.approx(dict.fromkeys(MODULES, wanted), rel=1e-5)


def test_they_are_drawn_and_named(tmp_path: Path) -> None:
    loha = saved(tmp_path / "a.safetensors", values(3, **LOHA))
    other = saved(tmp_path / "b.safetensors", values(4, **LOHA))
    lokr = saved(tmp_path / "c.safetensors", values(5, lokr_w1=(4, 4), lokr_w2=(3, 2)))
    oft = saved(tmp_path / "d.safetensors", {"oft_blocks": np.triu(values(8, q=(2, 6, 6))["q"], 1).astype(np.float32)})
    for paths in ((loha,), (lokr,), (oft,), (loha, other), (loha, lokr, oft)):
        output = tmp_path / "out.svg"
        arguments = ["plot", *map(str, paths), "--output", str(output)]
        result = CliRunner().invoke(main, arguments, catch_exceptions=False)
        assert result.exit_code == 0
        drawn = output.read_text(encoding="utf-8")
        for path, kind in ((loha, "LoHa"), (lokr, "LoKr"), (oft, "OFT")):
            assert (f"({kind}" in drawn) == (path in paths), (kind, paths)
        output.unlink()


@pytest.mark.parametrize(
    ("parts", "words"),
    [
        ({"hada_w1_a": (4, 2), "hada_w1_b": (2, 4)}, "make no LoHa"),
        ({"lokr_w1": (4, 2)}, "make no LoKr"),
        ({"lokr_w1": (2, 2), "lokr_w2_a": (2, 3), "lokr_w2_b": (4, 2)}, "make no LoKr"),
        ({"oft_blocks": (2, 3, 4)}, "make no OFT"),
        ({**LOHA, "hada_t1": (2, 2, 3, 3)}, "convolutions are not drawn"),
    ],
)
def test_tensors_that_do_not_belong_together(parts: dict[str, tuple[int, ...]], words: str, tmp_path: Path) -> None:
    with pytest.raises(LoraUnreadable, match=words):
        read_changes(saved(tmp_path / "x.safetensors", values(6, **parts)))


@pytest.mark.parametrize("part", ["boft_R", "lora_mid", "vera_lambda_b", "diff"])
def test_other_kinds_are_refused_by_name(part: str, tmp_path: Path) -> None:
    with pytest.raises(LoraNotASum):
        read_changes(saved(tmp_path / "x.safetensors", values(7, **{part: (4, 4)})))
