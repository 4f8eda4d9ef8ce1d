"""Products of thin factors, handled without ever forming them.

A LoRA's change of a weight is ``B @ A`` with B ``[out, r]`` and A ``[r, in]``: r is 4 to 64 where out and in are
thousands. Norms and inner products follow from r x r Gram matrices, ``<B A, B' A'> = sum((B^T B') * (A A'^T))``, and
the best approximation of a lower rank (Eckart and Young, 1936) from a singular value decomposition of an r x r core:
with ``B = Q_b R_b`` and ``A^T = Q_a R_a``, ``B A = Q_b (R_b R_a^T) Q_a^T`` and the Q's change no singular value.
Centring the columns first, as principal component analysis does, answers another question: even at full rank it does
not give the product back.

All of it is computed in float64: a Gram matrix squares the factors' condition.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..engines.base import Array
from .errors import LoraNotFinite
from .lora import Lora

Matrix = NDArray[np.floating[Any]]
Factors = tuple[Matrix, Matrix]
"""``(A [r, in], B [out, r])``."""


@dataclass(frozen=True)
class RankReduction:
    """What a lower rank cost. Errors are relative, in the Frobenius norm of ``B @ A``."""

    rank_before: int
    rank: int
    relative_error: float
    """Of all modules together."""
    worst_error: float
    worst_module: str

    def to_dict(self) -> dict[str, Any]:
        return {
            "rank_before": self.rank_before,
            "rank": self.rank,
            "relative_error": self.relative_error,
            "worst_error": self.worst_error,
            "worst_module": self.worst_module,
        }

    def __str__(self) -> str:
        if self.rank == self.rank_before:
            return f"the rank is {self.rank} already: nothing reduced"
        return (
            f"rank {self.rank_before} reduced to {self.rank}: relative error of B @ A {self.relative_error:.3g}, "
            f"worst {self.worst_error:.3g} ({self.worst_module})"
        )


def reduce_lora(lora: Lora, rank: int) -> tuple[Lora, RankReduction]:
    """The best LoRA of at most ``rank``, and what that costs.

    A LoRA that has no higher rank comes back as it is. Every module gets the same rank, as loaders expect it.

    Raises:
        LoraNotFinite: a factor has a value that is not finite.
    """
    before = lora.rank
    if before <= rank:
        return lora, RankReduction(before, before, 0.0, 0.0, "")
    factors: dict[str, tuple[Array, Array]] = {}
    squares: dict[str, tuple[float, float]] = {}
    for module, (a, b) in lora.factors.items():
        if not (np.isfinite(a).all() and np.isfinite(b).all()):
            raise LoraNotFinite(module, "fp32")
        factors[module], squares[module] = _reduced(a, b, rank)
    reduction = _judged(before, rank, squares)
    marks = {"i2l.rank_before": str(before), "i2l.rank_error": f"{reduction.relative_error:.6g}"}
    return Lora(factors, lora.metadata | marks), reduction


def reduce_rank(a: Matrix, b: Matrix, rank: int) -> tuple[Array, Array]:
    """The factors of rank ``rank`` whose product is nearest to ``b @ a`` in the Frobenius norm.

    Args:
        a: ``[r, in]``.
        b: ``[out, r]``.
        rank: of the result; beyond what the product has, the factors are filled up with zeros.

    Returns:
        A ``[rank, in]`` and B ``[out, rank]``, float32, of equal scale.
    """
    return _reduced(a, b, rank)[0]


def product_norm(u: Matrix, v: Matrix) -> float:
    """The Frobenius norm of ``u @ v``."""
    return float(np.sqrt(max(product_dot((v, u), (v, u)), 0.0)))


def product_dot(first: Factors, second: Factors) -> float:
    """The inner product of ``B @ A`` and ``B' @ A'``, seen as one long vector each."""
    a, b = (factor.astype(np.float64) for factor in first)
    a_other, b_other = (factor.astype(np.float64) for factor in second)
    return float(((b.T @ b_other) * (a @ a_other.T)).sum())


def product_error(found: Factors, wanted: Factors) -> float:
    """``|B A - B' A'| / |B' A'|``."""
    a, b = (factor.astype(np.float64) for factor in found)
    a_ref, b_ref = (factor.astype(np.float64) for factor in wanted)
    difference = product_norm(np.concatenate([b, -b_ref], axis=1), np.concatenate([a, a_ref]))
    return difference / product_norm(b_ref, a_ref)


def cosine(first: Lora, second: Lora) -> float:
    """How alike two LoRAs are: the cosine of their ``B @ A`` over the modules of both; 0 where one does nothing."""
    dot = sum(product_dot(pair, second.factors[m]) for m, pair in first.factors.items() if m in second.factors)
    norms = [sum(product_dot(pair, pair) for pair in lora.factors.values()) for lora in (first, second)]
    return dot / float(np.sqrt(norms[0] * norms[1])) if min(norms) > 0 else 0.0


def _reduced(a: Matrix, b: Matrix, rank: int) -> tuple[tuple[Array, Array], tuple[float, float]]:
    """The factors, and the squares of what was dropped and of the whole."""
    q_b, r_b = np.linalg.qr(b.astype(np.float64))
    q_a, r_a = np.linalg.qr(a.astype(np.float64).T)
    u, s, vt = np.linalg.svd(r_b @ r_a.T, full_matrices=False)
    root = np.sqrt(s[:rank])
    kept_a = np.zeros((rank, a.shape[1]), np.float32)
    kept_b = np.zeros((b.shape[0], rank), np.float32)
    kept_a[: len(root)] = root[:, None] * (vt[:rank] @ q_a.T)
    kept_b[:, : len(root)] = (q_b @ u[:, :rank]) * root
    return (kept_a, kept_b), (float((s[rank:] ** 2).sum()), float((s**2).sum()))


def _judged(before: int, rank: int, squares: Mapping[str, tuple[float, float]]) -> RankReduction:
    errors = {module: float(np.sqrt(lost / whole)) if whole else 0.0 for module, (lost, whole) in squares.items()}
    worst = max(errors, key=lambda module: errors[module])
    lost, whole = (sum(square[index] for square in squares.values()) for index in (0, 1))
    return RankReduction(before, rank, float(np.sqrt(lost / whole)) if whole else 0.0, errors[worst], worst)
