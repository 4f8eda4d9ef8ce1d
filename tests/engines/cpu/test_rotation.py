"""Rotations: orthogonal, exact to undo, and spreading what would cost an eight-bit scale its resolution."""

import math
from functools import cache

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from i2l.engines.cpu import rotation as arrays
from i2l.engines.cpu.rotation import hadamard
from i2l.export.precisions.torch_rotation import rotate, rotation
from i2l.specs import PRESETS

REAL_WIDTHS = sorted(
    {
        width
        for preset in PRESETS.values()
        for spec in (preset.siglip2, preset.dinov3)
        for width in (spec.hidden, spec.intermediate)
    }
)
"""Inputs of every rotated matrix of every preset."""
EPSILON = float(np.finfo(np.float32).eps)
widths = st.sampled_from([*range(1, 201), *REAL_WIDTHS])


@cache
def full_rotation(width: int) -> torch.Tensor:
    """The whole matrix ``[width, width]``: rotating the rows of the identity."""
    return rotate(torch.eye(width, dtype=torch.float64), rotation(width).double())


def crest(row: torch.Tensor) -> float:
    """The largest value over the root mean square: 1 is as flat as can be, ``sqrt(width)`` is all in one channel."""
    return float(row.abs().max() / row.square().mean().sqrt())


# --- orthogonal -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("width", REAL_WIDTHS)
def test_rotations_of_real_widths_are_orthogonal(width: int) -> None:
    matrix = rotation(width).double()
    error = matrix @ matrix.T - torch.eye(len(matrix))
    assert error.abs().max() < 16 * EPSILON  # every entry is rounded to float32 once: 5 observed


def test_rotations_of_all_small_widths_are_orthogonal() -> None:
    for width in range(1, 201):
        matrix = full_rotation(width)
        # As above; the cosine transform's entries differ and round each for itself: 16 observed.
        assert (matrix @ matrix.T - torch.eye(width)).abs().max() < 32 * EPSILON, width


@pytest.mark.parametrize("width", REAL_WIDTHS)
def test_real_widths_are_rotated_in_hadamard_blocks_of_64(width: int) -> None:
    assert len(rotation(width)) == 64
    assert hadamard(64) is not None


@given(widths, st.integers(1, 5), st.integers(0, 1 << 32))
@settings(deadline=None)
def test_rotated_inputs_times_rotated_weights_are_the_same_product(width: int, rows: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    x, w = (torch.randn(count, width, generator=generator) for count in (rows, 3))
    found = rotate(x, rotation(width)) @ rotate(w, rotation(width)).T
    # Two float32 products of some 100 terms and a float32 dot of `width`: a few roundings of |x| |w|.
    bound = 16 * EPSILON * x.double().norm(dim=1)[:, None] * w.double().norm(dim=1)
    assert ((found.double() - x.double() @ w.double().T).abs() <= bound).all()


@given(widths, st.data())
@settings(deadline=None)
def test_rows_are_rotated_for_themselves(width: int, data: st.DataObject) -> None:
    x = torch.randn(4, width, generator=torch.Generator().manual_seed(data.draw(st.integers(0, 1 << 32))))
    row = data.draw(st.integers(0, 3))
    alone, among = rotate(x[row : row + 1], rotation(width))[0], rotate(x, rotation(width))[row]
    torch.testing.assert_close(among, alone, rtol=0, atol=8 * EPSILON * float(x[row].norm()))  # other summation order


def test_a_rotation_is_the_same_whenever_it_is_made() -> None:
    arrays.rotation.cache_clear()
    first = rotation(6144).clone()
    arrays.rotation.cache_clear()
    assert torch.equal(first, rotation(6144))


# --- flat -------------------------------------------------------------------------------------------------------


@given(st.integers(1, 300))
@settings(deadline=None)
def test_a_hadamard_matrix_is_one(size: int) -> None:
    matrix = hadamard(size)
    if matrix is not None:
        assert np.abs(matrix).tolist() == np.ones((size, size)).tolist()
        assert (matrix @ matrix.T).tolist() == (size * np.eye(size)).tolist()


def test_the_sizes_of_hadamard_matrices() -> None:
    # Sylvester doubles; Paley's first construction gives q + 1 for a prime q = 3 mod 4. None is known to be missing but
    # those that need other constructions, and sizes that are not 1, 2 or a multiple of 4 have none.
    paley = {prime + 1 for prime in range(3, 128, 4) if all(prime % divisor for divisor in range(2, prime))}
    wanted = {base << power for base in {1} | paley for power in range(8)}
    assert {size for size in range(1, 129) if hadamard(size) is not None} == {size for size in wanted if size <= 128}


def test_a_spike_is_spread_evenly_over_its_block() -> None:
    for width in range(1, 201):
        matrix = rotation(width)
        # Hadamard: all entries alike. Each entry of a cosine transform is at most sqrt(2 / size).
        even = 1 if hadamard(len(matrix)) is not None else math.sqrt(2)
        assert matrix.abs().max() * math.sqrt(len(matrix)) <= even + 4 * EPSILON, width


def test_blocks_are_wide_and_hadamard_where_the_width_allows() -> None:
    for width in range(1, 201):
        size = len(rotation(width))
        divisors = [block for block in range(1, 65) if width % block == 0]
        assert size in divisors
        fitting = [block for block in divisors if 4 * block >= divisors[-1] and hadamard(block) is not None]
        assert size == max(fitting, default=divisors[-1]), width


@pytest.mark.parametrize("width", REAL_WIDTHS)
def test_a_constant_row_is_spread_over_real_widths(width: int) -> None:
    # All in one channel of each block would be 8; random signs give about sqrt(2 log(64)) = 2.9.
    assert crest(rotate(torch.ones(1, width), rotation(width))) < 2.2


def test_a_constant_row_is_spread_over_small_blocks() -> None:
    for width in range(16, 201):
        if len(rotation(width)) >= 16:  # all in one channel would be 4 to 8
            assert crest(rotate(torch.ones(1, width), rotation(width))) < 3.2, width
