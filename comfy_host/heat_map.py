"""The picture on Save's node: how much a LoRA changes each weight, block by block, as ``i2l plot`` shows it.

matplotlib would be one more thing to install into ComfyUI's Python; rectangles and text need Pillow alone.
"""

from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

from ..lora.norms import NormTable, block_number, components

VIRIDIS = ((68, 1, 84), (59, 82, 139), (33, 145, 140), (94, 201, 98), (253, 231, 37))
"""Five colours of matplotlib's palette of this name, evenly apart; between them lines."""
BLANK, INK, PAPER = (217, 217, 217), (40, 40, 40), (255, 255, 255)
CELL_WIDTH, CELL_HEIGHT = 18, 28
LEFT, TOP, BOTTOM, RIGHT = 150, 46, 48, 96
COLUMNS_WIDTH = 270
"""At least, so that the title has room above few blocks."""
LETTERS = 15
"""Height of the text in pixels."""


def heat_map(table: NormTable, title: str) -> Image.Image:
    """The norms as rectangles: a column for each block, a row for each target, dark for 0."""
    rows, columns = table.norms.shape
    cell = cell_width(columns)
    width, height = LEFT + columns * cell + RIGHT, TOP + rows * CELL_HEIGHT + BOTTOM
    image = Image.new("RGB", (width, height), PAPER)
    draw, font = ImageDraw.Draw(image), ImageFont.load_default(LETTERS)
    highest = float(np.nanmax(table.norms)) or 1.0
    draw.text((8, 8), title, INK, font)
    draw.text((8, 27), "norm of B @ A of each weight: how much the LoRA changes it", INK, ImageFont.load_default(12))
    for row, target in enumerate(table.targets):
        y = TOP + row * CELL_HEIGHT
        draw.text((LEFT - 8, y + CELL_HEIGHT // 2), target, INK, font, anchor="rm")
        for column in range(columns):
            x = LEFT + column * cell
            draw.rectangle((x, y, x + cell - 2, y + CELL_HEIGHT - 2), colour(table.norms[row, column] / highest))
    _axis(draw, table, cell, TOP + rows * CELL_HEIGHT)
    _scale(draw, LEFT + columns * cell + 16, rows * CELL_HEIGHT, highest)
    return image


def cell_width(columns: int) -> int:
    """Pixels of a column."""
    return max(CELL_WIDTH, COLUMNS_WIDTH // columns)


def colour(share: float) -> tuple[int, int, int]:
    """The palette's colour of a share from 0 to 1; grey for NaN, where a block has no such weight."""
    if np.isnan(share):
        return BLANK
    place = min(max(share, 0.0), 1.0) * (len(VIRIDIS) - 1)
    low = min(int(place), len(VIRIDIS) - 2)
    palette: NDArray[np.float64] = np.array(VIRIDIS, np.float64)
    red, green, blue = np.rint(palette[low] + (palette[low + 1] - palette[low]) * (place - low)).astype(int).tolist()
    return red, green, blue


def _axis(draw: Any, table: NormTable, cell: int, y: int) -> None:
    """Every fifth block's number, and below it the component's name."""
    small = ImageFont.load_default(11)
    for column, block in enumerate(table.blocks):
        number = max(block_number(block), 0)
        if number % 5 == 0:
            draw.text((LEFT + (column + 0.5) * cell, y + 2), str(number), INK, small, anchor="ma")
    for level, (name, first, last) in enumerate(components(table.blocks)):
        start, end = LEFT + first * cell, LEFT + (last + 1) * cell - 2
        draw.line((start, y + 16, end, y + 16), INK, 2)
        # names of short components would overlap side by side
        draw.text(((start + end) / 2, y + 19 + 13 * (level % 2)), name, INK, small, anchor="ma")


def _scale(draw: Any, x: int, height: int, highest: float) -> None:
    """The colours from 0 to the highest norm."""
    for step in range(height):
        draw.line((x, TOP + step, x + 14, TOP + step), colour(1 - step / max(height - 1, 1)))
    for share in (0.0, 0.5, 1.0):
        y = TOP + (1 - share) * height
        draw.text((x + 20, y), f"{share * highest:.3g}", INK, ImageFont.load_default(12), anchor="lm")
