"""Where ComfyUI keeps what the nodes read and write.

``models/I2L`` and every ``I2L:`` folder of extra_model_paths.yaml are one search path, as for ComfyUI's own model
types. LoRAs go to ``output/loras``, which ComfyUI itself searches for LoRAs, so Load LoRA lists them. Embeddings go to
``user/__i2l``: a portable ComfyUI takes them along, and the search for models, which reads the header of every
safetensors file below ``models/I2L``, does not meet them.
"""

import os
import tempfile
from collections.abc import Iterator
from pathlib import Path
from uuid import uuid4

import folder_paths

from .errors import FilenameRefused, ModelFilesMissing, OutputOutside

KIND = "I2L"
"""The name of the search path, and of the folder under ``models``."""
ADAPTERS = "Z-Image"
"""The folder of the adapters in each of them."""
ENCODERS = "CLIPS"
"""The folder of the encoders."""
DEFAULT_ADAPTER = "Z-Image-i2L.safetensors"
EXTENSION = ".safetensors"
OWN_USER = "__i2l"
"""ComfyUI keeps user folders that begin so out of its HTTP interface (from 0.3.76 on; older ones serve one user)."""


def register_folders() -> None:
    """Tell ComfyUI of ``models/I2L``; what extra_model_paths.yaml named before stays.

    The folders that files go into are made, so that nobody has to type their names; where that cannot be, nobody can
    put files there either.
    """
    home = Path(folder_paths.models_dir) / KIND
    folder_paths.add_model_folder_path(KIND, str(home))
    for name in (ENCODERS, ADAPTERS):
        can_write(home / name)
    _, extensions = folder_paths.folder_names_and_paths[KIND]
    extensions.add(EXTENSION)  # a new kind begins with an empty set, which lets every file through


def model_roots() -> list[Path]:
    """Every folder of the search path, best first."""
    return [Path(path) for path in folder_paths.get_folder_paths(KIND)]


def adapter_names() -> list[str]:
    """The adapter files, relative to their ``Z-Image`` folder."""
    prefix = ADAPTERS + os.sep
    names = folder_paths.get_filename_list(KIND)
    return sorted(name.removeprefix(prefix) for name in names if name.startswith(prefix))


def adapter_path(name: str) -> Path:
    """The file behind a name of :func:`adapter_names`.

    Raises:
        ModelFilesMissing: there is none.
    """
    path = folder_paths.get_full_path(KIND, str(Path(ADAPTERS) / name))
    if path is None:
        raise ModelFilesMissing(["adapter"], model_roots()[0], chosen=name)
    return Path(path).absolute()


def root_of(adapter: Path) -> Path:
    """The folder of the search path that holds an adapter, or the adapter's own folder if it lies elsewhere."""
    return next((root for root in model_roots() if adapter.is_relative_to(root.absolute())), adapter.parent)


def embeddings_folder() -> Path:
    """Where the embeddings of pictures are kept: ``user/__i2l/embeddings``, or where ``$I2L_CACHE_DIR`` says."""
    from ..runtime.cache import FOLDER_VARIABLE, default_cache_folder  # noqa: PLC0415 - starting ComfyUI must not pay

    if os.environ.get(FOLDER_VARIABLE):
        return default_cache_folder()
    return Path(folder_paths.get_user_directory()).absolute() / OWN_USER / "embeddings"


def free_lora_path(filename: str) -> Path:
    """Where a LoRA of this name goes: below ``output/loras``, and under a name that is not taken.

    Args:
        filename: with or without ``.safetensors``; may name subfolders, and ``%year%`` and the like as in Save Image.

    Raises:
        OutputOutside: the name leads out of the folder, or names no file.
        FilenameRefused: the system does not take it, such as one of 300 letters.
    """
    folder = Path(folder_paths.get_output_directory()).resolve() / "loras"
    if "\0" in filename:  # no system takes it, and pathlib's error says nothing
        raise OutputOutside(filename, folder)
    wanted = Path(os.path.normpath(folder / filename.strip().removesuffix(EXTENSION)))
    if not filename.strip() or wanted == folder or not wanted.resolve().is_relative_to(folder.resolve()):
        raise OutputOutside(filename, folder)
    name, place = str(wanted.relative_to(folder)), _loras_folder(folder)
    try:
        subfolder, stem, *_ = folder_paths.get_save_image_path(name, str(place))
        path = next(path for path in _numbered(Path(subfolder), stem) if _is_free(path))
        _is_free(path.with_name(f"{path.name}{'x' * 17}"))  # it is written under a longer name first
    except OSError as error:
        raise FilenameRefused(filename, error.strerror or str(error)) from error
    return path


def _is_free(path: Path) -> bool:
    """Is there no such file? Raises :class:`OSError` where the system does not take the name."""
    try:
        path.lstat()
    except (FileNotFoundError, NotADirectoryError):
        return True
    return False


def _loras_folder(own: Path) -> Path:
    """``output/loras``, or the first folder of LoRAs in ComfyUI's search path that can be written if that cannot."""
    if can_write(own):
        return own
    kinds = folder_paths.folder_names_and_paths
    others = [Path(path).resolve() for path in folder_paths.get_folder_paths("loras")] if "loras" in kinds else []
    return next((folder for folder in others if can_write(folder)), own)


def new_preview() -> tuple[Path, dict[str, str]]:
    """A free file in ComfyUI's temporary folder, and what an output node gives the frontend to show it."""
    folder = Path(folder_paths.get_temp_directory())
    folder.mkdir(parents=True, exist_ok=True)
    name = f"i2l_{uuid4().hex[:12]}.png"
    return folder / name, {"filename": name, "subfolder": "", "type": "temp"}


def shown_path(path: Path) -> str:
    """A path on a node, which has little room: from ComfyUI's ``output`` on, or as a whole if it lies elsewhere."""
    output = Path(folder_paths.get_output_directory()).resolve()
    return path.relative_to(output.parent).as_posix() if path.is_relative_to(output) else str(path)


def engine_folders(home: Path) -> list[Path]:
    """Where engines may be, best first: by the adapter, ``models/I2L``, ``output``, ``user``, other search paths."""
    own = Path(folder_paths.models_dir) / KIND
    output = Path(folder_paths.get_output_directory()).absolute() / "i2l"
    user = Path(folder_paths.get_user_directory()).absolute() / OWN_USER
    return [folder / "engines" for folder in dict.fromkeys((home, own, output, user, *model_roots()))]


def can_write(folder: Path) -> bool:
    """Can files be made in a folder, which is made if it is not there? Tried, as modes do not tell it of shares."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            return True
    except OSError:
        return False


def _numbered(folder: Path, stem: str) -> Iterator[Path]:
    yield folder / f"{stem}{EXTENSION}"
    number = 2
    while True:
        yield folder / f"{stem}_{number:05}{EXTENSION}"
        number += 1
