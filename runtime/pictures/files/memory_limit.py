"""Huge pictures: how much memory decoding one takes, and how to take less where the format has a way.

A photograph of 200 megapixels shows its centre square on 1024 x 1024 pixels, so it need not be decoded whole. JPEG is
decoded at a half, a quarter or an eighth by its own mathematics, JPEG 2000 by leaving finer levels out. TIFF files of
strips or tiles are decoded piece by piece and shrunk on the way.
"""

from PIL import Image, ImageFile, Jpeg2KImagePlugin, JpegImagePlugin, TiffImagePlugin

from ....machine.wording import GIB
from ..errors import ImageAbsurd
from .tiff_bands import shrunk_by_bands

LIMIT_BYTES = 1_500_000_000
"""For decoding one picture, and for turning it into RGB; 187 million pixels of colour."""
KEPT_SIDE = 2048
"""A shrunk picture keeps at least so many pixels on its shorter side: twice what the encoders' square has."""
PIXEL_BYTES = {"1": 1, "L": 1, "P": 1, "I;16": 2, "I;16B": 2, "I;16L": 2}
"""Bytes of a pixel in Pillow's memory; 4 in all other modes."""
JXL_PIXEL_BYTES = 16
"""JPEG XL is decoded by its plugin, whole: 8.0 to 11.0 bytes a pixel measured with pillow-jxl-plugin 1.3, 12 and 24
megapixels of RGB and RGBA, lossless and not; then 4 for RGB."""
COEFFICIENTS_BYTES = 6
"""A progressive JPEG keeps two bytes for each of three values of a pixel until its last scan."""


def decode(image: Image.Image, name: str) -> Image.Image:
    """The picture with its pixels, smaller where the whole would take more than :data:`LIMIT_BYTES`.

    Raises:
        ImageAbsurd: it would all the same.
    """
    if not isinstance(image, ImageFile.ImageFile) or memory_bytes(image) <= LIMIT_BYTES:
        _require_room(image, name)
        image.load()
        return image
    side = min(image.size)
    if isinstance(image, JpegImagePlugin.JpegImageFile) and side >= 2 * KEPT_SIDE:
        shrink = min(8, side // KEPT_SIDE)
        image.draft(image.mode, (image.width // shrink, image.height // shrink))
    elif isinstance(image, Jpeg2KImagePlugin.Jpeg2KImageFile) and side >= 2 * KEPT_SIDE:
        levels = min(
            (side // KEPT_SIDE).bit_length() - 1, 5
        )  # files without so many levels are an error of the decoder
        image.reduce = levels
        _require_room(image, name, 1 << levels)
        image.load()
        return image
    elif isinstance(image, TiffImagePlugin.TiffImageFile) and side >= 2 * KEPT_SIDE:
        small = shrunk_by_bands(image, side // KEPT_SIDE, LIMIT_BYTES // 4)
        if small is not None:
            _require_room(small, name)
            return small
    _require_room(image, name)
    image.load()
    return image


def memory_bytes(image: Image.Image, shrunk: int = 1) -> int:
    """What decoding the picture and making it RGB takes, each side divided by a number."""
    width, height = (side // shrunk for side in image.size)
    pixel = PIXEL_BYTES.get(image.mode, 4) + 4
    if image.info.get("progressive"):
        pixel += COEFFICIENTS_BYTES
    return width * height * pixel


def require_jxl_room(name: str, size: tuple[int, int]) -> None:
    """Raise :class:`ImageAbsurd` if a JPEG XL picture of this size takes too much."""
    _require_bytes(name, size, size[0] * size[1] * JXL_PIXEL_BYTES)


def _require_room(image: Image.Image, name: str, shrunk: int = 1) -> None:
    _require_bytes(name, image.size, memory_bytes(image, shrunk))


def _require_bytes(name: str, size: tuple[int, int], nbytes: int) -> None:
    if nbytes > LIMIT_BYTES:
        limit = f"{LIMIT_BYTES / GIB:.1f}"
        raise ImageAbsurd(
            name, *size, f"decoding it takes {nbytes / GIB:.1f} GiB, more than the {limit} that pictures may take"
        )
