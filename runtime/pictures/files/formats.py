"""The formats of pictures: what a file is by its first bytes, what its name promises, and who opens it.

Pillow's other formats run outside programs (EPS) or are no pictures. HEIC and JPEG XL are read by plugins of Pillow,
the extra ``pictures``; HEIC's is asked directly, as registering it would change Pillow for the whole process.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import IO

from PIL import Image

from ....machine.wording import format_bytes
from ..errors import DecoderMissing, ImageUnreadable
from .jxl_size import jxl_size
from .memory_limit import LIMIT_BYTES, require_jxl_room
from .splicing import size_of

PREFIX = 32
"""First bytes that tell a format."""
FORMATS = ("JPEG", "PNG", "WEBP", "AVIF", "GIF", "BMP", "TIFF", "JPEG2000", "PPM", "QOI")
"""Pillow's names of the formats that it reads by itself and that are read here."""
READ_WHOLE = frozenset({"WEBP", "AVIF"})
"""Of these, those whose reader begins with all bytes of the file; so do the plugins'."""
PLUGINS: Mapping[str, str] = {"HEIC": "pillow-heif", "JPEG XL": "pillow-jxl-plugin"}
"""Formats that need a plugin, and its name."""
SUFFIXES = (
    *(".jpg", ".jpeg", ".jpe", ".jfif", ".jif", ".jfi", ".png", ".apng", ".webp", ".avif", ".avifs", ".gif"),
    *(".bmp", ".dib", ".tif", ".tiff", ".jp2", ".j2k", ".j2c", ".jpc", ".jpf", ".jpx", ".ppm", ".pgm", ".pbm", ".pnm"),
    *(".qoi", ".heic", ".heif", ".heics", ".heifs", ".hif", ".jxl"),
)
"""Names that promise a picture of a format that is read."""
FOREIGN = frozenset(
    [
        ".dng",
        ".cr2",
        ".cr3",
        ".crw",
        ".nef",
        ".nrw",
        ".arw",
        ".srf",
        ".sr2",
        ".orf",
        ".rw2",
        ".raf",
        ".pef",
        ".srw",
        ".x3f",
        ".3fr",
        ".iiq",
        ".raw",
        ".psd",
        ".psb",
        ".xcf",
        ".kra",
        ".svg",
        ".svgz",
        ".eps",
        ".ai",
        ".tga",
        ".exr",
        ".hdr",
        ".dds",
        ".ico",
        ".icns",
        ".cur",
        ".pcx",
        ".sgi",
        ".wmf",
        ".emf",
        ".pam",
        ".pfm",
        ".jxr",
        ".wdp",
        ".hdp",
        ".bpg",
        ".djvu",
    ]
)
"""Names of pictures that are not read: they must be an error, not a file that was passed over."""
HEIF_BRANDS = frozenset({b"heic", b"heix", b"heim", b"heis", b"hevc", b"hevx", b"hevm", b"hevs", b"mif1", b"msf1"})
AVIF_BRANDS = frozenset({b"avif", b"avis"})
JXL_CONTAINER = b"\0\0\0\x0cJXL \r\n\x87\n"
SIGNATURES = (
    *(b"\xff\xd8\xff", b"\x89PNG\r\n\x1a\n", b"GIF87a", b"GIF89a", b"II*\0", b"MM\0*", b"II+\0", b"MM\0+", b"qoif"),
    *(b"\0\0\0\x0cjP  \r\n\x87\n", b"\xff\x4f\xff\x51", b"8BPS"),
)
"""Beginnings that nothing else has; BMP and PPM have too short ones, so their names must say it."""


def looks_like_picture(path: Path) -> bool:
    """Is a file of a folder meant as a picture, by its name or by what it holds?"""
    if path.suffix.lower() in SUFFIXES or path.suffix.lower() in FOREIGN:
        return True
    try:
        with path.open("rb") as file:
            prefix = file.read(PREFIX)
    except OSError:
        return False  # neither its name nor anybody else says that it is one
    return (
        prefix.startswith(SIGNATURES) or prefix[8:12] == b"WEBP" or plugin_format(prefix) is not None or _avif(prefix)
    )


def plugin_format(prefix: bytes) -> str | None:
    """The format that these first bytes tell, if it is one of :data:`PLUGINS`."""
    if prefix.startswith((b"\xff\x0a", JXL_CONTAINER)):
        return "JPEG XL"
    return "HEIC" if prefix[4:8] == b"ftyp" and _brands(prefix) & HEIF_BRANDS and not _avif(prefix) else None


def open_picture(file: IO[bytes], name: str) -> Image.Image:
    """The image of an open file, its header read; only JPEG XL is decoded at once, once its size was looked at.

    ``Image.open`` would do, but for a huge picture it raises without telling the size.

    Raises:
        ImageUnreadable: it is in none of the formats.
        DecoderMissing: the plugin for it is not installed.
        ImageAbsurd: a JPEG XL picture that would take too much memory.
    """
    file.seek(0)
    prefix = file.read(PREFIX)
    file.seek(0)
    if kind := plugin_format(prefix):
        require_bytes(file, name)
        return _opened_by_plugin(file, name, kind)
    Image.init()
    for kind in FORMATS:
        factory, accept = Image.OPEN[kind]
        if accept is None or accept(prefix[:16]) is True:
            if kind in READ_WHOLE:
                require_bytes(file, name)
            return factory(file, "")
    suffix = Path(name).suffix.lower()
    if suffix in FOREIGN or prefix.startswith(b"8BPS"):
        raise ImageUnreadable(name, f"it is in no known picture format: {suffix or '.psd'} is not read")
    raise ImageUnreadable(name, "it is in no known picture format" if prefix else "it is empty")


def _opened_by_plugin(file: IO[bytes], name: str, kind: str) -> Image.Image:
    try:
        if kind == "HEIC":
            from pillow_heif import HeifImageFile  # noqa: PLC0415 - an extra

            opened: Image.Image = HeifImageFile(file, "")  # type: ignore[no-untyped-call]
            return opened
        from pillow_jxl.JpegXLImagePlugin import JXLImageFile  # noqa: PLC0415 - an extra

        if (size := jxl_size(file)) is None:
            raise ImageUnreadable(name, "its JPEG XL header is not whole")
        require_jxl_room(name, size)
        file.seek(0)
        return JXLImageFile(file, "")
    except ModuleNotFoundError as error:
        raise DecoderMissing(name, kind, PLUGINS[kind]) from error


def require_bytes(file: IO[bytes], name: str) -> None:
    """Refuse a file that is read whole, by some readers twice into memory, before it is known what it holds."""
    if (nbytes := size_of(file)) > LIMIT_BYTES // 2:
        raise ImageUnreadable(name, f"its file has {format_bytes(nbytes)}, more than are read at once")


def _avif(prefix: bytes) -> bool:
    return prefix[4:8] == b"ftyp" and bool(_brands(prefix) & AVIF_BRANDS)


def _brands(prefix: bytes) -> set[bytes]:
    """The main brand and the first compatible ones."""
    end = min(int.from_bytes(prefix[:4], "big"), len(prefix))
    return {prefix[8:12], *(prefix[at : at + 4] for at in range(16, end - 3, 4))}
