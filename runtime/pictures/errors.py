"""What is wrong with a picture, or a folder of them."""

from collections.abc import Sequence
from pathlib import Path

from ...machine.errors import I2LError
from ...machine.wording import format_path


class ImageError(I2LError, ValueError):
    """An image cannot be used."""


class NoImages(ImageError):
    """Nothing to read."""

    def __init__(self) -> None:
        super().__init__("no image was given: i2l run PHOTO.jpg --engines DIR --output LORA.safetensors")


class ImageUnreadable(ImageError):
    """The file is absent, truncated or not an image."""

    def __init__(self, name: str, reason: str) -> None:
        super().__init__(f"{name} cannot be read as an image ({reason}): give a whole JPEG, PNG or WebP file")


class ImageMissing(ImageUnreadable, FileNotFoundError):
    """There is no such file, or a link leads to none."""

    def __init__(self, name: str, target: str | None = None) -> None:
        what = f"{name} is not there: check the name and the folder"
        if target is not None:
            what = f"{name} is a link to {target}, which is not there: put the picture there, or remove the link"
        ImageError.__init__(self, what)


class FolderUnreadable(ImageUnreadable, OSError):
    """A folder cannot be looked into."""

    def __init__(self, folder: Path, error: OSError) -> None:
        reason = f"{format_path(folder)} cannot be looked into ({error.strerror or error}): give another folder"
        if isinstance(error, NotADirectoryError):
            reason = f"{format_path(folder)} is a file, not a folder: give a folder, or for single pictures use i2l run"
        elif isinstance(error, FileNotFoundError):
            reason = f"{format_path(folder)} is not there: check the name of the folder"
        ImageError.__init__(self, reason)


class DecoderMissing(ImageError, ImportError):
    """The file is a picture, but the plugin that decodes its format is not installed."""

    def __init__(self, name: str, kind: str, package: str) -> None:
        self.package = package
        super().__init__(f'{name} is a {kind} picture, which needs {package}: pip install "i2l-engines[pictures]"')


class ImagesUnusable(ImageError):
    """Several of the images that were given cannot be used."""

    def __init__(self, errors: Sequence[ImageError], images: int) -> None:
        listed = "\n  ".join(map(str, errors))
        super().__init__(
            f"{len(errors)} of {images} images cannot be used: mend or remove them; none is left out by itself\n"
            f"  {listed}"
        )


class ImageAbsurd(ImageError):
    """The image's size makes no sense as an example picture."""

    def __init__(self, name: str, width: int, height: int, limits: str) -> None:
        super().__init__(f"{name} is {width} x {height} pixels; {limits}: resize or crop it first")


class FolderEmpty(ImageError):
    """A folder was given, but it holds no image, or no folder with images."""

    def __init__(self, folder: Path, suffixes: Sequence[str], *, per_folder: bool = False) -> None:
        lacks = "no folder with images" if per_folder else "no image"
        deeper = "give --per image for its own images" if per_folder else "--recursive looks into folders inside it"
        super().__init__(
            f"{format_path(folder)} holds {lacks}: put pictures there (files that end in {', '.join(suffixes)}); "
            f"{deeper}"
        )
