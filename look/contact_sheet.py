"""Which pictures a LoRA was made from: its header names them by their content, as a path would leak."""

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from PIL import Image

from ..lora.reading import LoraFile
from ..runtime.pictures.errors import ImageError
from ..runtime.pictures.images import load_image
from ..runtime.pictures.pixels import content_sha256
from ..runtime.pictures.sources import ICC_KEY, IMAGES_KEY, colours_mark

SIZE = (512, 512)


def pictures_of(files: Sequence[LoraFile], images: Iterable[Path]) -> Mapping[Path, list[Image.Image]]:
    """``LoRA -> its pictures``, made small, in its header's order; those that are not among ``images`` are missing.

    Every image is decoded, one at a time; what cannot be read was no input of a LoRA, so it is passed over.
    """
    wanted = {file.path: file.lora.metadata.get(IMAGES_KEY, "").split(",") for file in files}
    ignoring = colours_mark(ignore_icc=True)[ICC_KEY]
    kinds = {file.lora.metadata.get(ICC_KEY) == ignoring for file in files if file.lora.metadata.get(IMAGES_KEY)}
    hashes = {name for names in wanted.values() for name in names}
    found: dict[str, Image.Image] = {}
    for path in images:
        for ignore_icc in kinds:
            try:
                picture = load_image(path, ignore_icc=ignore_icc)
            except ImageError:
                continue
            if (name := content_sha256(picture)) in hashes:
                picture.thumbnail(SIZE)
                found[name] = picture
    return {path: [found[name] for name in names if name in found] for path, names in wanted.items()}
