"""Rotations that spread outliers before activations become eight bits.

A single large channel forces a coarse step on all others. Multiplying by an orthogonal matrix G with flat entries
spreads it over all channels, and folding G into the weights undoes it: ``x W^T = (x G)(W G)^T`` (QuaRot, Ashkboos et
al. 2024). No calibration is needed. G is a Kronecker product of two small Hadamard matrices, so applying it to a row of
4096 channels takes two 64 x 64 products. The two sign vectors are the best of a few hundred, as a constant offset in
the activations (SiLU and GELU make one) would pile up in one channel of a plain Hadamard matrix, and 8 to 10-fold under
unlucky signs.
"""

import math
from functools import cache
from typing import cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

Matrix = NDArray[np.float64]
SIGN_TRIES = 512
LARGEST = 256
"""Larger factors than this cost more to apply than a cosine transform loses."""


@cache
def rotation(width: int) -> tuple[Tensor, Tensor]:
    """The factors ``(left [a, a], right [b, b])`` of the rotation of ``width = a * b`` channels, float32."""
    a, b = _split(width)
    left, right = _flat(a), _flat(b)
    left = left * _signs(left, seed=0)
    right = (right * _signs(right, seed=1)).T
    return torch.from_numpy(left.astype(np.float32)), torch.from_numpy(np.ascontiguousarray(right, np.float32))


def rotate(x: Tensor, left: Tensor, right: Tensor) -> Tensor:
    """Rotate the rows of ``x [rows, a * b]``: ``left @ X @ right`` for each row seen as ``X [a, b]``.

    The right factor goes first, as one large product; measured faster than the other order and than a transpose
    between.
    """
    a, b = len(left), len(right)
    return (left @ (x.reshape(-1, b) @ right).reshape(-1, a, b)).reshape(-1, a * b)


@cache
def hadamard(size: int) -> Matrix | None:
    """A Hadamard matrix by Sylvester's doubling and Paley's first construction, or None where these give none."""
    if size == 1:
        return np.ones((1, 1))
    if size % 2:
        return None
    half = hadamard(size // 2)
    if half is not None:
        return cast("Matrix", np.kron(np.array([[1.0, 1.0], [1.0, -1.0]]), half))
    prime = size - 1
    if prime % 4 != 3 or any(prime % divisor == 0 for divisor in range(2, int(prime**0.5) + 1)):
        return None
    squares = {i * i % prime for i in range(1, prime)}
    character = np.array([0.0, *(1.0 if i in squares else -1.0 for i in range(1, prime))])
    matrix = np.eye(size)
    matrix[0, 1:] += 1
    matrix[1:, 0] -= 1
    matrix[1:, 1:] += character[(np.arange(prime)[None] - np.arange(prime)[:, None]) % prime]
    return matrix


def _flat(size: int) -> Matrix:
    """An orthogonal matrix with entries as equal as can be: Hadamard, or else the cosine transform."""
    matrix = hadamard(size)
    if matrix is not None:
        return matrix / math.sqrt(size)
    k, i = np.mgrid[:size, :size]
    cosines = np.cos(np.pi * k * (2 * i + 1) / (2 * size)) * np.sqrt(2 / size)
    cosines[0] = np.sqrt(1 / size)
    return np.asarray(cosines)


def _split(width: int) -> tuple[int, int]:
    """``a <= b`` with ``a * b = width``, near each other and both Hadamard sizes if possible."""
    pairs = [(a, width // a) for a in range(int(width**0.5), 0, -1) if width % a == 0]
    near = [pair for pair in pairs if pair[1] <= LARGEST]
    return next((pair for pair in near if all(hadamard(size) is not None for size in pair)), pairs[0])


def _signs(matrix: Matrix, seed: int) -> Matrix:
    """The signs, of many tries, under which a constant vector is spread best."""
    tries = np.random.default_rng(seed).choice([-1.0, 1.0], (SIGN_TRIES, len(matrix)))
    return np.asarray(tries[np.abs(tries @ matrix.T).max(axis=1).argmin()])
