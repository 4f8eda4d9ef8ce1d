"""Joining LoRA files, and reading them back."""

import json
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner, Result
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.numpy import save_file

from i2l.cli import main
from i2l.errors import LorasDiffer, LoraUnreadable
from i2l.lora.keys import KEYS, KeyFormat
from i2l.lora.lora import Dtype, Lora
from i2l.lora.lorafiles import merge_loras
from i2l.lora.lowrank import product_error
from i2l.lora.reading import LoraFile, describe_lora, read_lora

MODULES = ("layers.0.attention.to_q", "layers.1.feed_forward.w2")


def lora(rank: int = 4, seed: int = 0, modules: tuple[str, ...] = MODULES) -> Lora:
    generator = np.random.default_rng(seed)
    return Lora(
        {
            m: (generator.standard_normal((rank, 12 + i), np.float32), generator.standard_normal((9, rank), np.float32))
            for i, m in enumerate(modules)
        }
    )


def product(pair: tuple[np.ndarray, np.ndarray]) -> np.ndarray:
    return np.asarray(pair[1].astype(np.float64) @ pair[0].astype(np.float64))


def i2l_merge(*arguments: object) -> Result:
    return CliRunner().invoke(main, ["merge", *(str(a) for a in arguments)], catch_exceptions=False)


@pytest.mark.parametrize("key_format", ["comfyui", "diffsynth"])
@pytest.mark.parametrize(("dtype", "tolerance"), [("fp32", 0), ("fp16", 1e-3), ("bf16", 8e-3)])  # half a last place
def test_a_file_is_read_as_it_was_written(
    tmp_path: Path, dtype: Dtype, tolerance: float, key_format: KeyFormat
) -> None:
    wanted = lora()
    found = read_lora(wanted.save(tmp_path / "x.safetensors", dtype=dtype, key_format=key_format))
    assert (found.dtype, found.key_format) == (dtype, key_format)
    for module, pair in wanted.factors.items():
        for mine, theirs in zip(found.lora.factors[module], pair, strict=True):
            np.testing.assert_allclose(mine, theirs, rtol=tolerance, atol=1e-6 if tolerance else 0)


@settings(max_examples=40, deadline=None)
@given(st.lists(st.tuples(st.integers(1, 6), st.floats(-3, 3)), min_size=2, max_size=4))
def test_the_merge_is_the_weighted_sum(parts: list[tuple[int, float]]) -> None:
    files = [LoraFile(Path(f"{i}"), lora(rank, i), "fp32", "comfyui") for i, (rank, _) in enumerate(parts)]
    merged = merge_loras(files, [weight for _, weight in parts])
    assert merged.rank == sum(rank for rank, _ in parts)
    for module in MODULES:
        terms = [w * product(file.lora.factors[module]) for file, (_, w) in zip(files, parts, strict=True)]
        bound = 1e-5 * max(1.0, *(float(np.abs(term).max()) for term in terms))  # float32 in A; terms may cancel
        np.testing.assert_allclose(product(merged.factors[module]), sum(terms), rtol=0, atol=bound)


def test_files_of_both_key_forms_merge_and_reduce(tmp_path: Path) -> None:
    first, second = lora(4, 1), lora(6, 2)
    a = first.save(tmp_path / "a.safetensors", dtype="fp32")
    b = second.save(tmp_path / "b.safetensors", dtype="fp32", key_format="diffsynth")
    output = tmp_path / "ab.safetensors"
    result = i2l_merge(a, b, "--weight", "0.5", "--weight", "-2", "--output", output, "--json")
    assert json.loads(result.stdout) == {"output": str(output), "rank": 10, "modules": 2, "dtype": "fp32"}
    wanted = {m: 0.5 * product(first.factors[m]) - 2 * product(second.factors[m]) for m in MODULES}
    merged = read_lora(output)
    assert merged.key_format == "comfyui"
    for module, change in wanted.items():
        np.testing.assert_allclose(product(merged.lora.factors[module]), change, rtol=0, atol=1e-5)
    facts = json.loads(i2l_merge(a, b, "--output", output, "--reduce-rank", "3", "--json").stdout)
    assert (facts["rank"], describe_lora(output)["rank"]) == (3, 3)
    mean = merge_loras([read_lora(a), read_lora(b)])
    errors = [product_error(read_lora(output).lora.factors[m], mean.factors[m]) for m in MODULES]
    assert max(errors) == pytest.approx(facts["rank_reduction"]["worst_error"], rel=1e-4)


