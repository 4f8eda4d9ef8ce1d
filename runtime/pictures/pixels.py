"""Pixels: a picture becomes the input tensors of the two encoders.

The hard thing here is that the two encoders see two different resizes of the same picture. Both start from one
1024 x 1024 square (:func:`square_image`). SigLIP2's processor shrinks the square's 8-bit values and gets 8-bit values
again, so its pixels are multiples of 1/255. DINOv3's processor divides by 255 first and shrinks in float, so its
pixels lie between those steps. Swapping the two moves values by up to half an 8-bit step: too little to see, too little
to fail, and a LoRA that is not the reference's. PIL does both: an ``RGB`` image resizes in 8 bits, an ``F`` image in
float. PIL's bilinear filter widens when it shrinks (it is antialiased); most other "bilinear" resizes do not.
"""

import hashlib
import struct

import numpy as np
from numpy.typing import NDArray
from PIL import Image

_SQUARE = 1024
HASHED_ROWS = 256
_IMAGENET_MEAN = np.array([0.485, 0.456, 0.406], np.float32)
_IMAGENET_STD = np.array([0.229, 0.224, 0.225], np.float32)


def square_image(image: Image.Image) -> Image.Image:
    """The centre square of a picture, resized to 1024 x 1024: what both encoders look at.

    Args:
        image: mode ``RGB``.

    Returns:
        A 1024 x 1024 image of mode ``RGB``. One that was that already comes back unchanged, so a caller may square once
        and hand the result to both pixel functions.

    Raises:
        ValueError: the mode is not ``RGB``.
    """
    _require_rgb(image)
    width, height = image.size
    scale = max(_SQUARE / width, _SQUARE / height)
    resized = image.resize((round(width * scale), round(height * scale)), Image.Resampling.BILINEAR)
    left = round((resized.width - _SQUARE) / 2.0)
    top = round((resized.height - _SQUARE) / 2.0)
    return resized.crop((left, top, left + _SQUARE, top + _SQUARE))


def pixels_siglip2(image: Image.Image, size: int) -> NDArray[np.float32]:
    """SigLIP2's input: the square, resized on 8-bit values, then scaled to [-1, 1].

    Args:
        image: mode ``RGB``, any size.
        size: pixels on a side of the encoder's input.

    Returns:
        float32 array [3, size, size], C-contiguous.

    Raises:
        ValueError: the mode is not ``RGB``.
    """
    resized = square_image(image).resize((size, size), Image.Resampling.BILINEAR)
    values = np.asarray(resized, np.float32).transpose(2, 0, 1) / np.float32(255)
    return np.ascontiguousarray((values - np.float32(0.5)) / np.float32(0.5))


def pixels_dinov3(image: Image.Image, size: int) -> NDArray[np.float32]:
    """DINOv3's input: the square, divided by 255, then resized in float, then ImageNet mean and deviation.

    Args:
        image: mode ``RGB``, any size.
        size: pixels on a side of the encoder's input.

    Returns:
        float32 array [3, size, size], C-contiguous.

    Raises:
        ValueError: the mode is not ``RGB``.
    """
    square = np.asarray(square_image(image), np.float32) / np.float32(255)
    channels = (Image.fromarray(np.ascontiguousarray(square[..., channel])) for channel in range(3))
    resized = np.stack([np.asarray(c.resize((size, size), Image.Resampling.BILINEAR), np.float32) for c in channels])
    return (resized - _IMAGENET_MEAN[:, None, None]) / _IMAGENET_STD[:, None, None]


def content_sha256(image: Image.Image) -> str:
    """Identifies a picture by what it shows, not by where it lies: for metadata, where a path would leak.

    Args:
        image: mode ``RGB``, as :func:`load_image` returns it.

    Returns:
        64 hexadecimal digits: SHA-256 of the width and the height as little-endian uint32, then of the RGB bytes row by
        row. The same file may hash otherwise where Pillow carries another JPEG decoder.

    Raises:
        ValueError: the mode is not ``RGB``.
    """
    _require_rgb(image)
    digest = hashlib.sha256(struct.pack("<II", *image.size))
    for top in range(0, image.height, HASHED_ROWS):  # a copy of all bytes would add the picture's size again
        digest.update(image.crop((0, top, image.width, min(top + HASHED_ROWS, image.height))).tobytes())
    return digest.hexdigest()


def _require_rgb(image: Image.Image) -> None:
    if image.mode != "RGB":
        raise ValueError(f"the image's mode is {image.mode}, not RGB: get it from load_image")
