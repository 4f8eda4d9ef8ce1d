"""Colours as a person sees them: the profile that a picture carries, applied.

A profile says what the numbers mean. Those of phones (Display P3), cameras (Adobe RGB, ProPhoto), printers (CMYK) and
scanners (grey) are converted to sRGB, relative colorimetric, by littleCMS. A profile that is sRGB itself, whatever it
is called, changes nothing to the bit. The original ignores profiles, which moves a LoRA by 10 to 14 %.
"""

import io
import logging

import numpy as np
from PIL import Image, ImageCms

log = logging.getLogger(__name__)
MODES = {"RGB": "RGB", "GRAY": "L", "CMYK": "CMYK"}
"""The mode of a picture that a profile of each colour space is for."""
SRGB_SLACK = 2
"""Steps of 8 bits by which a profile may differ from sRGB and still be it: sRGB profiles round in their own ways."""
INTENT = ImageCms.Intent.RELATIVE_COLORIMETRIC


class Profile:
    """A profile that can be applied.

    Raises:
        ImageCms.PyCMSError, OSError: it is broken.
        ValueError: it is of a kind that pictures do not have.
    """

    def __init__(self, data: bytes) -> None:
        if not data:
            raise ValueError("it is damaged or too long")
        self._opened = ImageCms.ImageCmsProfile(io.BytesIO(data))
        space = self._opened.profile.xcolor_space.strip()
        if space not in MODES:
            raise ValueError(f"its colour space is {space}")
        self.mode = MODES[space]
        """Of the pictures that it is for."""
        srgb = ImageCms.createProfile("sRGB")
        self._transform = ImageCms.buildTransform(self._opened, srgb, self.mode, "RGB", INTENT)
        self.is_srgb = self._is_srgb()

    def apply(self, image: Image.Image) -> Image.Image:
        """The picture in sRGB, mode ``RGB``."""
        converted = ImageCms.applyTransform(image, self._transform)
        assert converted is not None  # only in place is there none
        return converted

    def _is_srgb(self) -> bool:
        if self.mode == "CMYK":
            return False
        if self.mode == "L":
            probe = Image.fromarray(np.arange(256, dtype=np.uint8).reshape(16, 16))
        else:
            steps = np.linspace(0, 255, 18).round().astype(np.uint8)
            grid = np.stack(np.meshgrid(steps, steps, steps), -1).reshape(18 * 18, 18, 3)
            probe = Image.fromarray(np.ascontiguousarray(grid))
        seen = np.asarray(self.apply(probe), np.int16)
        return int(np.abs(seen - np.asarray(probe.convert("RGB"), np.int16)).max()) <= SRGB_SLACK


def usable_profile(data: bytes | None, mode: str, name: str) -> Profile | None:
    """The profile of a picture, None if there is nothing to convert; one that cannot be used is said and ignored.

    Args:
        data: the profile; None for none, empty for one that could not be unpacked.
        mode: of the picture.
        name: of the picture, for what is said.
    """
    if data is None or mode == "LAB":  # Lab needs no profile to say what it means
        return None
    try:
        profile = Profile(data)
    except (ImageCms.PyCMSError, OSError, ValueError, TypeError) as error:
        log.warning("%s: its colour profile is ignored (%s); the colours are taken for sRGB", name, error)
        return None
    fits = mode == "CMYK" if profile.mode == "CMYK" else mode != "CMYK"
    if profile.mode == "L":
        fits = mode in {"1", "L", "LA", "La"} or mode.startswith("I")
    if not fits:
        log.warning(
            "%s: its colour profile is ignored (it is for %s pictures, this one is %s)", name, profile.mode, mode
        )
        return None
    return None if profile.is_srgb else profile
