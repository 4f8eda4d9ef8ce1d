"""Pictures in ComfyUI's ``input`` folder, read as ``i2l run`` reads files.

ComfyUI's Load Image drops colour profiles, and which formats it reads depends on its version. The rest is as there:
``[output]`` and ``[temp]`` behind a name, nothing outside these folders, and a hash that tells whether a file changed.
"""

import hashlib
from pathlib import Path

from PIL import Image

import folder_paths

from ...machine.files import regular_file_problem
from ...runtime.pictures.errors import DecoderMissing
from ...runtime.pictures.images import load_image
from ...runtime.pictures.listing import images_in
from ..errors import NodePackIncomplete
from ..requirements import install_command


def picture_names() -> list[str]:
    """The pictures of the folder, by name or content, in natural order."""
    folder = Path(folder_paths.get_input_directory())
    return [path.name for path in images_in(folder)[0]] if folder.is_dir() else []


def picture_is_there(name: str) -> bool:
    """Is there a file of this name, inside ComfyUI's folders?"""
    return bool(folder_paths.exists_annotated_filepath(name))


def picture_path(name: str) -> Path:
    """The file behind a name. Raises :class:`ValueError`, as ComfyUI does, if it leads out of ComfyUI's folders."""
    return Path(folder_paths.get_annotated_filepath(name))


def picture_sha256(name: str) -> str:
    """Of the file's bytes: another value, and ComfyUI runs the node again. Empty for a pipe: reading it says why."""
    path = picture_path(name)
    if regular_file_problem(path):
        return ""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def read_picture(name: str, *, ignore_icc: bool) -> Image.Image:
    """Upright, of mode ``RGB``.

    Raises:
        ImageError: it cannot be used.
        NodePackIncomplete: its format needs a package that is not installed.
    """
    try:
        return load_image(picture_path(name), ignore_icc=ignore_icc)
    except DecoderMissing as error:
        raise NodePackIncomplete(f"{error.package} is not installed", install_command([error.package])) from error