def test_dtypes_that_differ_become_float32(tmp_path: Path) -> None:
    kinds: tuple[Dtype, ...] = ("bf16", "fp16")
    paths = [lora().save(tmp_path / f"{kind}.safetensors", dtype=kind) for kind in kinds]
    for given_paths, wanted in ((paths, "F32"), ([paths[0]] * 2, "BF16")):
        assert i2l_merge(*given_paths, "--output", tmp_path / "x.safetensors").exit_code == 0
        assert describe_lora(tmp_path / "x.safetensors")["dtype"] == wanted


def test_other_modules_are_a_union_and_other_shapes_are_explained(tmp_path: Path) -> None:
    a = lora().save(tmp_path / "a.safetensors", dtype="fp32")
    b = lora(7, modules=MODULES[:1], seed=3).save(tmp_path / "b.safetensors", dtype="fp32")
    assert i2l_merge(a, b, "--weight", "1", "--weight", "2", "--output", tmp_path / "x.safetensors").exit_code == 0
    merged = read_lora(tmp_path / "x.safetensors").lora
    first, second = read_lora(a).lora, read_lora(b).lora
    both = product(first.factors[MODULES[0]]) + 2 * product(second.factors[MODULES[0]])
    np.testing.assert_allclose(product(merged.factors[MODULES[0]]), both, atol=1e-5)
    np.testing.assert_allclose(product(merged.factors[MODULES[1]]), product(first.factors[MODULES[1]]), atol=1e-6)
    c = lora(modules=MODULES[::-1]).save(tmp_path / "c.safetensors")
    result = i2l_merge(a, c, "--output", tmp_path / "y.safetensors")
    assert result.exit_code == 1
    with pytest.raises(LorasDiffer, match=r"changes a weight of \[9, 13\] in one and of \[9, 12\] in the other"):
        merge_loras([read_lora(a), read_lora(c)])
    assert not (tmp_path / "y.safetensors").exists()


def test_wrong_usage(tmp_path: Path) -> None:
    a = lora().save(tmp_path / "a.safetensors")
    assert i2l_merge(a, "--output", tmp_path / "x").exit_code == 2
    assert i2l_merge(a, a, "--output", tmp_path / "x", "--weight", "1").exit_code == 2


@pytest.mark.parametrize("name", ["alphas", "lonely", "dtype"])
def test_what_would_be_misread_is_refused(tmp_path: Path, name: str) -> None:
    down, up = (key.format("m") for key in KEYS["comfyui"])
    tensors: dict[str, np.ndarray] = {down: np.ones((2, 3), np.float32), up: np.ones((4, 2), np.float32)}
    if name == "alphas":
        tensors["diffusion_model.m.alpha"] = np.ones(2, np.float32)
    if name == "lonely":
        tensors[KEYS["comfyui"][0].format("n")] = tensors[down]
    kind = np.float64 if name == "dtype" else np.float32
    save_file({key: value.astype(kind) for key, value in tensors.items()}, tmp_path / "x.safetensors")
    with pytest.raises(LoraUnreadable):
        read_lora(tmp_path / "x.safetensors")


def test_uneven_ranks_become_one(tmp_path: Path) -> None:
    tensors: dict[str, np.ndarray] = {}
    for module, rank in (("m.0", 2), ("m.1", 3)):
        pair = (np.ones((rank, 3), np.float32), np.ones((4, rank), np.float32))
        tensors |= {key.format(module): factor for key, factor in zip(KEYS["comfyui"], pair, strict=True)}
    save_file(tensors, tmp_path / "x.safetensors")
    found = read_lora(tmp_path / "x.safetensors").lora
    assert {a.shape[0] for a, _ in found.factors.values()} == {3}
    assert (product(found.factors["m.0"]) == 2).all()
    assert (product(found.factors["m.1"]) == 3).all()
