"""Pictures: any file, PIL image or array becomes an upright image of mode ``RGB``.

What the reference leaves undefined is decided here:

* EXIF orientation is applied, and then dropped with all other metadata.
* Transparency, in any of its forms, is composited on white.
* 16-bit greys (modes ``I;16`` and ``I``) become 8-bit ones by value / 257, rounded. Pillow itself reduces 16-bit
  colour files, by keeping the high byte. An ``I`` image is always taken as 16-bit; values outside are an error.
* Float images (mode ``F``) are an error, as their range is a guess; float arrays must be in [0, 1].
* Animations and multi-page files give their first frame.
* ICC profiles are ignored, as in the reference.

Only the formats in :data:`FORMATS` are read. Pillow's others run outside programs (EPS) or are no pictures.
"""

import os
import struct
import threading
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any, TypeAlias

import numpy as np
from numpy.typing import NDArray
from PIL import ExifTags, Image, ImageFile

from ...machine.wording import format_path
from .errors import ImageAbsurd, ImageError, ImageUnreadable

ImageSource: TypeAlias = str | os.PathLike[str] | Image.Image | NDArray[Any]

FORMATS = ("JPEG", "PNG", "WEBP", "AVIF", "GIF", "BMP", "TIFF", "JPEG2000", "PPM", "QOI")
"""Pillow's names of the file formats that are read."""

MIN_SIDE = 16
"""One patch of the encoders: anything smaller is an icon, blown up 64 times."""
MAX_PIXELS = 178_000_000
"""Just under the size that Pillow itself refuses; takes about 1.5 GB to decode."""
MAX_ASPECT = 20
"""Longer side over shorter: beyond it the centre square shows under 5 % of the picture, and the resize that makes the
shorter side 1024 would need memory in proportion."""

_FLOAT_SLACK = 1e-6
"""How far outside [0, 1] a float array may stray by rounding."""

_DAMAGE = (
    OSError,
    SyntaxError,
    ValueError,
    RuntimeError,
    struct.error,
    Image.DecompressionBombError,
)
"""What Pillow's readers raise on a file that is absent, damaged or no picture."""

_TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
"""What makes a picture upright, by its EXIF orientation; 1 is upright already."""

_PILLOW_LOCK = threading.Lock()
"""Held while Pillow's and Python's process-wide switches are changed."""


def load_image(source: ImageSource) -> Image.Image:
    """Reads a picture.

    Args:
        source: a file's path; a PIL image (of an animation, its current frame); or an array of shape HxW, HxWx3 or
            HxWx4, uint8 or float in [0, 1].

    Returns:
        A new upright image of mode ``RGB``, 8 bits a channel, without metadata. The module says how other modes get
        there.

    Raises:
        ImageUnreadable: the file is absent, truncated, a directory or no picture, or the pixels have no agreed meaning.
        ImageAbsurd: the shorter side is under 16 pixels, the longer one is over 20 times the shorter, or there are over
            178 million pixels. Files are judged by their header, before anything is decoded.
    """
    if isinstance(source, np.ndarray):
        return _from_array(source, "the given array")
    if isinstance(source, Image.Image):
        with _pillow_errors("the given PIL image"):
            return _to_rgb(source, "the given PIL image")
    path = Path(source)
    name = format_path(path)
    with _pillow_errors(name), path.open("rb") as file:
        return _to_rgb(_open_lazily(file, name), name)


@contextmanager
def _pillow_errors(name: str) -> Iterator[None]:
    """Turns Pillow's many exceptions into one, and keeps its warnings and its leniency with broken files out."""
    with _PILLOW_LOCK, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        lenient = ImageFile.LOAD_TRUNCATED_IMAGES
        ImageFile.LOAD_TRUNCATED_IMAGES = False
        try:
            yield
        except ImageError:
            raise
        except _DAMAGE as error:
            raise ImageUnreadable(name, _reason(error)) from error
        finally:
            ImageFile.LOAD_TRUNCATED_IMAGES = lenient


def _reason(error: Exception) -> str:
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    return str(error) or type(error).__name__


