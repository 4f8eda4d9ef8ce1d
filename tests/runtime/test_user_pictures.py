"""Pictures as users' programs write them: profiles, odd ends, long texts, negatives, phones' formats, huge ones."""

import builtins
import io
import logging
import struct
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image, ImageCms, PngImagePlugin, TiffImagePlugin

from conftest import ADOBE, matrix_profile, picture
from i2l.errors import DecoderMissing, FolderEmpty, ImageAbsurd, ImagesUnusable, ImageUnreadable
from i2l.runtime.pictures.files import memory_limit
from i2l.runtime.pictures.files.jxl_size import jxl_size
from i2l.runtime.pictures.images import load_image
from i2l.runtime.pictures.listing import list_images, skipped_line
from i2l.runtime.pictures.sources import colours_mark, load_squares

PHOTO = picture(240, 180, seed=5)
SMOOTH = PHOTO.resize((30, 24)).resize((240, 180), Image.Resampling.BICUBIC)


def saved(image: Image.Image, kind: str, **options: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def loaded(data: bytes, folder: Path, **options: Any) -> NDArray[np.int16]:
    path = folder / "picture"
    path.write_bytes(data)
    return np.asarray(load_image(path, **options)).astype(np.int16)


P3 = np.array([[0.51512, 0.29198, 0.15710], [0.24120, 0.69225, 0.06657], [-0.00105, 0.04189, 0.78407]])
PROPHOTO = np.array([[0.79767, 0.13519, 0.03135], [0.28804, 0.71188, 0.00009], [0.0, 0.0, 0.82491]])
SRGB_D50 = np.array([[0.43607, 0.38515, 0.14307], [0.22249, 0.71687, 0.06061], [0.01392, 0.09708, 0.71410]])
PROFILES = {"adobe": (ADOBE, 2.2), "display p3": (P3, 2.2), "prophoto": (PROPHOTO, 1.8)}


def seen(pixels: NDArray[Any], columns: NDArray[np.float64], gamma: float) -> NDArray[np.float64]:
    """What a viewer shows, by the mathematics of matrix profiles: linear, D50, linear sRGB, encoded."""
    linear = (pixels / 255.0) ** (round(gamma * 256) / 256)
    out = np.clip(linear @ columns.T @ np.linalg.inv(SRGB_D50).T, 0, 1)
    return 255 * np.where(out <= 0.0031308, 12.92 * out, 1.055 * out ** (1 / 2.4) - 0.055)


# --- colours ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["PNG", "TIFF", "WEBP", "JPEG", "AVIF"])
@pytest.mark.parametrize("profile", PROFILES)
def test_rgb_profiles_are_converted(profile: str, kind: str, tmp_path: Path) -> None:
    columns, gamma = PROFILES[profile]
    options = {"lossless": True} if kind == "WEBP" else {"quality": 95}
    data = saved(PHOTO, kind, icc_profile=matrix_profile(b"RGB ", gamma, columns), **options)
    plain = loaded(saved(PHOTO, kind, **options), tmp_path)
    wanted = seen(plain, columns, gamma)
    found = loaded(data, tmp_path)
    assert np.abs(found - wanted).mean() < 0.6  # rounding of littleCMS's tables
    assert np.abs(plain - wanted).mean() > 4
    np.testing.assert_array_equal(loaded(data, tmp_path, ignore_icc=True), plain)


def test_transparency_and_a_profile(tmp_path: Path) -> None:
    rgba = PHOTO.copy()
    rgba.putalpha(Image.linear_gradient("L").resize(PHOTO.size))
    alpha = np.asarray(rgba.getchannel("A"))[..., None] / 255
    wanted = seen(np.asarray(PHOTO), ADOBE, 2.2) * alpha + 255 * (1 - alpha)
    found = loaded(saved(rgba, "PNG", icc_profile=matrix_profile(b"RGB ", 2.2, ADOBE)), tmp_path)
    assert np.abs(found - wanted).max() < 3


@pytest.mark.parametrize("bits", [8, 16])
def test_grey_profiles(bits: int, tmp_path: Path) -> None:
    grey = np.arange(256, dtype=np.uint8).reshape(16, 16)
    image = Image.fromarray(grey if bits == 8 else grey.astype(np.uint16) * 257)
    found = loaded(saved(image, "PNG", icc_profile=matrix_profile(b"GRAY", 1.8, None)), tmp_path)
    wanted = seen(np.repeat(grey[..., None], 3, -1), SRGB_D50, 1.8)
    assert np.abs(found - wanted).max() < 2


def test_a_grey_picture_with_a_colour_profile(tmp_path: Path) -> None:
    grey = PHOTO.convert("L")
    found = loaded(saved(grey, "JPEG", icc_profile=matrix_profile(b"RGB ", 1.8, ADOBE)), tmp_path)
    plain = loaded(saved(grey, "JPEG"), tmp_path)
    assert np.abs(found - seen(plain, ADOBE, 1.8)).mean() < 1


def test_srgb_profiles_change_nothing(tmp_path: Path) -> None:
    for profile in (ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes(),):
        found = loaded(saved(PHOTO, "PNG", icc_profile=profile), tmp_path)
        np.testing.assert_array_equal(found, np.asarray(PHOTO))


@pytest.mark.parametrize("profile", [b"no profile", b"\0" * 200, matrix_profile(b"RGB ", 2.2, P3)[:200]])
def test_a_broken_profile_is_said_and_ignored(profile: bytes, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        found = loaded(saved(PHOTO, "PNG", icc_profile=profile), tmp_path)
    np.testing.assert_array_equal(found, np.asarray(PHOTO))
    assert "its colour profile is ignored" in caplog.text


def test_a_profile_for_other_pictures_is_said_and_ignored(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        found = loaded(saved(PHOTO, "PNG", icc_profile=matrix_profile(b"GRAY", 1.8, None)), tmp_path)
    np.testing.assert_array_equal(found, np.asarray(PHOTO))
    assert "it is for L pictures, this one is RGB" in caplog.text


def test_the_metadata_says_which_colours_were_used() -> None:
    assert colours_mark(ignore_icc=True) != colours_mark(ignore_icc=False)


# --- what is no picture in a file ---------------------------------------------------------------------------------


def chunk(kind: bytes, data: bytes, *, wrong: bool = False) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data) ^ wrong)


def with_chunk(extra: bytes) -> bytes:
    data = saved(PHOTO, "PNG")
    return data[:33] + extra + data[33:]


LONG = bytes(3 << 20)
ANCILLARY = {
    "zTXt": chunk(b"zTXt", b"workflow\0\0" + zlib.compress(LONG)),
    "iTXt": chunk(b"iTXt", b"prompt\0\1\0\0\0" + zlib.compress(LONG)),
    "tEXt": chunk(b"tEXt", b"parameters\0" + LONG),
    "orientation in a bomb": chunk(b"zTXt", b"Raw profile type exif\0\0" + zlib.compress(LONG)),
    **{
        kind.decode(): chunk(kind, b"\x07\xea\1\1\1\1\1", wrong=True)
        for kind in (b"tIME", b"pHYs", b"gAMA", b"cHRM", b"bKGD", b"eXIf", b"tEXt", b"acTL", b"abCd")
    },
    "cut zTXt": chunk(b"zTXt", b"workflow\0\0" + zlib.compress(LONG)[:100]),
}


@pytest.mark.parametrize("case", ANCILLARY)
def test_ancillary_chunks_do_not_matter(case: str, tmp_path: Path) -> None:
    np.testing.assert_array_equal(loaded(with_chunk(ANCILLARY[case]), tmp_path), np.asarray(PHOTO))


@pytest.mark.parametrize("at_the_end", [b"", b"rest of another file" * 9])
def test_bytes_behind_a_png_do_not_matter(at_the_end: bytes, tmp_path: Path) -> None:
    np.testing.assert_array_equal(loaded(saved(PHOTO, "PNG") + at_the_end, tmp_path), np.asarray(PHOTO))


def test_a_long_profile_is_used(tmp_path: Path) -> None:
    profile = matrix_profile(b"RGB ", 2.2, P3)
    profile = struct.pack(">I", len(profile) + len(LONG)) + profile[4:] + LONG
    found = loaded(with_chunk(chunk(b"iCCP", b"icc\0\0" + zlib.compress(profile))), tmp_path)
    assert np.abs(found - seen(np.asarray(PHOTO), P3, 2.2)).mean() < 0.6


@pytest.mark.parametrize("data", [zlib.compress(bytes(20 << 20)), b"rubbish"])
def test_a_profile_that_cannot_be_unpacked_is_said(
    data: bytes, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING):
        found = loaded(with_chunk(chunk(b"iCCP", b"icc\0\0" + data)), tmp_path)
    np.testing.assert_array_equal(found, np.asarray(PHOTO))
    assert "damaged or too long" in caplog.text


@pytest.mark.parametrize("kind", [b"IHDR", b"tRNS", b"PLTE"])
def test_chunks_of_the_picture_stay_strict(kind: bytes, tmp_path: Path) -> None:
    image = PHOTO.quantize(16)
    data = saved(image, "PNG", transparency=1)
    at = data.index(kind) + 4
    (length,) = struct.unpack(">I", data[at - 8 : at - 4])
    broken = data[: at + length] + bytes([data[at + length] ^ 1]) + data[at + length + 1 :]
    with pytest.raises(ImageUnreadable, match="checksum"):
        loaded(broken, tmp_path)


def test_the_orientation_in_a_text_is_kept(tmp_path: Path) -> None:
    info = PngImagePlugin.PngInfo()
    info.add_itxt("XML:com.adobe.xmp", '<x tiff:Orientation="6"/>')
    np.testing.assert_array_equal(loaded(saved(PHOTO, "PNG", pnginfo=info), tmp_path), np.rot90(np.asarray(PHOTO), -1))


# --- ends of JPEG files ---------------------------------------------------------------------------------------------

JPEGS: dict[str, dict[str, Any]] = {
    "baseline": {},
    "4:4:4": {"subsampling": 0, "quality": 95},
    "optimised": {"optimize": True},
    "progressive": {"progressive": True},
    "restarts": {"restart_marker_rows": 1},
}


@pytest.mark.parametrize("mode", ["RGB", "L", "CMYK"])
@pytest.mark.parametrize("kind", JPEGS)
def test_a_jpeg_without_its_end_marker(kind: str, mode: str, tmp_path: Path) -> None:
    data = saved(PHOTO.convert(mode), "JPEG", **JPEGS[kind])
    whole = loaded(data, tmp_path)
    for end in (b"", b"\xff", b"\0" * 40):
        np.testing.assert_array_equal(loaded(data[:-2] + end, tmp_path), whole)


@pytest.mark.parametrize("kind", JPEGS)
def test_a_jpeg_without_some_of_its_pixels(kind: str, tmp_path: Path) -> None:
    data = saved(PHOTO, "JPEG", **JPEGS[kind])
    for missing in (12, 40, 100, len(data) // 4, len(data) // 2):
        for end in (b"", b"\0" * missing):
            with pytest.raises(ImageUnreadable, match="truncated"):
                loaded(data[:-missing] + end, tmp_path)


def test_a_progressive_jpeg_without_its_last_scans(tmp_path: Path) -> None:
    data = saved(PHOTO, "JPEG", progressive=True)
    scans = [at for at in range(len(data)) if data[at : at + 2] == b"\xff\xda"]
    for scan in scans[1:]:
        before = data.rindex(b"\xff\xc4", 0, scan)
        with pytest.raises(ImageUnreadable, match="truncated"):
            loaded(data[:before], tmp_path)


# --- greys of TIFF files --------------------------------------------------------------------------------------------


def tiff(values: NDArray[np.uint16], order: str, photometric: int, rows: int, *, packed: bool = False) -> bytes:
    """A grey TIFF file of 16 bits, in strips, as Pillow cannot write it."""
    height, width = values.shape
    stored = values if photometric else 65535 - values
    strips = [stored[at : at + rows].astype(f"{order}u2").tobytes() for at in range(0, height, rows)]
    strips = [zlib.compress(strip) for strip in strips] if packed else strips
    count = len(strips)
    offsets = [8 + sum(map(len, strips[:index])) for index in range(count)]
    directory = 8 + sum(map(len, strips))
    directory += directory % 2
    lists = directory + 2 + 9 * 12 + 4

    def entry(tag: int, kind: int, number: int, value: int) -> bytes:
        packed_value = struct.pack(f"{order}H2x" if kind == 3 and number == 1 else f"{order}I", value)
        return struct.pack(f"{order}HHI", tag, kind, number) + packed_value

    entries = [entry(256, 4, 1, width), entry(257, 4, 1, height), entry(258, 3, 1, 16)]
    entries += [entry(259, 3, 1, 8 if packed else 1), entry(262, 3, 1, photometric)]
    entries += [entry(273, 4, count, lists if count > 1 else offsets[0]), entry(277, 3, 1, 1), entry(278, 4, 1, rows)]
    entries += [entry(279, 4, count, lists + 4 * count if count > 1 else len(strips[0]))]
    head = (b"II" if order == "<" else b"MM") + struct.pack(f"{order}HI", 42, directory)
    body = head + b"".join(strips)
    body += bytes(directory - len(body)) + struct.pack(f"{order}H", len(entries)) + b"".join(entries) + bytes(4)
    if count > 1:
        body += struct.pack(f"{order}{count}I", *offsets) + struct.pack(f"{order}{count}I", *map(len, strips))
    return body


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("rows", [7, 100])
@pytest.mark.parametrize("photometric", [0, 1])
@pytest.mark.parametrize("order", ["<", ">"])
def test_16_bit_tiff_is_no_negative(order: str, photometric: int, rows: int, packed: bool, tmp_path: Path) -> None:
    values = np.random.default_rng(1).integers(0, 65536, (40, 30)).astype(np.uint16)
    found = loaded(tiff(values, order, photometric, min(rows, 40), packed=packed), tmp_path)
    np.testing.assert_array_equal(found[..., 0], (values.astype(np.uint32) + 128) // 257)


def test_a_preview_in_a_raw_file_is_not_taken_for_the_picture(tmp_path: Path) -> None:
    data = bytearray(tiff(np.zeros((40, 30), np.uint16), "<", 1, 40))
    (directory,) = struct.unpack("<I", data[4:8])
    data[directory + 2 : directory + 14] = struct.pack("<HHII", 254, 4, 1, 1)
    data[directory + 14 : directory + 26] = struct.pack("<HHII", 330, 4, 1, 0)
    with pytest.raises(ImageUnreadable, match="small preview"):
        loaded(bytes(data), tmp_path)


# --- phones and browsers --------------------------------------------------------------------------------------------


def heic(image: Image.Image, **options: Any) -> bytes:
    heif = pytest.importorskip("pillow_heif").from_pillow(image)
    buffer = io.BytesIO()
    heif.save(buffer, quality=95, **options)
    return buffer.getvalue()


def jxl(image: Image.Image, **options: Any) -> bytes:
    pytest.importorskip("pillow_jxl")
    return saved(image, "JXL", lossless=True, **options)


@pytest.mark.parametrize("make", [heic, jxl])
def test_pictures_of_phones_and_browsers(make: Callable[..., bytes], tmp_path: Path) -> None:
    assert np.abs(loaded(make(SMOOTH), tmp_path) - np.asarray(SMOOTH)).mean() < 2


@pytest.mark.parametrize("make", [heic, jxl])
def test_a_cut_phone_picture_is_an_error(make: Callable[..., bytes], tmp_path: Path) -> None:
    data = make(PHOTO)
    for length in (20, len(data) // 3, len(data) - 200):
        with pytest.raises(ImageUnreadable):
            loaded(data[:length], tmp_path)


def test_the_profile_of_a_phone_picture_is_applied(tmp_path: Path) -> None:
    data = jxl(PHOTO)
    assert data
    tagged = PHOTO.copy()
    tagged.info["icc_profile"] = matrix_profile(b"RGB ", 2.2, P3)
    found = loaded(heic(tagged), tmp_path)
    assert np.abs(found - seen(loaded(heic(PHOTO), tmp_path), P3, 2.2)).mean() < 1


@pytest.mark.parametrize(("make", "words"), [(heic, "HEIC.*pillow-heif"), (jxl, "JPEG XL.*pillow-jxl-plugin")])
def test_without_the_extra_the_message_names_it(
    make: Callable[..., bytes], words: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = make(PHOTO)
    original = builtins.__import__

    def absent(name: str, *args: Any, **options: Any) -> Any:
        if name.split(".", 1)[0] in {"pillow_heif", "pillow_jxl"}:
            raise ModuleNotFoundError(name)
        return original(name, *args, **options)

    monkeypatch.setattr(builtins, "__import__", absent)
    with pytest.raises(DecoderMissing, match=rf"{words}.*i2l-engines\[pictures\]"):
        loaded(data, tmp_path)


# --- folders --------------------------------------------------------------------------------------------------------


def test_suffixes_in_any_case_and_content_without_one(tmp_path: Path) -> None:
    data = saved(PHOTO, "JPEG")
    names = ["1.JPG", "2.jfif", "3.JPE", "4.Jpeg", "5", "6.bak", "7.HEIC", "8.jxl", "9.dng", "10.psd"]
    for name in names:
        (tmp_path / name).write_bytes(data)
    (tmp_path / "11.mov").write_bytes(b"\0\0\0\x14ftypqt  \0\0\0\0qt  ")
    (tmp_path / "12.txt").write_text("words")
    found = list_images([tmp_path])
    assert [path.name for path in found.images] == names
    assert skipped_line(found.skipped) == "skipped 2 that are not a picture: 11.mov, 12.txt"


def test_a_folder_of_films_is_empty(tmp_path: Path) -> None:
    (tmp_path / "a.mov").write_bytes(b"\0\0\0\x14ftypqt  \0\0\0\0qt  ")
    with pytest.raises(FolderEmpty):
        list_images([tmp_path])


def test_all_that_cannot_be_read_is_listed(tmp_path: Path) -> None:
    PHOTO.save(tmp_path / "good.png")
    (tmp_path / "a.psd").write_bytes(b"8BPS" + bytes(40))
    (tmp_path / "b.jpg").write_bytes(saved(PHOTO, "JPEG")[:900])
    with pytest.raises(ImagesUnusable, match=r"(?s)2 of 3 images.*a\.psd.*b\.jpg"):
        load_squares(list_images([tmp_path]).images)
    (tmp_path / "a.psd").unlink()
    with pytest.raises(ImageUnreadable, match=r"b\.jpg"):
        load_squares(list_images([tmp_path]).images)


# --- huge pictures, with a small limit --------------------------------------------------------------------------------


@pytest.fixture
def small_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory_limit, "LIMIT_BYTES", 8 * 200 * 200)
    monkeypatch.setattr(memory_limit, "KEPT_SIDE", 64)


HUGE: dict[str, tuple[str, dict[str, Any]]] = {
    "JPEG": ("JPEG", {}),
    "JPEG2000": ("JPEG2000", {}),
    "one strip": ("TIFF", {}),
    "strips": ("TIFF", {"strip_size": 30 * 600}),
    **{
        f"{kind} strips": ("TIFF", {"compression": kind, "strip_size": 7 * 600 * 3})
        for kind in ("tiff_lzw", "tiff_adobe_deflate", "packbits", "jpeg", "zstd")
    },
}


@pytest.mark.usefixtures("small_limit")
@pytest.mark.parametrize("kind", HUGE)
def test_a_huge_picture_is_decoded_small(kind: str, tmp_path: Path) -> None:
    big = SMOOTH.resize((600, 480), Image.Resampling.BICUBIC)
    name, options = HUGE[kind]
    found = loaded(saved(big, name, **options), tmp_path)
    assert 64 <= found.shape[0] < 300
    wanted = np.asarray(big.resize((found.shape[1], found.shape[0]), Image.Resampling.BOX), np.int16)
    assert np.abs(found - wanted).mean() < 4


@pytest.mark.usefixtures("small_limit")
@pytest.mark.parametrize("order", ["<", ">"])
@pytest.mark.parametrize("photometric", [0, 1])
@pytest.mark.parametrize("packed", [False, True])
def test_a_huge_grey_of_16_bits_by_strips(packed: bool, photometric: int, order: str, tmp_path: Path) -> None:
    values = np.asarray(SMOOTH.convert("L").resize((600, 480)), np.uint16) * 257
    found = loaded(tiff(values, order, photometric, 11, packed=packed), tmp_path)
    wanted = np.asarray(Image.fromarray((values // 257).astype(np.uint8)).reduce(-(-480 // len(found))), np.int16)
    assert len(found) < 300
    assert np.abs(found[..., 0] - wanted).max() <= 1


def tiled(image: Image.Image, side: int, *, packed: bool) -> bytes:
    """A TIFF file in square tiles, as scanners of slides write them and Pillow does not."""
    across, down = (-(-length // side) for length in image.size)
    padded = image.crop((0, 0, across * side, down * side))
    boxes = [(x * side, y * side, (x + 1) * side, (y + 1) * side) for y in range(down) for x in range(across)]
    tiles = [padded.crop(box).tobytes() for box in boxes]
    tiles = [zlib.compress(tile) for tile in tiles] if packed else tiles
    bands = len(image.getbands())
    tags = TiffImagePlugin.ImageFileDirectory_v2()
    tags[256], tags[257], tags[258] = *image.size, (1 if image.mode == "1" else 8,) * bands
    tags[259], tags[277] = 8 if packed else 1, bands
    tags[262] = {"1": 1, "L": 1, "RGB": 2, "RGBA": 2, "P": 3, "CMYK": 5}[image.mode]
    if image.mode == "RGBA":
        tags[338] = 2
    if image.mode == "P":
        colours = np.zeros((256, 3), np.uint16)
        given = image.getpalette()
        assert given is not None
        colours[: len(given) // 3] = np.array(given, np.uint16).reshape(-1, 3)
        tags[320] = tuple(int(value) for value in (colours * 257).T.flatten())
    tags[322] = tags[323] = side
    tags[324] = tuple(8 + sum(map(len, tiles[:index])) for index in range(len(tiles)))
    tags[325] = tuple(map(len, tiles))
    body = b"".join(tiles)
    body += bytes(len(body) % 2)
    return b"II*\0" + struct.pack("<L", 8 + len(body)) + body + tags.tobytes(8 + len(body))


@pytest.mark.usefixtures("small_limit")
@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("mode", ["RGB", "RGBA", "L", "P", "1", "CMYK"])
def test_a_huge_tiff_of_tiles(mode: str, packed: bool, tmp_path: Path) -> None:
    big = SMOOTH.resize((1200, 1000), Image.Resampling.BICUBIC)
    if mode == "RGBA":
        big.putalpha(Image.linear_gradient("L").resize(big.size))
    big = big.convert(mode)
    found = loaded(tiled(big, 16, packed=packed), tmp_path)
    assert 64 <= len(found) < 300
    seen_whole = Image.alpha_composite(Image.new("RGBA", big.size, "white"), big.convert("RGBA")).convert("RGB")
    wanted = np.asarray(seen_whole.reduce(-(-1000 // len(found))), np.int16)
    assert np.abs(found - wanted).mean() < 1


@pytest.mark.usefixtures("small_limit")
def test_a_huge_tiff_that_is_cut(tmp_path: Path) -> None:
    data = saved(SMOOTH.resize((600, 480)), "TIFF", compression="tiff_lzw", strip_size=7 * 600 * 3)
    (directory,) = struct.unpack("<I", data[4:8])
    broken = data[:8] + bytes(directory - 8) + data[directory:]
    with pytest.raises(ImageUnreadable):
        loaded(broken, tmp_path)


@pytest.mark.usefixtures("small_limit")
@pytest.mark.parametrize("kind", ["PNG", "WEBP"])
def test_a_huge_picture_that_must_be_decoded_whole(kind: str, tmp_path: Path) -> None:
    with pytest.raises(ImageAbsurd, match="600 x 480 pixels; decoding it takes"):
        loaded(saved(PHOTO.resize((600, 480)), kind), tmp_path)


# --- JPEG XL is judged by its header ----------------------------------------------------------------------------------


@pytest.mark.parametrize("boxes", [False, True])
@pytest.mark.parametrize(
    "size", [(256, 256), (640, 480), (1200, 1000), (333, 77), (1000, 500), (1920, 1080), (70, 900)]
)
def test_the_size_of_a_jpeg_xl_picture(size: tuple[int, int], boxes: bool) -> None:
    data = jxl(PHOTO.resize(size), effort=1, exif=b"Exif\0\0MM\0*" + bytes(20)) if boxes else jxl(PHOTO.resize(size))
    assert boxes == data.startswith(b"\0\0\0\x0cJXL ")
    assert jxl_size(io.BytesIO(data)) == size


def test_a_jpeg_xl_bomb_is_not_decoded(tmp_path: Path) -> None:
    """30,000 x 30,000 pixels of one colour: a hundred bytes or so, and 15 GB for its decoder."""
    data = bytearray(jxl(Image.new("RGB", (512, 512)), effort=1))
    header = 0 | 2 << 1 | (29_999 << 3) | 1 << 21  # no eighths; 18 bits of height; the ratio 1 : 1
    assert jxl_size(io.BytesIO(bytes(data))) == (512, 512)
    bomb = b"\xff\x0a" + header.to_bytes(3, "little") + bytes(data[5:])
    with pytest.raises(ImageAbsurd, match=r"30000 x 30000 pixels; decoding it takes 13\.4 GiB"):
        loaded(bomb, tmp_path)


@pytest.mark.parametrize("container", [False, True])
def test_a_jpeg_xl_header_that_is_not_whole(container: bool, tmp_path: Path) -> None:
    data = b"\0\0\0\x0cJXL \r\n\x87\n" + b"\0\0\0\x14jxlp" + bytes(4) if container else b"\xff\x0a\0"
    with pytest.raises(ImageUnreadable, match="header is not whole"):
        loaded(data, tmp_path)


# --- CMYK -------------------------------------------------------------------------------------------------------------


def cmyk_profile(inks: NDArray[np.uint8]) -> bytes:
    """A printer's profile made by hand: a table with the colour of each of the 16 corners of CMYK, as Lab.

    Args:
        inks: ``[16, 3]``, the sRGB colour of each corner, the last ink changing first.
    """
    linear = np.where(inks <= 10, inks / 255 / 12.92, ((inks / 255 + 0.055) / 1.055) ** 2.4)
    xyz = linear @ SRGB_D50.T / [0.9642, 1.0, 0.8249]
    f = np.where(xyz > 216 / 24389, np.cbrt(xyz), (24389 / 27 * xyz + 16) / 116)
    lab = np.stack([116 * f[:, 1] - 16, 500 * (f[:, 0] - f[:, 1]), 200 * (f[:, 1] - f[:, 2])], -1)
    table = np.clip(np.rint(lab * [2.55, 1, 1] + [0, 128, 128]), 0, 255).astype(np.uint8).tobytes()
    unit = struct.pack(">9i", *(65536 if i % 4 == 0 else 0 for i in range(9)))
    ramp = bytes(range(256))
    lut = b"mft1" + bytes(4) + bytes([4, 3, 2, 0]) + unit + ramp * 4 + table + ramp * 3
    lut += bytes(-len(lut) % 4)
    profile = bytearray(matrix_profile(b"CMYK", 1.0, None))
    at = 128 + 4
    tags = {bytes(profile[i : i + 4]): i for i in range(at, at + 12 * 4, 12)}
    place = tags[b"kTRC"]  # a grey curve means nothing here: its entry becomes the table's
    profile[place : place + 12] = b"A2B0" + struct.pack(">II", len(profile), len(lut))
    profile[12:16], profile[20:24] = b"prtr", b"Lab "
    profile += lut
    profile[0:4] = struct.pack(">I", len(profile))
    return bytes(profile)


@pytest.mark.parametrize("kind", ["TIFF", "JPEG"])
def test_cmyk_profiles_are_converted(kind: str, tmp_path: Path) -> None:
    """The inks of this profile are not what their names say, so that a plain conversion is far off."""
    corners = np.array([[c, m, y, k] for c in (0, 1) for m in (0, 1) for y in (0, 1) for k in (0, 1)], np.uint8)
    inks = np.clip(np.array([240 - 100 * m - 120 * k for _, m, _, k in corners.astype(int)]), 0, 255)
    colours = np.stack([inks, np.full(16, 90) + 80 * corners[:, 0], 60 + 120 * corners[:, 2]], -1).astype(np.uint8)
    colours[0] = 255  # no ink is paper, and paper is white where a conversion is relative
    pixels = np.repeat(np.repeat(255 * corners.reshape(4, 4, 4), 16, 0), 16, 1)
    image = Image.fromarray(pixels, "CMYK")
    options = {"quality": 100, "subsampling": 0} if kind == "JPEG" else {}
    data = saved(image, kind, icc_profile=cmyk_profile(colours), **options)
    found = loaded(data, tmp_path)
    wanted = np.repeat(np.repeat(colours.reshape(4, 4, 3), 16, 0), 16, 1).astype(np.int16)
    assert np.abs(found - wanted).max() < 6  # eight bits of Lab, JPEG's rounding
    plain = loaded(data, tmp_path, ignore_icc=True)
    np.testing.assert_array_equal(plain, loaded(saved(image, kind, **options), tmp_path))
    assert np.abs(plain - wanted).mean() > 40
