"""How much adapters of other kinds change, to be drawn: LoHa, LoKr and OFT.

- LoHa (Hyeon-Woo et al., 2022): the change is ``(w1_a @ w1_b) * (w2_a @ w2_b)``, elementwise. That is one product of
  factors again, whose rows are all products of a row of the one and a row of the other (Khatri and Rao, 1968).
- LoKr (Yeh et al., 2024): ``kron(w1, w2)``, each whole or a product. Its norm is the product of their norms.
- OFT (Qiu et al., 2023): the weight is turned, ``R @ W``; block by block ``R = (I + Q) (I - Q)^-1`` with a skew ``Q``.
  The change depends on the weight, so what is drawn is the norm of ``R - I``.

Scales are as ComfyUI's loader takes them. A DoRA's factors are drawn without its magnitudes.
"""

from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np

from ..engines.base import Array
from .errors import LoraNotASum, LoraUnreadable
from .keys import ParsedKeys, Parts
from .lora import Lora
from .reading import LoraFile, parsed_file, read_factors
from .values import FLOATS, tensor_values

DRAWN = frozenset({"DoRA", "LoHa", "LoKr", "OFT"})
Values = Mapping[str, Array]
"""``part -> values`` of one module, in float32."""


def read_changes(path: Path) -> LoraFile:
    """A LoRA of any kind in :data:`DRAWN`, as factors where there are such, else as norms.

    Raises:
        LoraUnreadable: not a LoRA file, or tensors that do not belong together.
        LoraNotASum: it is of a kind that is not drawn, or of several.
    """
    tensors, metadata, parsed = parsed_file(path)
    if not parsed.variants & (DRAWN - {"DoRA"}):
        return read_factors(path, allow=frozenset({"DoRA"}))
    if len(parsed.variants) > 1 or not parsed.variants <= DRAWN:
        raise LoraNotASum(path, sorted(parsed.variants))
    if odd := sorted({tensors[name].dtype for name in _names(parsed)} - FLOATS.keys()):
        raise LoraUnreadable(path, f"its dtype is {odd[0]}, not one of {', '.join(FLOATS)}")
    data = path.read_bytes()
    kind = next(iter(parsed.variants))
    factors: dict[str, tuple[Array, Array]] = {}
    norms: dict[str, float] = {}
    for module, parts in parsed.modules.items():
        values = {part: tensor_values(data, tensors[name]) for part, name in _parts(parts).items()}
        try:
            if kind == "LoHa":
                factors[module] = hadamard_factors(values)
            else:
                norms[module] = NORMS[kind](values)
        except (KeyError, ValueError, np.linalg.LinAlgError) as error:
            raise LoraUnreadable(path, f"the tensors of {module} make no {kind}: {error}") from error
    lora = Lora(factors, dict(metadata))
    return LoraFile(path, lora, "fp32", parsed.key_format, parsed.text_modules, (kind,), norms)


def hadamard_factors(values: Values) -> tuple[Array, Array]:
    """``(A [r1 * r2, in], B [out, r1 * r2])`` of a LoHa, its scale on A."""
    a1, b1, a2, b2 = (values[f"hada_{name}"] for name in ("w1_b", "w1_a", "w2_b", "w2_a"))
    if "hada_t1" in values or any(factor.ndim != 2 for factor in (a1, b1, a2, b2)):
        raise ValueError("convolutions are not drawn")
    a = (a1[:, None, :] * a2[None, :, :]).reshape(-1, a1.shape[1])
    b = (b1[:, :, None] * b2[:, None, :]).reshape(len(b1), -1)
    return np.float32(_scale(values, len(a1))) * a, b


def kronecker_norm(values: Values) -> float:
    """The Frobenius norm of a LoKr's change."""
    rank = None
    norms = []
    for name in ("lokr_w1", "lokr_w2"):
        if name in values:
            whole = values[name]
        else:
            rank = len(values[f"{name}_b"])
            whole = values[f"{name}_a"] @ values[f"{name}_b"]
        norms.append(float(np.linalg.norm(whole)))
    if "lokr_t2" in values:
        raise ValueError("convolutions are not drawn")
    return abs(_scale(values, rank) if rank else 1.0) * norms[0] * norms[1]


def rotation_norm(values: Values) -> float:
    """The Frobenius norm of ``R - I`` over all blocks of an OFT, of kohya's form or PEFT's."""
    found = next(values[name] for name in ("oft_blocks", "oft_R", "oft_r", "oft_diag") if name in values)
    skew = found.astype(np.float64)
    if skew.ndim == 2:  # PEFT keeps what is above the diagonal
        side = (1 + round((1 + 8 * skew.shape[1]) ** 0.5)) // 2
        rows, columns = np.triu_indices(side, 1)
        whole = np.zeros((len(skew), side, side))
        whole[:, rows, columns] = skew
        skew = whole - whole.transpose(0, 2, 1)
    else:
        skew = skew - skew.transpose(0, 2, 1)
        limit = float(values["alpha"].reshape(-1)[0]) if "alpha" in values else 0.0
        size = float(np.linalg.norm(skew))
        skew = skew * (limit / size) if 0 < limit < size else skew
    eye = np.eye(skew.shape[1])
    return float(
        np.linalg.norm(np.linalg.solve((eye - skew).transpose(0, 2, 1), (eye + skew).transpose(0, 2, 1)) - eye)
    )


NORMS: Mapping[str, Callable[[Values], float]] = {"LoKr": kronecker_norm, "OFT": rotation_norm}


def _scale(values: Values, rank: int) -> float:
    return float(values["alpha"].reshape(-1)[0]) / rank if "alpha" in values else 1.0


def _parts(parts: Parts) -> dict[str, str]:
    return parts.others | ({"alpha": parts.alpha} if parts.alpha else {})


def _names(parsed: ParsedKeys) -> list[str]:
    return [name for parts in parsed.modules.values() for name in _parts(parts).values()]
