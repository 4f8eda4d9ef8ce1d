"""Pictures: any file, PIL image or array becomes an upright image of mode ``RGB``.

What the reference leaves undefined is decided here:

* EXIF orientation is applied, and then dropped with all other metadata.
* Transparency, in any of its forms, is composited on white.
* 16-bit greys (modes ``I;16`` and ``I``) become 8-bit ones by value / 257, rounded. Pillow itself reduces 16-bit
  colour files, by keeping the high byte. An ``I`` image is always taken as 16-bit; values outside are an error.
* Float images (mode ``F``) are an error, as their range is a guess; float arrays must be in [0, 1].
* Animations and multi-page files give their first frame.
* ICC profiles are converted to sRGB (:mod:`.colours`); on request they are ignored, as in the reference.
* A file is refused for what its pixels lack, not for its texts or its end; a huge one is decoded small where its format
  can (:mod:`.files`).

:mod:`.files.formats` says which files are read.
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

from ...machine.files import regular_file_problem
from ...machine.wording import format_path
from .colours import Profile, usable_profile
from .errors import ImageAbsurd, ImageError, ImageMissing, ImageUnreadable
from .files import jpeg_ends, png_chunks
from .files.formats import PREFIX, open_picture, require_bytes
from .files.memory_limit import decode
from .files.tiff_tags import Greys, read_greys

ImageSource: TypeAlias = str | os.PathLike[str] | Image.Image | NDArray[Any]

MIN_SIDE = 16
"""One patch of the encoders: anything smaller is an icon, blown up 64 times."""
MAX_ASPECT = 20
"""Longer side over shorter: beyond it the centre square shows under 5 % of the picture, and the resize that makes the
shorter side 1024 would need memory in proportion."""

_FLOAT_SLACK = 1e-6
"""How far outside [0, 1] a float array may stray by rounding."""

BAND_ROWS = 64
"""Rows that are converted at once where that takes more than the picture and its outcome."""
JPEG_BEGINNING = b"\xff\xd8\xff"
TIFF_BEGINNINGS = (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")

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


def load_image(source: ImageSource, *, ignore_icc: bool = False) -> Image.Image:
    """Reads a picture.

    Args:
        source: a file's path; a PIL image (of an animation, its current frame); or an array of shape HxW, HxWx3 or
            HxWx4, uint8 or float in [0, 1].
        ignore_icc: take the pixels for sRGB whatever their profile says, as the reference does.

    Returns:
        A new upright image of mode ``RGB``, 8 bits a channel, without metadata. The module says how other modes get
        there.

    Raises:
        ImageMissing: there is no such file.
        ImageUnreadable: the file is truncated, a directory or no picture, or the pixels have no agreed meaning.
        DecoderMissing: the extra ``pictures`` would read it.
        ImageAbsurd: the shorter side is under 16 pixels, the longer one is over 20 times the shorter, or decoding takes
            more memory than :data:`.files.memory_limit.LIMIT_BYTES`. Files are judged by their header, before
            anything is decoded.
    """
    if isinstance(source, np.ndarray):
        return _from_array(source, "the given array")
    if isinstance(source, Image.Image):
        with _pillow_errors("the given PIL image"):
            return _to_rgb(source, "the given PIL image", ignore_icc=ignore_icc)
    path = Path(source)
    name = format_path(path)
    if problem := regular_file_problem(path):
        raise ImageUnreadable(name, problem)
    if path.is_symlink() and not path.exists():
        raise ImageMissing(name, format_path(path.readlink()))
    with _pillow_errors(name), path.open("rb") as file:
        return _from_file(file, name, ignore_icc=ignore_icc)


def _from_file(file: IO[bytes], name: str, *, ignore_icc: bool) -> Image.Image:
    begin = file.read(PREFIX)
    file.seek(0)
    if begin.startswith(png_chunks.SIGNATURE):
        pixels, profile = png_chunks.picture_chunks(file)
        image = open_picture(pixels, name)
        image.info.pop("icc_profile", None)
        if profile is not None:
            image.info["icc_profile"] = profile
        return _to_rgb(image, name, ignore_icc=ignore_icc, own=True)
    if begin.startswith(TIFF_BEGINNINGS):
        pixels, greys = read_greys(file)
        if greys.preview:
            raise ImageUnreadable(name, "it is a camera's raw file, or begins with a small preview as they do")
        return _to_rgb(open_picture(pixels, name), name, ignore_icc=ignore_icc, greys=greys, own=True)
    if begin.startswith(JPEG_BEGINNING):
        return _from_jpeg(file, name, ignore_icc=ignore_icc)
    return _to_rgb(open_picture(file, name), name, ignore_icc=ignore_icc, own=True)


def _from_jpeg(file: IO[bytes], name: str, *, ignore_icc: bool) -> Image.Image:
    require_bytes(file, name)  # its end may be looked for
    if not jpeg_ends.is_padded(file):
        try:
            return _to_rgb(open_picture(file, name), name, ignore_icc=ignore_icc, own=True)
        except OSError as error:
            if "truncated" not in str(error):
                raise
    whole = jpeg_ends.with_an_end(file, lambda pixels: open_picture(pixels, name))
    if whole is None:
        raise ImageUnreadable(name, "image file is truncated")
    return _to_rgb(open_picture(whole, name), name, ignore_icc=ignore_icc, own=True)


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
        except FileNotFoundError as error:
            raise ImageMissing(name) from error
        except _DAMAGE as error:
            raise ImageUnreadable(name, _reason(error)) from error
        finally:
            ImageFile.LOAD_TRUNCATED_IMAGES = lenient


def _reason(error: Exception) -> str:
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    if str(error) == "not identified by this driver":  # Pillow's word where the header has no size or no mode
        return "its header is damaged"
    return str(error) or type(error).__name__


def _check_size(name: str, width: int, height: int) -> None:
    short, long = sorted((width, height))
    if short < MIN_SIDE:
        raise ImageAbsurd(name, width, height, f"the shorter side needs at least {MIN_SIDE}")
    if long > MAX_ASPECT * short:
        raise ImageAbsurd(name, width, height, f"the longer side can be at most {MAX_ASPECT} times the shorter")


def _to_rgb(
    image: Image.Image, name: str, *, ignore_icc: bool = False, greys: Greys | None = None, own: bool = False
) -> Image.Image:
    """The picture as a new one, or, where it is ``own``, as itself: then no second copy of its pixels is made."""
    _check_size(name, *image.size)
    upright = _upright(decode(image, name), own=own)
    if upright.mode == "F":
        raise ImageUnreadable(name, "the range of its float pixels is unknown; an array in [0, 1] is read")
    data = None if ignore_icc else image.info.get("icc_profile")
    if own and upright is not image:
        image.close()
    profile = usable_profile(data, upright.mode, name)
    if upright.mode == "I" or upright.mode.startswith("I;16"):
        upright = _from_16_bit(upright, name, greys or Greys())
    rgb = _on_white(upright, profile) if upright.has_transparency_data else _coloured(upright, profile)
    rgb.info.clear()
    return rgb


def _coloured(image: Image.Image, profile: Profile | None) -> Image.Image:
    """An opaque picture as ``RGB``, by its profile if it has one."""
    if profile is None:
        return image if image.mode == "RGB" else image.convert("RGB")
    return profile.apply(image if image.mode == profile.mode else image.convert(profile.mode))


def _upright(image: Image.Image, *, own: bool) -> Image.Image:
    """Turned as its EXIF orientation says, as it is where the EXIF block is damaged; a copy unless it is our own.

    ``ImageOps.exif_transpose`` would also rewrite the EXIF block, and stumbles over what cameras put there.
    """
    try:
        orientation = image.getexif().get(ExifTags.Base.Orientation)
    except _DAMAGE:
        orientation = None
    if orientation in _TURNS:
        return image.transpose(_TURNS[orientation])
    return image if own else image.copy()


def _on_white(image: Image.Image, profile: Profile | None) -> Image.Image:
    key = image.info.get("transparency")
    if image.mode == "RGB" and isinstance(key, tuple) and max(key) > 0xFF:
        # A 16-bit file: Pillow kept the high bytes of the pixels, but both bytes of the transparent colour.
        image.info["transparency"] = tuple(value >> 8 for value in key)
    white = Image.new("RGB", image.size)
    for box in _bands(image.size):
        band = image.crop(box)
        rgba = band.convert("LA").convert("RGBA") if image.mode == "La" else band.convert("RGBA")
        if profile is not None:
            coloured = _coloured(rgba.convert("RGB"), profile)
            coloured.putalpha(rgba.getchannel("A"))
            rgba = coloured
        white.paste(Image.alpha_composite(Image.new("RGBA", rgba.size, "white"), rgba).convert("RGB"), box)
    return white


def _bands(size: tuple[int, int]) -> Iterator[tuple[int, int, int, int]]:
    """Boxes that cover a picture, so that what is made on the way takes the memory of one."""
    width, height = size
    for top in range(0, height, BAND_ROWS):
        yield 0, top, width, min(top + BAND_ROWS, height)


def _from_16_bit(image: Image.Image, name: str, greys: Greys) -> Image.Image:
    """Deep greys as ``L``, or as ``LA`` if one of them is transparent."""
    key = image.info.get("transparency")
    grey = Image.new("L" if key is None else "LA", image.size)
    lows, highs = [], []
    for box in _bands(image.size):
        values = np.asarray(image.crop(box))
        lows.append(int(values.min()))
        highs.append(int(values.max()))
        bright = values.astype(np.uint32)
        if greys.bits < 16:
            bright = (bright * 0xFFFF + (1 << greys.bits - 1)) // ((1 << greys.bits) - 1)
        if greys.negative:
            bright = 0xFFFF - bright
        band = Image.fromarray(((bright + 128) // 257).astype(np.uint8))
        if key is not None:
            band.putalpha(Image.fromarray(np.where(values == key, 0, 255).astype(np.uint8)))
        grey.paste(band, box)
    if min(lows) < 0 or max(highs) > 0xFFFF:
        raise ImageUnreadable(name, f"its integer pixels reach from {min(lows)} to {max(highs)}, outside 16 bits")
    return grey


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