def _open_lazily(file: IO[bytes], name: str) -> Image.Image:
    """The image of an open file, its header read and nothing decoded.

    ``Image.open`` would do, but for a huge picture it raises without telling the size.
    """
    Image.init()
    prefix = file.read(16)
    for kind in FORMATS:
        factory, accept = Image.OPEN[kind]
        if accept is None or accept(prefix) is True:
            file.seek(0)
            return factory(file, "")
    raise ImageUnreadable(name, "it is in no known picture format" if prefix else "it is empty")


def _check_size(name: str, width: int, height: int) -> None:
    short, long = sorted((width, height))
    if short < MIN_SIDE:
        raise ImageAbsurd(name, width, height, f"the shorter side needs at least {MIN_SIDE}")
    if width * height > MAX_PIXELS:
        raise ImageAbsurd(name, width, height, f"at most {MAX_PIXELS // 10**6} million are read")
    if long > MAX_ASPECT * short:
        raise ImageAbsurd(name, width, height, f"the longer side can be at most {MAX_ASPECT} times the shorter")


def _to_rgb(image: Image.Image, name: str) -> Image.Image:
    _check_size(name, *image.size)
    image.load()
    upright = _upright(image)
    if upright.mode == "F":
        raise ImageUnreadable(name, "the range of its float pixels is unknown; an array in [0, 1] is read")
    if upright.mode == "I" or upright.mode.startswith("I;16"):
        rgb = _from_16_bit(upright, name)
    elif upright.has_transparency_data:
        rgb = _on_white(upright)
    else:
        rgb = upright if upright.mode == "RGB" else upright.convert("RGB")
    rgb.info.clear()
    return rgb


def _upright(image: Image.Image) -> Image.Image:
    """A copy, turned as its EXIF orientation says; as it is where the EXIF block is damaged.

    ``ImageOps.exif_transpose`` would also rewrite the EXIF block, and stumbles over what cameras put there.
    """
    try:
        orientation = image.getexif().get(ExifTags.Base.Orientation)
    except _DAMAGE:
        orientation = None
    if orientation in _TURNS:
        return image.transpose(_TURNS[orientation])
    return image.copy()


def _on_white(image: Image.Image) -> Image.Image:
    key = image.info.get("transparency")
    if image.mode == "RGB" and isinstance(key, tuple) and max(key) > 0xFF:
        # A 16-bit file: Pillow kept the high bytes of the pixels, but both bytes of the transparent colour.
        image.info["transparency"] = tuple(value >> 8 for value in key)
    rgba = image.convert("LA").convert("RGBA") if image.mode == "La" else image.convert("RGBA")
    return Image.alpha_composite(Image.new("RGBA", image.size, "white"), rgba).convert("RGB")


def _from_16_bit(image: Image.Image, name: str) -> Image.Image:
    values = np.asarray(image)
    low, high = int(values.min()), int(values.max())
    if low < 0 or high > 0xFFFF:
        raise ImageUnreadable(name, f"its integer pixels reach from {low} to {high}, outside 16 bits")
    grey = (values.astype(np.uint32) + 128) // 257
    if "transparency" in image.info:
        grey[values == image.info["transparency"]] = 255
    return Image.fromarray(grey.astype(np.uint8)).convert("RGB")


def _from_array(array: NDArray[Any], name: str) -> Image.Image:
    if array.ndim not in (2, 3) or (array.ndim == 3 and array.shape[2] not in (3, 4)):
        raise ImageUnreadable(name, f"its shape is {array.shape}, not HxW, HxWx3 or HxWx4")
    _check_size(name, array.shape[1], array.shape[0])
    return _to_rgb(Image.fromarray(_to_8_bit(array, name)), name)


def _to_8_bit(array: NDArray[Any], name: str) -> NDArray[np.uint8]:
    if array.dtype == np.uint8:
        return array
    if not np.issubdtype(array.dtype, np.floating):
        raise ImageUnreadable(name, f"its dtype is {array.dtype}, neither uint8 nor float")
    low, high = float(array.min()), float(array.max())
    if not (low >= -_FLOAT_SLACK and high <= 1 + _FLOAT_SLACK):
        raise ImageUnreadable(name, f"its float values reach from {low:g} to {high:g}, outside [0, 1]")
    eight_bit: NDArray[np.uint8] = np.rint(array.astype(np.float32) * 255).astype(np.uint8)
    return eight_bit
