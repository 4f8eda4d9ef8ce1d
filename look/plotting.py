"""Pictures of LoRAs: where they act, and how alike they are."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib import colormaps
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from numpy.typing import NDArray

from ..lora.lora import Lora
from ..lora.lorafiles import require_one_model
from ..lora.lowrank import cosine, product_norm
from ..lora.reading import LoraFile
from ..machine.outputs import DRAWING, DRAWN_BY, output_path, require_output
from ..machine.wording import printable

TITLE_LETTERS = 32
"""Longer file names are cut in the middle."""


@dataclass(frozen=True)
class NormTable:
    """The Frobenius norm of ``B @ A`` of every module."""

    blocks: tuple[str, ...]
    """Such as ``layers.7``: sorted by component, then by number."""
    targets: tuple[str, ...]
    """Such as ``attention.to_q``."""
    norms: NDArray[np.float64]
    """``[targets, blocks]``; NaN where a block has no such target."""


def norm_table(lora: Lora) -> NormTable:
    """Sort the norms of a LoRA's modules, called ``<component>.<index>.<target>``, into a table."""
    places = {module: split_module(module) for module in lora.factors}
    blocks = sorted(
        {block for block, _ in places.values()}, key=lambda block: (block.rpartition(".")[0], _index(block))
    )
    targets = list(dict.fromkeys(target for _, target in places.values()))
    norms = np.full((len(targets), len(blocks)), np.nan)
    for module, (block, target) in places.items():
        a, b = lora.factors[module]
        norms[targets.index(target), blocks.index(block)] = product_norm(b, a)
    return NormTable(tuple(blocks), tuple(targets), norms)


def split_module(module: str) -> tuple[str, str]:
    """``layers.7.attention.to_q`` is ``("layers.7", "attention.to_q")``: the block ends with the first number."""
    parts = module.split(".")
    index = next((i for i, part in enumerate(parts) if part.isdecimal()), 0)
    return ".".join(parts[: index + 1]), ".".join(parts[index + 1 :])


def similarities(loras: Sequence[Lora]) -> NDArray[np.float64]:
    """``[loras, loras]``: the cosine between the changes that two LoRAs make to all weights together."""
    return np.array([[cosine(first, second) for second in loras] for first in loras])


def plot_loras(files: Sequence[LoraFile], output: Path) -> None:
    """Draw the norms of each LoRA, on one colour scale, and below them how alike the LoRAs are.

    Raises:
        LorasForOthers, LorasDiffer: they are not for the same diffusion model.
        OutputMisnamed, OutputTaken, OutputUnwritable, DiskFull: nothing is left half written.
    """
    require_output(output, DRAWING, inputs=[file.path for file in files])
    for other in files[1:]:
        require_one_model(files[0], other)
    tables = [norm_table(file.lora) for file in files]
    heights = [0.3 * len(table.targets) + 1.4 for table in tables]
    if len(files) > 1:
        heights.append(0.5 * len(files) + 2.0)
    figure = Figure(figsize=(max(8.0, 0.26 * len(tables[0].blocks) + 3.5), sum(heights)), layout="constrained")
    FigureCanvasAgg(figure)  # draws into memory: no window system is asked for
    axes = np.atleast_1d(figure.subplots(len(heights), 1, height_ratios=heights))
    highest = max(float(np.nanmax(table.norms)) for table in tables) or 1.0
    for axis, file, table in zip(axes, files, tables, strict=False):
        image = _heat_map(axis, table, highest)
        without = f", {' and '.join(file.kinds)} without its magnitudes" if file.kinds else ""
        axis.set_title(f"{shortened(file.path.stem)} (rank {file.lora.rank}{without})", loc="left")
        figure.colorbar(image, ax=axis, label="norm of B @ A", pad=0.01)
    if len(files) > 1:
        _similarity_map(axes[-1], similarities([file.lora for file in files]), names_of(files))
    form = output.suffix[1:].lower()
    with output_path(output, DRAWING) as temporary:
        mark = {"Software" if form == "png" else "Creator": DRAWN_BY}
        figure.savefig(temporary, dpi=130, format=form, metadata=mark)


def names_of(files: Sequence[LoraFile]) -> list[str]:
    """File names as labels; those that repeat get the folder before them."""
    stems = [file.path.stem for file in files]
    return [
        shortened(stem if stems.count(stem) == 1 else f"{file.path.absolute().parent.name}/{stem}")
        for stem, file in zip(stems, files, strict=True)
    ]


def shortened(name: str) -> str:
    """A name of at most :data:`TITLE_LETTERS` letters, and nothing that the drawing would take for a formula."""
    half = TITLE_LETTERS // 2 - 2
    name = printable(name)
    name = name if len(name) <= TITLE_LETTERS else f"{name[:half]}...{name[-half:]}"
    return name.replace("$", r"\$")


def components(blocks: Sequence[str]) -> Iterator[tuple[str, int, int]]:
    """``(name, first column, last column)`` of each run of blocks of one component."""
    names = [block.rpartition(".")[0] for block in blocks]
    for name in dict.fromkeys(names):
        columns = [index for index, other in enumerate(names) if other == name]
        yield name, columns[0], columns[-1]


def _heat_map(axis: Any, table: NormTable, highest: float) -> Any:
    palette = colormaps["viridis"].with_extremes(bad="0.85")
    image = axis.imshow(np.ma.masked_invalid(table.norms), cmap=palette, vmin=0, vmax=highest, aspect="auto")
    axis.set_yticks(range(len(table.targets)), table.targets)
    axis.set_xticks(range(len(table.blocks)), [str(max(_index(block), 0)) for block in table.blocks], fontsize=7)
    axis.tick_params(length=0)
    for name, first, last in components(table.blocks):
        centre = ((first + last + 1) / 2 / len(table.blocks), 0)
        axis.annotate(name, centre, (0, -16), "axes fraction", "offset points", ha="center", va="top", fontsize=8)
        if first:
            axis.axvline(first - 0.5, color="white", linewidth=2)
    return image


def _similarity_map(axis: Any, values: NDArray[np.float64], names: Sequence[str]) -> None:
    image = axis.imshow(values, cmap="RdBu_r", vmin=-1, vmax=1)
    axis.set_title("cosine similarity of B @ A", loc="left")
    axis.set_xticks(range(len(names)), [str(number) for number in range(1, len(names) + 1)])
    axis.set_yticks(range(len(names)), [f"{name}  {number}" for number, name in enumerate(names, 1)])
    axis.tick_params(length=0)
    for (row, column), value in np.ndenumerate(values):
        colour = "white" if abs(value) > 0.6 else "black"
        axis.text(column, row, f"{value:.2f}", ha="center", va="center", color=colour, fontsize=8)
    axis.figure.colorbar(image, ax=axis, label="cosine", pad=0.01)


def _index(block: str) -> int:
    last = block.rpartition(".")[2]
    return int(last) if last.isdecimal() else -1
