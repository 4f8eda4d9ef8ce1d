"""Where a LoRA acts: the size of its change of every weight, by block and by target."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from .lora import Lora
from .lowrank import product_norm


@dataclass(frozen=True)
class NormTable:
    """The Frobenius norm of ``B @ A`` of every module."""

    blocks: tuple[str, ...]
    """Such as ``layers.7``: sorted by component, then by number."""
    targets: tuple[str, ...]
    """Such as ``attention.to_q``."""
    norms: NDArray[np.float64]
    """``[targets, blocks]``; NaN where a block has no such target."""


def norm_table(lora: Lora, norms: Mapping[str, float] | None = None) -> NormTable:
    """Sort the norms of a LoRA's modules, called ``<component>.<index>.<target>``, into a table.

    Args:
        lora: modules with factors.
        norms: of modules without.
    """
    sizes = {module: product_norm(b, a) for module, (a, b) in lora.factors.items()} | dict(norms or {})
    places = {module: split_module(module) for module in sizes}
    blocks = sorted(
        {block for block, _ in places.values()}, key=lambda block: (block.rpartition(".")[0], block_number(block))
    )
    targets = list(dict.fromkeys(target for _, target in places.values()))
    table = np.full((len(targets), len(blocks)), np.nan)
    for module, (block, target) in places.items():
        table[targets.index(target), blocks.index(block)] = sizes[module]
    return NormTable(tuple(blocks), tuple(targets), table)


def split_module(module: str) -> tuple[str, str]:
    """``layers.7.attention.to_q`` is ``("layers.7", "attention.to_q")``: the block ends with the first number."""
    parts = module.split(".")
    index = next((i for i, part in enumerate(parts) if part.isdecimal()), 0)
    return ".".join(parts[: index + 1]), ".".join(parts[index + 1 :])


def components(blocks: Sequence[str]) -> Iterator[tuple[str, int, int]]:
    """``(name, first column, last column)`` of each run of blocks of one component."""
    names = [block.rpartition(".")[0] for block in blocks]
    for name in dict.fromkeys(names):
        columns = [index for index, other in enumerate(names) if other == name]
        yield name, columns[0], columns[-1]


def block_number(block: str) -> int:
    """``7`` of ``layers.7``; -1 where there is none."""
    last = block.rpartition(".")[2]
    return int(last) if last.isdecimal() else -1
