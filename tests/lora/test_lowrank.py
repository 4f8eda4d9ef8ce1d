"""Low rank: against numpy's full singular value decomposition of the product itself."""

import json
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner
from hypothesis import given, settings
from hypothesis import strategies as st

from conftest import MakeEngines, picture
from i2l.cli import main
from i2l.errors import LoraNotFinite
from i2l.lora.lora import Lora
from i2l.lora.lowrank import cosine, product_dot, product_error, product_norm, reduce_lora, reduce_rank

sizes = st.integers(1, 24)


def factors(rank: int, wide: int, tall: int, seed: int, spread: float = 0.0) -> tuple[np.ndarray, np.ndarray]:
    """A and B with singular values that may span decades, and a common offset that would mislead a centred method."""
    generator = np.random.default_rng(seed)
    scale = 10.0 ** (-spread * np.arange(rank))[:, None]
    a = (generator.standard_normal((rank, wide)) + 3) * scale
    return a.astype(np.float32), generator.standard_normal((tall, rank)).astype(np.float32)


def product(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    return np.asarray(b.astype(np.float64) @ a.astype(np.float64))


@settings(max_examples=150, deadline=None)
@given(sizes, sizes, sizes, st.integers(1, 24), st.integers(0, 99), st.floats(0, 1))
def test_the_error_is_the_optimum(rank: int, wide: int, tall: int, kept: int, seed: int, spread: float) -> None:
    """Eckart and Young: no matrix of rank k is nearer than the tail of the singular values."""
    a, b = factors(rank, wide, tall, seed, spread)
    reduced_a, reduced_b = reduce_rank(a, b, kept)
    assert (reduced_a.shape, reduced_b.shape) == ((kept, wide), (tall, kept))
    assert {str(reduced_a.dtype), str(reduced_b.dtype)} == {"float32"}
    whole = product(a, b)
    optimum = np.linalg.norm(np.linalg.svd(whole, compute_uv=False)[kept:])
    error = np.linalg.norm(whole - product(reduced_a, reduced_b))
    # the factors are handed back in float32: 6e-8 per value, some 1e-6 of the product's norm
    assert abs(error - optimum) < 3e-6 * np.linalg.norm(whole)


@settings(max_examples=100, deadline=None)
@given(sizes, sizes, sizes, sizes, st.integers(0, 99))
def test_gram_matrices_give_what_the_products_give(rank: int, other: int, wide: int, tall: int, seed: int) -> None:
    first, second = factors(rank, wide, tall, seed), factors(other, wide, tall, seed + 1)
    x, y = product(*first), product(*second)
    assert product_norm(first[1], first[0]) == pytest.approx(np.linalg.norm(x), rel=1e-9)
    assert product_dot(first, second) == pytest.approx(
        (x * y).sum(), abs=float(1e-9 * np.linalg.norm(x) * np.linalg.norm(y))
    )
    # the difference of two near products cancels in the Gram matrix: half the digits of float64 are left
    assert product_error(first, second) == pytest.approx(np.linalg.norm(x - y) / np.linalg.norm(y), rel=1e-6, abs=1e-7)


def lora(seed: int = 0, rank: int = 8) -> Lora:
    return Lora({f"layers.{i}": factors(rank, 20 + i, 30 - i, seed + i, 0.3) for i in range(3)})


def test_the_errors_told_are_the_errors_made() -> None:
    whole = lora()
    reduced, told = reduce_lora(whole, 3)
    lost = {m: np.linalg.norm(product(*whole.factors[m]) - product(*reduced.factors[m])) for m in whole.factors}
    size = {m: np.linalg.norm(product(*whole.factors[m])) for m in whole.factors}
    errors = {m: lost[m] / size[m] for m in lost}
    assert (told.rank_before, told.rank, reduced.rank) == (8, 3, 3)
    assert {pair[0].shape[0] for pair in reduced.factors.values()} == {3}
    assert told.relative_error == pytest.approx(
        np.linalg.norm(list(lost.values())) / np.linalg.norm(list(size.values())), rel=1e-4
    )
    assert told.worst_error == pytest.approx(max(errors.values()), rel=1e-4)
    assert told.worst_module == max(errors, key=lambda m: errors[m])


def test_a_rank_that_is_low_already_is_left_alone() -> None:
    whole = lora()
    same, told = reduce_lora(whole, 8)
    assert same is whole
    assert told.relative_error == 0.0
    assert "nothing reduced" in str(told)


def test_a_lora_that_does_nothing_stays_so() -> None:
    silent = Lora({"m": (np.zeros((8, 5), np.float32), np.zeros((6, 8), np.float32))})
    reduced, told = reduce_lora(silent, 2)
    assert told.relative_error == 0.0
    assert not product(*reduced.factors["m"]).any()
    assert cosine(silent, silent) == 0.0


def test_values_that_are_not_finite_are_named() -> None:
    whole = lora()
    whole.factors["layers.1"][0][0, 0] = np.inf
    with pytest.raises(LoraNotFinite, match=r"layers\.1"):
        reduce_lora(whole, 3)


def test_cosine_of_known_directions() -> None:
    whole = lora()
    opposite = Lora({m: (-2 * a, b) for m, (a, b) in whole.factors.items()})
    assert cosine(whole, whole) == pytest.approx(1)
    assert cosine(whole, opposite) == pytest.approx(-1)
    x, y = (np.concatenate([product(*pair).ravel() for pair in of.factors.values()]) for of in (whole, lora(7)))
    assert cosine(whole, lora(7)) == pytest.approx(x @ y / np.linalg.norm(x) / np.linalg.norm(y))


def test_run_reduces_and_says_so(engines: MakeEngines, tmp_path: Path) -> None:
    for index in range(2):
        picture(64, 64, seed=index).save(tmp_path / f"{index}.png")
    arguments = ["run", str(tmp_path), "--engines", str(engines("tiny", "fp32")), "--reduce-rank", "5"]
    arguments += ["--output", str(tmp_path / "out" / "x.safetensors")]
    result = CliRunner().invoke(main, [*arguments, "--json"], catch_exceptions=False)
    facts = json.loads(result.stdout)
    assert facts["rank"] == 5
    assert 0 < facts["rank_reduction"]["relative_error"] <= facts["rank_reduction"]["worst_error"] < 1
    text = CliRunner().invoke(main, arguments, catch_exceptions=False).stdout
    assert "rank 8 reduced to 5: relative error of B @ A" in text
