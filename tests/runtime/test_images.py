"""Images to pixels, against the reference's own image processors and against hand-made pictures."""

import hashlib
import io
import struct
import warnings
import zlib
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image, ImageFile

from i2l.errors import ImageAbsurd, ImageError, ImageUnreadable
from i2l.runtime.pictures.images import load_image
from i2l.runtime.pictures.pixels import content_sha256, pixels_dinov3, pixels_siglip2, square_image
from oracles import import_torchvision

RNG = np.random.default_rng(0)
RED, GREEN, BLUE, YELLOW, WHITE = (255, 0, 0), (0, 255, 0), (0, 0, 255), (255, 255, 0), (255, 255, 255)
IMAGENET_STD = np.array([0.229, 0.224, 0.225], np.float32).reshape(3, 1, 1)

SIZES = [
    (1024, 1024),
    (1500, 1100),
    (900, 1400),
    (1024, 1025),  # the crop starts half a pixel in: round half to even
    (1024, 1027),
    (1023, 1025),
    (16, 16),
    (300, 200),
    (64, 1279),
    (2000, 100),  # the widest that is accepted
    (100, 2000),
]


@cache
def picture(width: int, height: int) -> Image.Image:
    """Gradients, hard edges and noise, so that every resize has something to get wrong."""
    rows, columns = np.mgrid[0:height, 0:width]
    smooth = np.stack([rows * 255 // height, columns * 255 // width, (rows + columns) * 255 // (height + width)], -1)
    stripes = ((rows // 7 + columns // 5) % 2 * 255)[..., None]
    noise = np.random.default_rng(width * 10007 + height).integers(0, 256, (height, width, 3))
    return Image.fromarray(((smooth + stripes + noise) // 3).astype(np.uint8))


# --- the reference ----------------------------------------------------------------------------------------------


@cache
def reference_square(width: int, height: int) -> Image.Image:
    """The reference's crop-and-resize: torchvision on PIL images."""
    functional = import_torchvision().transforms.functional
    scale = max(1024 / width, 1024 / height)
    size = (round(height * scale), round(width * scale))
    resized = functional.resize(picture(width, height), size, interpolation=functional.InterpolationMode.BILINEAR)
    square: Image.Image = functional.center_crop(resized, (1024, 1024))
    return square


@cache
def processors() -> dict[str, Callable[..., Any]]:
    import_torchvision()
    from transformers import DINOv3ViTImageProcessor, SiglipImageProcessor, SiglipImageProcessorPil

    half: dict[str, Any] = {"image_mean": [0.5] * 3, "image_std": [0.5] * 3}
    imagenet: dict[str, Any] = {"image_mean": [0.485, 0.456, 0.406], "image_std": [0.229, 0.224, 0.225]}
    settings: dict[str, Any] = {"do_resize": True, "do_rescale": True, "do_normalize": True, "resample": 2}
    return {
        "siglip2": SiglipImageProcessor(**settings, **half),
        "siglip2-pil": SiglipImageProcessorPil(**settings, **half),
        "dinov3": DINOv3ViTImageProcessor(**settings, **imagenet),
    }


def reference_pixels(name: str, square: Image.Image, size: int) -> NDArray[np.float32]:
    output = processors()[name](images=[square], size={"height": size, "width": size}, return_tensors="pt")
    pixels: NDArray[np.float32] = output["pixel_values"][0].numpy()
    return pixels


@pytest.mark.parametrize(("width", "height"), SIZES)
def test_square_is_the_references(width: int, height: int) -> None:
    np.testing.assert_array_equal(square_image(picture(width, height)), reference_square(width, height))


@pytest.mark.parametrize(("width", "height", "size"), [*((*size, 384) for size in SIZES), (900, 1400, 64)])
def test_siglip2_pixels_are_the_references(width: int, height: int, size: int) -> None:
    pixels = pixels_siglip2(picture(width, height), size)
    assert (pixels.shape, pixels.dtype) == ((3, size, size), np.dtype(np.float32))
    # The reference was written with transformers 4, whose processor resized with PIL. Measured: no difference
    # at all. One 8-bit step would be 7.8e-3.
    reference = reference_pixels("siglip2-pil", reference_square(width, height), size)
    assert np.abs(pixels - reference).max() < 1e-6
    # transformers 5 resizes 8-bit values with torch, whose weights have fewer bits: it lands on the neighbouring 8-bit
    # value for up to 1 in 5000. Measured: one step, 1/255 before normalisation, which doubles it.
    reference = reference_pixels("siglip2", reference_square(width, height), size)
    assert np.abs(pixels - reference).max() / 2 < 1 / 255 + 1e-6


@pytest.mark.parametrize(("width", "height", "size"), [*((*size, 224) for size in SIZES), (900, 1400, 64)])
def test_dinov3_pixels_are_the_references(width: int, height: int, size: int) -> None:
    pixels = pixels_dinov3(picture(width, height), size)
    assert (pixels.shape, pixels.dtype) == ((3, size, size), np.dtype(np.float32))
    reference = reference_pixels("dinov3", reference_square(width, height), size)
    # Measured: 6.0e-6 before normalisation, single precision summed in another order. 1/255 would be no test: an 8-bit
    # resize, the mistake to catch, is off by 3.3e-3.
    assert np.abs((pixels - reference) * IMAGENET_STD).max() < 2e-5


def test_squaring_twice_changes_nothing() -> None:
    square = square_image(picture(500, 700))
    np.testing.assert_array_equal(square_image(square), square)
    np.testing.assert_array_equal(pixels_dinov3(square, 64), pixels_dinov3(picture(500, 700), 64))


def test_pixels_are_contiguous() -> None:
    assert pixels_siglip2(picture(40, 40), 64).flags.c_contiguous
    assert pixels_dinov3(picture(40, 40), 64).flags.c_contiguous


@pytest.mark.parametrize("function", [square_image, content_sha256])
def test_other_modes_need_load_image_first(function: Callable[[Image.Image], object]) -> None:
    with pytest.raises(ValueError, match="mode is L, not RGB"):
        function(Image.new("L", (32, 32)))


# --- orientation ------------------------------------------------------------------------------------------------

UPRIGHT: dict[int, Callable[[NDArray[np.uint8]], NDArray[np.uint8]]] = {
    1: lambda a: a,
    2: lambda a: a[:, ::-1],
    3: lambda a: a[::-1, ::-1],
    4: lambda a: a[::-1],
    5: lambda a: a.transpose(1, 0, 2),
    6: lambda a: np.rot90(a, -1),
    7: lambda a: a[::-1, ::-1].transpose(1, 0, 2),
    8: np.rot90,
}
"""How a viewer turns the stored pixels, by EXIF orientation; from the EXIF standard."""


def exif(orientation: int) -> Image.Exif:
    tags = Image.Exif()
    tags[0x0112] = orientation
    tags[0x010E] = "where I live"
    return tags


def saved(image: Image.Image, kind: str, **options: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


@pytest.mark.parametrize("orientation", UPRIGHT)
@pytest.mark.parametrize("kind", ["PNG", "WEBP", "TIFF"])
def test_exif_orientation(orientation: int, kind: str, tmp_path: Path) -> None:
    stored = RNG.integers(0, 256, (20, 30, 3), np.uint8)
    options = {"lossless": True} if kind == "WEBP" else {}
    path = tmp_path / "photo"
    path.write_bytes(saved(Image.fromarray(stored), kind, exif=exif(orientation), **options))
    np.testing.assert_array_equal(load_image(path), UPRIGHT[orientation](stored))


@pytest.mark.parametrize("orientation", UPRIGHT)
def test_exif_orientation_of_a_jpeg(orientation: int) -> None:
    stored = np.zeros((32, 48, 3), np.uint8)
    stored[:16, :16] = 255  # in one corner, on whole 16 x 16 blocks: JPEG keeps it within a few values
    photo = Image.open(io.BytesIO(saved(Image.fromarray(stored), "JPEG", exif=exif(orientation))))
    np.testing.assert_allclose(np.asarray(load_image(photo)), UPRIGHT[orientation](stored), atol=4)


@pytest.mark.parametrize("orientation", [0, 9, 1000])
def test_an_unknown_orientation_is_upright(orientation: int) -> None:
    stored = RNG.integers(0, 256, (20, 30, 3), np.uint8)
    photo = Image.open(io.BytesIO(saved(Image.fromarray(stored), "PNG", exif=exif(orientation))))
    np.testing.assert_array_equal(load_image(photo), stored)


@pytest.mark.parametrize("block", [b"Exif\0\0MM\0*", b"Exif\0\0rubbish!", b"Exif\0\0MM\0*\0\0\0\x08\0\x09\x01\x12"])
def test_a_damaged_exif_block_is_ignored(block: bytes) -> None:
    stored = RNG.integers(0, 256, (20, 30, 3), np.uint8)
    photo = Image.open(io.BytesIO(saved(Image.fromarray(stored), "PNG", exif=block)))
    np.testing.assert_array_equal(load_image(photo), stored)


def test_orientation_survives_a_damaged_rest() -> None:
    # Orientation 6, then a text tag whose type says "rational": rewriting the block, as Pillow's exif_transpose does,
    # raises a TypeError.
    tags = [(0x0112, 3, 1, b"\0\x06\0\0"), (0x010F, 7, 4, b"abcd"), (0x9286, 12, 1, b"\0\0\0\0")]
    block = b"Exif\0\0MM\0*\0\0\0\x08" + struct.pack(">H", len(tags))
    block += b"".join(struct.pack(">HHI", *tag[:3]) + tag[3] for tag in tags) + b"\0\0\0\0"
    stored = RNG.integers(0, 256, (20, 30, 3), np.uint8)
    photo = Image.open(io.BytesIO(saved(Image.fromarray(stored), "PNG", exif=block)))
    np.testing.assert_array_equal(load_image(photo), np.rot90(stored, -1))


def test_metadata_is_dropped_and_the_source_left_alone() -> None:
    photo = Image.open(io.BytesIO(saved(picture(30, 20), "PNG", exif=exif(6))))
    before = photo.copy().tobytes()
    loaded = load_image(photo)
    assert (loaded.info, dict(loaded.getexif()), loaded.mode) == ({}, {}, "RGB")
    assert (photo.tobytes(), photo.size, photo.getexif()[0x0112]) == (before, (30, 20), 6)
    np.testing.assert_array_equal(load_image(loaded), loaded)


def test_a_new_image_comes_back() -> None:
    source = Image.new("RGB", (30, 20), RED)
    load_image(source).putpixel((0, 0), BLUE)
    assert source.getpixel((0, 0)) == RED


# --- modes ------------------------------------------------------------------------------------------------------


def png(bits: int, colour: int, pixels: NDArray[Any], transparent: bytes) -> Image.Image:
    """A PNG that Pillow cannot write: any depth with a transparent colour. ``colour``: 0 grey, 2 RGB."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    height, width = pixels.shape[:2]
    rows = b"".join(b"\0" + row.tobytes() for row in pixels)
    body = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, bits, colour, 0, 0, 0)) + chunk(b"tRNS", transparent)
    body += chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")
    return Image.open(io.BytesIO(b"\x89PNG\r\n\x1a\n" + body))


def quarters(mode: str, *colours: Any) -> Image.Image:
    """A 32 x 32 image of four flat quarters."""
    image = Image.new(mode, (32, 32))
    for index, colour in enumerate(colours):
        image.paste(colour, (index % 2 * 16, index // 2 * 16, index % 2 * 16 + 16, index // 2 * 16 + 16))
    return image


def grey(value: int) -> tuple[int, int, int]:
    return (value, value, value)


def palette_image(alpha: tuple[int, int, int, int] | None) -> Image.Image:
    image = quarters("P", 0, 1, 2, 3)
    image.putpalette([*RED, *GREEN, *BLUE, *YELLOW])
    if alpha is not None:
        image.info["transparency"] = bytes(alpha)
    return image


def palette_alpha_image() -> Image.Image:
    image = quarters("RGBA", (*RED, 255), (*GREEN, 0), (*BLUE, 255), (*YELLOW, 0)).convert("PA")
    assert image.mode == "PA"
    return image


BIG_ENDIAN_16 = np.array([[0, 128], [129, 65535]], ">u2").repeat(16, 0).repeat(16, 1)
COLOUR_16 = np.array([[[0x1234, 0x5678, 0x9ABC], [0xFFFF, 0, 0]]] * 2, ">u2").repeat(16, 0).repeat(16, 1)

MODES: dict[str, tuple[Callable[[], Image.Image], list[tuple[int, int, int]]]] = {
    "RGB": (lambda: quarters("RGB", RED, GREEN, BLUE, YELLOW), [RED, GREEN, BLUE, YELLOW]),
    "RGBX": (lambda: quarters("RGBX", (*RED, 0), (*GREEN, 9), (*BLUE, 255), (*YELLOW, 1)), [RED, GREEN, BLUE, YELLOW]),
    "L": (lambda: quarters("L", 0, 1, 128, 255), [grey(0), grey(1), grey(128), grey(255)]),
    "1": (lambda: quarters("1", 0, 1, 1, 0), [grey(0), WHITE, WHITE, grey(0)]),
    "P": (lambda: palette_image(None), [RED, GREEN, BLUE, YELLOW]),
    # On white: colour * alpha + 255 * (1 - alpha), rounded.
    "RGBA": (
        lambda: quarters("RGBA", (*RED, 255), (*GREEN, 0), (0, 0, 255, 51), (10, 20, 30, 128)),
        [RED, WHITE, (204, 204, 255), (132, 137, 142)],
    ),
    "LA": (lambda: quarters("LA", (0, 255), (0, 0), (0, 51), (255, 9)), [grey(0), WHITE, grey(204), WHITE]),
    "P with alpha": (lambda: palette_image((255, 0, 51, 255)), [RED, WHITE, (204, 204, 255), YELLOW]),
    "PA": (palette_alpha_image, [RED, WHITE, BLUE, WHITE]),
    # Premultiplied: the stored colour is already times alpha.
    "RGBa": (
        lambda: quarters("RGBa", (255, 0, 0, 255), (0, 0, 0, 0), (0, 0, 51, 51), (0, 255, 0, 255)),
        [RED, WHITE, (204, 204, 255), GREEN],
    ),
    "La": (lambda: quarters("La", (0, 255), (0, 0), (0, 51), (51, 51)), [grey(0), WHITE, grey(204), WHITE]),
    "P with a transparent colour": (
        lambda: Image.open(io.BytesIO(saved(palette_image(None), "GIF", transparency=1))),
        [RED, WHITE, BLUE, YELLOW],
    ),
    "RGB with a transparent colour": (
        lambda: Image.open(io.BytesIO(saved(quarters("RGB", RED, GREEN, BLUE, YELLOW), "PNG", transparency=GREEN))),
        [RED, WHITE, BLUE, YELLOW],
    ),
    "L with a transparent grey": (
        lambda: Image.open(io.BytesIO(saved(quarters("L", 0, 1, 128, 255), "PNG", transparency=1))),
        [grey(0), WHITE, grey(128), WHITE],
    ),
    "16-bit PNG, one grey transparent": (
        lambda: png(16, 0, BIG_ENDIAN_16, struct.pack(">H", 0)),
        [WHITE, grey(0), grey(1), WHITE],
    ),
    # Pillow keeps the high byte of 16-bit colour.
    "16-bit colour PNG": (
        lambda: png(16, 2, COLOUR_16, struct.pack(">HHH", 1, 2, 3)),
        [(0x12, 0x56, 0x9A), RED, (0x12, 0x56, 0x9A), RED],
    ),
    "16-bit colour PNG, one colour transparent": (
        lambda: png(16, 2, COLOUR_16, struct.pack(">HHH", 0x1234, 0x5678, 0x9ABC)),
        [WHITE, RED, WHITE, RED],
    ),
    # CMYK to RGB without profiles: (255 - c) * (255 - k) / 255.
    "CMYK": (
        lambda: quarters("CMYK", (0, 255, 255, 0), (255, 0, 255, 0), (0, 0, 0, 0), (0, 0, 0, 155)),
        [RED, GREEN, WHITE, grey(100)],
    ),
    # JFIF: 128 is no colour; red is (76, 85, 255), to which the decoder answers with 254.
    "YCbCr": (
        lambda: quarters("YCbCr", (0, 128, 128), (255, 128, 128), (100, 128, 128), (76, 85, 255)),
        [grey(0), WHITE, grey(100), (254, 0, 0)],
    ),
    "HSV": (
        lambda: quarters("HSV", (0, 255, 255), (85, 255, 255), (170, 255, 255), (0, 0, 100)),
        [RED, GREEN, BLUE, grey(100)],
    ),
    # Value / 257: 128 is the last value that rounds to 0, and 65535 is 255.
    "I;16": (
        lambda: Image.frombytes("I;16", (32, 32), BIG_ENDIAN_16.astype("<u2").tobytes()),
        [grey(0), grey(0), grey(1), WHITE],
    ),
    "I;16B": (
        lambda: Image.frombytes("I;16B", (32, 32), BIG_ENDIAN_16.tobytes()),
        [grey(0), grey(0), grey(1), WHITE],
    ),
    "I": (lambda: quarters("I", 0, 128, 129, 65535), [grey(0), grey(0), grey(1), WHITE]),
}


@pytest.mark.parametrize("case", MODES)
def test_modes(case: str) -> None:
    make, expected = MODES[case]
    loaded = load_image(make())
    assert (loaded.mode, loaded.size) == ("RGB", (32, 32))
    assert [loaded.getpixel(at) for at in ((3, 3), (20, 3), (3, 20), (20, 20))] == expected


def test_lab() -> None:
    # Bytes are L * 2.55, a + 128, b + 128; sRGB red under D50 is L 54.3, a 80.8, b 69.9. Rounding to bytes and
    # the colour engine's tables cost up to 5.
    loaded = load_image(quarters("LAB", (0, 128, 128), (255, 128, 128), (138, 209, 198), (138, 128, 128)))
    colours = np.asarray(loaded)[[3, 3, 20, 20], [3, 20, 3, 20]]
    np.testing.assert_allclose(colours, [grey(0), WHITE, RED, grey(130)], atol=5)


def test_16_bit_png_from_a_file(tmp_path: Path) -> None:
    Image.frombytes("I;16", (32, 32), BIG_ENDIAN_16.astype("<u2").tobytes()).save(tmp_path / "deep.png")
    np.testing.assert_array_equal(np.unique(np.asarray(load_image(tmp_path / "deep.png"))), [0, 1, 255])


def test_every_16_bit_value_rounds_to_the_nearest() -> None:
    values = np.arange(65536, dtype=np.int32).reshape(256, 256)
    np.testing.assert_array_equal(np.asarray(load_image(Image.fromarray(values)))[..., 0], np.rint(values / 257))


@pytest.mark.parametrize("kind", ["GIF", "WEBP", "PNG", "TIFF"])
def test_the_first_frame_of_an_animation(kind: str, tmp_path: Path) -> None:
    path = tmp_path / "moving"
    options = {"lossless": True} if kind == "WEBP" else {}
    frames = [Image.new("RGB", (32, 32), colour) for colour in (RED, GREEN, BLUE)]
    path.write_bytes(saved(frames[0], kind, save_all=True, append_images=frames[1:], **options))
    assert load_image(path).getcolors() == [(1024, RED)]


# --- arrays -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(20, 30), (20, 30, 3), (20, 30, 4)])
def test_arrays(shape: tuple[int, ...]) -> None:
    array = RNG.integers(0, 256, shape, np.uint8)
    expected = array[..., None].repeat(3, -1) if array.ndim == 2 else array[..., :3]
    if shape[-1] == 4:
        alpha = array[..., 3:] / 255
        expected = np.rint(expected * alpha + 255 * (1 - alpha))
    np.testing.assert_array_equal(load_image(array), expected)


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64])
def test_float_arrays(dtype: type[np.floating[Any]]) -> None:
    eight_bit = np.arange(256, dtype=np.uint8).reshape(16, 16)
    loaded = np.asarray(load_image((eight_bit / 255).astype(dtype)))[..., 0]
    np.testing.assert_array_equal(loaded, eight_bit)


def test_float_arrays_may_stray_by_rounding() -> None:
    array = np.zeros((16, 16), np.float32)
    array[:8], array[8:] = -1e-7, np.nextafter(np.float32(1), np.float32(2))
    assert np.unique(np.asarray(load_image(array))).tolist() == [0, 255]


def test_strided_arrays() -> None:
    array = RNG.integers(0, 256, (40, 60, 3), np.uint8)
    np.testing.assert_array_equal(load_image(array[::2, ::-2]), array[::2, ::-2])


@pytest.mark.parametrize(
    ("array", "reason"),
    [
        (np.zeros((32, 32), np.uint16), "dtype is uint16"),
        (np.zeros((32, 32), bool), "dtype is bool"),
        (np.zeros((3, 32, 32), np.uint8), r"shape is \(3, 32, 32\)"),
        (np.zeros((32, 32, 1), np.uint8), r"shape is \(32, 32, 1\)"),
        (np.zeros(32, np.uint8), r"shape is \(32,\)"),
        (np.full((32, 32), 1.01), "reach from 1.01 to 1.01"),
        (np.full((32, 32), -0.01), "reach from -0.01"),
        (np.full((32, 32), np.nan), "nan"),
        (np.full((32, 32), np.inf), "inf"),
    ],
)
def test_arrays_without_a_meaning(array: NDArray[Any], reason: str) -> None:
    with pytest.raises(ImageUnreadable, match=f"^the given array .*{reason}"):
        load_image(array)


# --- errors -----------------------------------------------------------------------------------------------------

WHOLE: dict[str, Callable[[Image.Image], bytes]] = {
    "baseline JPEG": lambda image: saved(image, "JPEG"),
    "progressive JPEG": lambda image: saved(image, "JPEG", progressive=True),
    "PNG": lambda image: saved(image, "PNG"),
    "WEBP": lambda image: saved(image, "WEBP"),
    "GIF": lambda image: saved(image, "GIF"),
    "BMP": lambda image: saved(image, "BMP"),
    "TIFF": lambda image: saved(image, "TIFF"),
    "TIFF, LZW": lambda image: saved(image, "TIFF", compression="tiff_lzw"),
    "JPEG2000": lambda image: saved(image, "JPEG2000"),
    "PPM": lambda image: saved(image, "PPM"),
    "QOI": lambda image: saved(image, "QOI"),
    "AVIF": lambda image: saved(image, "AVIF", speed=10),
}


@pytest.mark.parametrize("lenient", [False, True])
@pytest.mark.parametrize("kind", WHOLE)
def test_a_truncated_file_is_an_error(
    kind: str, lenient: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Other libraries set this switch for the whole process, and get half a picture over grey.
    monkeypatch.setattr(ImageFile, "LOAD_TRUNCATED_IMAGES", lenient)
    data = WHOLE[kind](picture(60, 40))
    path = tmp_path / "photo"
    path.write_bytes(data)
    assert load_image(path).size == (60, 40)
    for length in range(0, len(data) - 64, max(1, len(data) // 40)):  # the last bytes may be mere trailers
        path.write_bytes(data[:length])
        with pytest.raises(ImageUnreadable, match="photo cannot be read as an image"):
            load_image(path)
    assert lenient == ImageFile.LOAD_TRUNCATED_IMAGES


def test_a_truncated_file_opened_by_the_caller() -> None:
    data = saved(picture(60, 40), "JPEG")
    with pytest.raises(ImageUnreadable, match=r"the given PIL image .*truncated"):
        load_image(Image.open(io.BytesIO(data[: len(data) // 2])))


def test_damaged_files_raise_nothing_else(tmp_path: Path) -> None:
    damage = np.random.default_rng(1)
    path = tmp_path / "photo"
    outcomes = set()
    for kind, save in WHOLE.items():
        whole = save(picture(30, 20))
        for _ in range(0 if kind.startswith("TIFF") else 150):  # libtiff writes to stderr by itself
            data = bytearray(whole)
            for at in damage.integers(0, min(len(data), int(damage.choice([64, 300, len(data)]))), 4):
                data[at] = damage.integers(0, 256)
            path.write_bytes(data)
            try:
                load_image(path)
            except ImageError as error:
                outcomes.add(type(error))
    assert outcomes == {ImageUnreadable, ImageAbsurd}


def test_no_picture(tmp_path: Path) -> None:
    (tmp_path / "empty.jpg").touch()
    (tmp_path / "note.jpg").write_text("a thousand words")
    (tmp_path / "start.jpg").write_bytes(b"\xff\xd8\xff")
    (tmp_path / "link.jpg").symlink_to("elsewhere.jpg")
    for source, reason in (
        (tmp_path / "absent.jpg", "is not there"),
        (str(tmp_path / "absent.jpg"), "is not there"),
        (tmp_path, "Is a directory"),
        (tmp_path / "empty.jpg", "it is empty"),
        (tmp_path / "note.jpg", "no known picture format"),
        (tmp_path / "start.jpg", "its header is damaged"),
        (tmp_path / "link.jpg", "link.jpg is a link to elsewhere.jpg, which is not there"),
        ("a\0b.jpg", "null byte"),
        ("x" * 300, "too long"),
    ):
        with pytest.raises(ImageUnreadable, match=reason):
            load_image(source)


def test_formats_that_run_programs_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "drawing.eps"
    picture(32, 32).save(path)
    with pytest.raises(ImageUnreadable, match="no known picture format"):
        load_image(path)


@pytest.mark.parametrize(("low", "high"), [(-1, 5), (0, 65536)])
def test_integers_outside_16_bits(low: int, high: int) -> None:
    with pytest.raises(ImageUnreadable, match=f"from {low} to {high}"):
        load_image(quarters("I", low, high))


def test_float_images() -> None:
    with pytest.raises(ImageUnreadable, match="range of its float pixels"):
        load_image(Image.new("F", (32, 32)))


def test_a_closed_image() -> None:
    photo = Image.open(io.BytesIO(saved(picture(32, 32), "PNG")))
    photo.close()
    with pytest.raises(ImageUnreadable):
        load_image(photo)


def png_header(width: int, height: int) -> bytes:
    """The first bytes of a PNG, without a single pixel: reading any of them would be another error."""
    header = b"IHDR" + struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    head = b"\x89PNG\r\n\x1a\n" + struct.pack(">I", 13) + header + struct.pack(">I", zlib.crc32(header))
    return head + struct.pack(">I", 1 << 20) + b"IDAT"


@pytest.mark.parametrize(
    ("width", "height", "error", "reason"),
    [
        (1, 1, ImageAbsurd, "1 x 1 pixels; the shorter side needs at least 16"),
        (15, 100, ImageAbsurd, "15 x 100 .*at least 16"),
        (100, 15, ImageAbsurd, "100 x 15 .*at least 16"),
        (16, 16, ImageUnreadable, ""),
        (20000, 20000, ImageAbsurd, "20000 x 20000 .*decoding it takes 3.0 GiB, more than the 1.4"),
        (13694, 13693, ImageAbsurd, "decoding it takes"),  # 8 bytes for each of 187,511,942 pixels
        (13693, 13692, ImageUnreadable, ""),  # 187,484,556
        (321, 16, ImageAbsurd, "321 x 16 .*at most 20 times"),
        (16, 321, ImageAbsurd, "at most 20 times"),
        (320, 16, ImageUnreadable, ""),
    ],
)
def test_absurd_sizes_are_refused_by_the_header(
    width: int, height: int, error: type[ImageError], reason: str, tmp_path: Path, recwarn: pytest.WarningsRecorder
) -> None:
    path = tmp_path / "huge.png"
    path.write_bytes(png_header(width, height))
    with pytest.raises(error, match=f"huge.png .*{reason}"):
        load_image(path)
    assert not recwarn.list


def test_a_size_that_pillow_refuses_itself(tmp_path: Path) -> None:
    # WebP alone: Pillow checks its canvas while it reads the header, and tells the number of pixels only.
    side = (16383 - 1).to_bytes(3, "little")
    path = tmp_path / "huge.webp"
    path.write_bytes(b"RIFF" + struct.pack("<I", 100) + b"WEBPVP8X" + struct.pack("<I", 10) + b"\0" * 4 + side + side)
    with pytest.raises(ImageUnreadable, match="268402689 pixels"):
        load_image(path)


@pytest.mark.parametrize(
    "source",
    [
        Image.new("L", (1, 1)),
        Image.new("L", (16, 321)),
        np.zeros((0, 0, 3), np.uint8),
        np.zeros((0, 0)),
        np.zeros((15, 100)),
        np.broadcast_to(np.uint8(0), (20000, 20000)),
    ],
    ids=lambda source: f"{type(source).__name__}-{getattr(source, 'size', '')}",
)
def test_absurd_images_and_arrays(source: Image.Image | NDArray[Any]) -> None:
    with pytest.raises(ImageAbsurd):
        load_image(source)


def test_nothing_is_printed_and_filters_are_left_alone(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "photo.png"
    path.write_bytes(saved(picture(32, 32), "PNG", exif=exif(6).tobytes()[:-6]))
    with pytest.warns(UserWarning, match="Truncated"), Image.open(path) as image:  # the control: Pillow by itself warns
        image.getexif()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        filters = list(warnings.filters)
        load_image(path)
        assert warnings.filters == filters
    assert not caught
    assert capfd.readouterr() == ("", "")


# --- hash -------------------------------------------------------------------------------------------------------


def test_content_hash(tmp_path: Path) -> None:
    array = RNG.integers(0, 256, (20, 30, 3), np.uint8)
    expected = hashlib.sha256(bytes([30, 0, 0, 0, 20, 0, 0, 0]) + array.tobytes()).hexdigest()
    image = Image.fromarray(array)
    image.save(tmp_path / "a.png")
    image.save(tmp_path / "b.webp", lossless=True)
    for source in (array, image, tmp_path / "a.png", str(tmp_path / "b.webp")):
        assert content_sha256(load_image(source)) == expected
    assert content_sha256(Image.frombytes("RGB", (20, 30), array.tobytes())) != expected
