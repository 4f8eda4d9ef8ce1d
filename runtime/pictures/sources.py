"""What a caller gives as images: one or several, as squares and as the mark that names them in a LoRA's metadata."""

import os
from collections.abc import Iterable, Sequence

import numpy as np
from PIL import Image

from .errors import ImageError, ImagesUnusable, NoImages
from .images import ImageSource, load_image
from .pixels import content_sha256, square_image

ICC_KEY, IMAGES_KEY = "i2l.icc", "i2l.images"


def as_several(images: Sequence[ImageSource] | ImageSource) -> list[ImageSource]:
    """A single image is a list of one, as a text would otherwise be read letter by letter; an array may hold several.

    Raises:
        NoImages: nothing to read.
    """
    if isinstance(images, np.ndarray):
        several: list[ImageSource] = list(images) if images.ndim == 4 else [images]
    else:
        several = [images] if isinstance(images, str | os.PathLike | Image.Image) else list(images)
    if not several:
        raise NoImages
    return several


def load_squares(
    images: Sequence[ImageSource] | ImageSource, *, ignore_icc: bool = False
) -> tuple[list[Image.Image], list[str]]:
    """Every image's square and the hash of its whole content; one decoded picture is in memory at a time.

    Raises:
        NoImages, ImageError: nothing to read, or an image that cannot be used.
        ImagesUnusable: there are several of these; all are listed.
    """
    squares, hashes, errors = [], [], []
    several = as_several(images)
    for source in several:
        try:
            picture = load_image(source, ignore_icc=ignore_icc)
        except ImageError as error:
            errors.append(error)
            continue
        if not errors:
            squares.append(square_image(picture))
            hashes.append(content_sha256(picture))
    if len(errors) > 1:
        raise ImagesUnusable(errors, len(several))
    if errors:
        raise errors[0]
    return squares, hashes


def colours_mark(*, ignore_icc: bool) -> dict[str, str]:
    """The metadata entry that says what became of colour profiles."""
    return {ICC_KEY: "ignored" if ignore_icc else "converted to sRGB"}


def images_mark(hashes: Iterable[str]) -> dict[str, str]:
    """The metadata entry that names a LoRA's images by their content."""
    return {IMAGES_KEY: ",".join(hashes)}
