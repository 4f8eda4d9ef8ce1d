"""Rotations that spread outliers before activations become eight bits.

A single large channel forces a coarse step on all others. Multiplying by an orthogonal matrix G with flat entries
spreads it, and folding G into the weights undoes it: ``x W^T = (x G)(W G)^T`` (QuaRot, Ashkboos et al. 2024). No
calibration is needed. G is block-diagonal: the same Hadamard matrix for every 64 channels in a row, so that applying it
is one tall product, which costs a third of a Kronecker product over all channels and leaves no measurable error more
(docs/adr/0001). Its signs are the best of a few hundred, as a constant offset in the activations (SiLU and GELU make
one) would pile up in one channel of a plain Hadamard matrix.
"""

import math
from functools import cache
from typing import cast

import numpy as np
from numpy.typing import NDArray

from ..base import Array

Matrix = NDArray[np.float64]
SIGN_TRIES = 512
BLOCK = 64
"""Channels that share a rotation, at most."""
STACKED_ROWS = 64
"""OpenBLAS starts threads of its own for products above 64 x 64 x 64 multiplications. Beside threads that rotate pieces
already they halve the speed, and numpy has no switch: so a piece is rotated as a stack of small products."""


@cache
def rotation(width: int) -> Array:
    """The rotation ``[b, b]`` of every ``b`` channels of ``width``, float32."""
    matrix = _flat(block_size(width))
    return np.ascontiguousarray((matrix * _signs(matrix)).T, np.float32)


@cache
def balanced_rotation(width: int) -> Array:
    """The rotation ``[b, b']`` of every ``b`` channels of ``width`` to some more whose sum is zero, float32.

    A reflection takes the ``b`` rotated channels and a zero to ``b + 1`` whose sum is zero, whatever the input: so the
    columns of a matrix add up to zero once they are rotated. Signs of the rotated channels are tried here, as an input
    channel whose signs are all alike would come out as one channel. One channel is left free for what rounding adds up
    to: no activation reaches it.
    """
    matrix = rotation(width).astype(np.float64)
    size = len(matrix)
    axis = np.full(size + 1, 1 / math.sqrt(size + 1))
    axis[-1] -= 1
    axis /= np.linalg.norm(axis)
    reflection = np.eye(size + 1) - 2 * np.outer(axis, axis)
    signs = np.random.default_rng(0).choice([-1.0, 1.0], (SIGN_TRIES, size))
    signs = signs[np.abs(signs @ matrix.T).max(axis=1).argmin()]
    balanced = np.zeros((size, balanced_size(size)), np.float32)
    balanced[:, : size + 1] = (matrix * signs) @ reflection[:size]
    return balanced


def balanced_size(size: int) -> int:
    """How many channels :func:`balanced_rotation` makes of a block of ``size``."""
    return size + 2


def rotate(x: Array, matrix: Array) -> Array:
    """Rotate the rows of ``x [rows, width]``, block by block, in one thread."""
    blocks = x.size // len(matrix)
    stack = x.reshape(-1, math.gcd(blocks, STACKED_ROWS), len(matrix))
    return np.asarray((stack @ matrix).reshape(len(x), -1), np.float32)


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


def block_size(width: int) -> int:
    """The largest divisor of ``width`` up to :data:`BLOCK`, with a Hadamard matrix if there is one above a quarter."""
    divisors = [size for size in range(min(BLOCK, width), 0, -1) if width % size == 0]
    return next((size for size in divisors if 4 * size >= divisors[0] and hadamard(size) is not None), divisors[0])


def _signs(matrix: Matrix) -> Matrix:
    """The signs, of many tries, under which a constant vector is spread best."""
    tries = np.random.default_rng(0).choice([-1.0, 1.0], (SIGN_TRIES, len(matrix)))
    return np.asarray(tries[np.abs(tries @ matrix.T).max(axis=1).argmin()])
