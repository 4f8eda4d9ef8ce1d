"""Pictures of LoRAs: where they act, and how alike they are."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib import colormaps
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from numpy.typing import NDArray
from PIL import Image, ImageOps

from ..lora.lora import Lora
from ..lora.lorafiles import require_one_model
from ..lora.lowrank import cosine
from ..lora.norms import NormTable, block_number, components, norm_table
from ..lora.reading import LoraFile
from ..machine.outputs import DRAWING, DRAWN_BY, output_path, require_output
from ..machine.wording import printable

TITLE_LETTERS = 32
"""Longer file names are cut in the middle."""
MEANING = (
    "Where a LoRA acts: Frobenius norm of B @ A at strength 1, which is added to the weight of a target (rows) in a "
    "block (columns).\nNot divided by the weight's own norm, which is not in the file. Grey: no such target."
)
MANY = 4
"""From so many LoRAs on the maps are drawn low, so that they can be seen together."""
ROW_INCHES, ROW_INCHES_OF_MANY = 0.3, 0.16
NARROWEST = 0.02
"""Of the scale of similarities: less is noise."""
THUMBNAIL = 256


def similarities(loras: Sequence[Lora]) -> NDArray[np.float64]:
    """``[loras, loras]``: the cosine between the changes that two LoRAs make to all weights together.

    NaN where one of them has no factors.
    """
    return np.array([[_likeness(first, second) for second in loras] for first in loras])


def _likeness(first: Lora, second: Lora) -> float:
    return cosine(first, second) if first.factors and second.factors else np.nan


def plot_loras(
    files: Sequence[LoraFile], output: Path, pictures: Mapping[Path, Sequence[Image.Image]] | None = None
) -> None:
    """Draw the norms of each LoRA, on one colour scale, and below them how alike the LoRAs are.

    Args:
        files: for one diffusion model.
        output: its suffix says the format.
        pictures: ``LoRA -> what it was made from``, drawn beside it; None draws no column for them.

    Raises:
        LorasForOthers, LorasDiffer: they are not for the same diffusion model.
        OutputMisnamed, OutputTaken, OutputUnwritable, DiskFull: nothing is left half written.
    """
    require_output(output, DRAWING, inputs=[file.path for file in files])
    for other in files[1:]:
        require_one_model(files[0], other)
    tables = [norm_table(file.lora, file.norms) for file in files]
    row = ROW_INCHES if len(files) < MANY else ROW_INCHES_OF_MANY
    heights = [row * len(table.targets) + 0.6 for table in tables]
    heights[-1] += 0.5  # names of the components
    if several := len(files) > 1:
        heights.append(0.4 * len(files) + 1.2)
    width = max(8.0, 0.26 * len(tables[0].blocks) + 4)
    figure = Figure(figsize=(width, sum(heights) + 0.6), layout="constrained")
    FigureCanvasAgg(figure)  # draws into memory: no window system is asked for
    widths = [1] if pictures is None else [1, 4]
    axes = figure.subplots(len(heights), len(widths), squeeze=False, height_ratios=heights, width_ratios=widths)
    scales = {
        kind: scale_of([t for f, t in zip(files, tables, strict=True) if measure(f) == kind])
        for kind in map(measure, files)
    }
    for number, (axis, file, table) in enumerate(zip(axes[:, -1], files, tables, strict=False)):
        _heat_map(axis, table, scales[measure(file)], last=number == len(files) - 1)
        axis.set_title(f"{shortened(file.path.stem)} ({description(file)})", loc="left", fontsize=10)
    for axis in axes[:, 0] if pictures is not None else ():
        axis.axis("off")
    for axis, file in zip(axes[:, 0], files, strict=False):
        if pictures is not None:
            _show(axis, pictures.get(file.path, ()))
    for kind in scales:  # one scale of colours for each thing that is measured
        own = [axis for axis, file in zip(axes[:, -1], files, strict=False) if measure(file) == kind]
        figure.colorbar(own[0].images[0], ax=own, label=kind, pad=0.01, aspect=30 * len(own))
    figure.suptitle(MEANING, fontsize=9, x=0.01, ha="left")
    if several:
        _similarity_map(axes[-1, -1], similarities([file.lora for file in files]), names_of(files))
    form = output.suffix[1:].lower()
    with output_path(output, DRAWING) as temporary:
        mark = {"Software" if form == "png" else "Creator": DRAWN_BY}
        figure.savefig(temporary, dpi=130, format=form, metadata=mark)


def scale_of(tables: Sequence[NormTable]) -> tuple[float, float]:
    """``(lowest, highest)`` norm of all of them."""
    norms = np.concatenate([table.norms.ravel() for table in tables])
    return float(np.nanmin(norms)), float(np.nanmax(norms))


def measure(file: LoraFile) -> str:
    """What is drawn of a file."""
    return {"OFT": "norm of R - I", "LoKr": "norm of the change"}.get("".join(file.kinds), "norm of B @ A")


def description(file: LoraFile) -> str:
    """What a file is, for its title."""
    if file.kinds == ("DoRA",):
        return f"rank {file.lora.rank}, DoRA without its magnitudes"
    return " and ".join(file.kinds) or f"rank {file.lora.rank}"


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


def similarity_scale(values: NDArray[np.float64]) -> tuple[float, float]:
    """``(lowest, highest)`` colour: what differs between LoRAs, at least 0.02 wide; each with itself is left out."""
    others = values[~np.eye(len(values), dtype=bool)]
    if np.isnan(others).all():
        return -1.0, 1.0
    lowest, highest = float(np.nanmin(others)), float(np.nanmax(others))
    return (lowest, highest) if highest - lowest >= NARROWEST else (highest - NARROWEST, highest)


def _heat_map(axis: Any, table: NormTable, scale: tuple[float, float], *, last: bool) -> Any:
    palette = colormaps["viridis"].with_extremes(bad="0.85")
    image = axis.imshow(np.ma.masked_invalid(table.norms), cmap=palette, vmin=scale[0], vmax=scale[1], aspect="auto")
    axis.set_yticks(range(len(table.targets)), table.targets, fontsize=7)
    labels = [str(max(block_number(block), 0)) for block in table.blocks] if last else []
    axis.set_xticks(range(len(labels)), labels, fontsize=7)
    axis.tick_params(length=0)
    for name, first, last_column in components(table.blocks):
        if last:
            centre = ((first + last_column + 1) / 2 / len(table.blocks), 0)
            axis.annotate(name, centre, (0, -16), "axes fraction", "offset points", ha="center", va="top", fontsize=8)
        if first:
            axis.axvline(first - 0.5, color="white", linewidth=2)
    return image


def _show(axis: Any, pictures: Sequence[Image.Image]) -> None:
    """A picture, or the first four side by side and below each other."""
    if not pictures:
        return
    columns = 1 if len(pictures) == 1 else 2
    sheet = Image.new("RGB", (columns * THUMBNAIL, -(-min(len(pictures), 4) // columns) * THUMBNAIL), "white")
    for index, picture in enumerate(pictures[:4]):
        sheet.paste(ImageOps.pad(picture, (THUMBNAIL, THUMBNAIL), color="white"),
                    (index % columns * THUMBNAIL, index // columns * THUMBNAIL))  # fmt: skip
    axis.imshow(np.asarray(sheet))
    axis.set_title(f"first 4 of {len(pictures)}" if len(pictures) > 4 else "", fontsize=8)


def _similarity_map(axis: Any, values: NDArray[np.float64], names: Sequence[str]) -> None:
    lowest, highest = similarity_scale(values)
    palette = colormaps["cividis"].with_extremes(bad="0.85")
    shown = np.ma.masked_array(values, np.eye(len(values), dtype=bool))
    image = axis.imshow(shown, cmap=palette, vmin=lowest, vmax=highest)
    title = "how alike: cosine between all changes\n(1 the same direction, 0 unrelated)"
    axis.set_title(title, loc="left", fontsize=10)
    axis.set_anchor("W")
    axis.set_xticks(range(len(names)), [str(number) for number in range(1, len(names) + 1)])
    axis.set_yticks(range(len(names)), [f"{name}  {number}" for number, name in enumerate(names, 1)])
    axis.tick_params(length=0)
    digits = 2 if highest - lowest > 0.1 else 4
    for (row, column), value in np.ndenumerate(values):
        dark = row != column and value < (lowest + highest) / 2
        text = "1" if row == column else f"{value:.{digits}f}"
        axis.text(column, row, text, ha="center", va="center", color="white" if dark else "black", fontsize=7)
    axis.figure.colorbar(image, ax=axis, label="cosine", pad=0.01)
