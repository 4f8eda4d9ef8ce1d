"""What is wrong in ComfyUI."""

from collections.abc import Mapping, Sequence
from pathlib import Path

from ..export.checkpoints.errors import CheckpointError, CheckpointMissing
from ..machine.errors import I2LError
from ..machine.wording import format_path
from ..specs import Family

_ENCODERS, _ADAPTER = "DiffSynth-Studio/General-Image-Encoders/blob/main", "DiffSynth-Studio/Z-Image-i2L/blob/main"
MODEL_FILES: Mapping[Family, tuple[str, str]] = {
    "siglip2": ("CLIPS/SigLIP2-G384.safetensors", f"huggingface.co/{_ENCODERS}/SigLIP2-G384/model.safetensors"),
    "dinov3": ("CLIPS/DINOv3-7B.safetensors", f"huggingface.co/{_ENCODERS}/DINOv3-7B/model.safetensors"),
    "adapter": ("Z-Image/Z-Image-i2L.safetensors", f"huggingface.co/{_ADAPTER}/model.safetensors"),
}
"""Where a checkpoint goes below ``models/I2L`` (it may be called anything), and where it comes from."""


class NodePackIncomplete(I2LError, ImportError):
    """A package that the ComfyUI nodes need is not in ComfyUI's Python, or is too old."""

    def __init__(self, reason: str, command: str) -> None:
        super().__init__(
            f"{reason} in ComfyUI's Python: close ComfyUI, run this in a terminal and start it again:\n{command}"
        )


class ModelFilesMissing(CheckpointMissing):
    """Checkpoints are not in ComfyUI's folders: which files, where to, where from."""

    def __init__(
        self, families: Sequence[Family], root: Path, damaged: Sequence[CheckpointError] = (), chosen: str = ""
    ) -> None:
        super().__init__(families, root, damaged)
        seen = f"{chosen} is not there; " if chosen else "".join(f"{error}; " for error in damaged)
        wanted = "; ".join(f"put {source} to {root / name}" for name, source in map(MODEL_FILES.__getitem__, families))
        self.args = (f"{seen}no checkpoint for {' and '.join(families)} under {root}: {wanted}",)


class AdapterUnfit(CheckpointError, ValueError):
    """The file that the Loader names is something else."""

    def __init__(self, path: Path, what: str) -> None:
        super().__init__(
            f"{path.name} in {path.parent} is {what}, not Z-Image-i2L: choose another file in Z-Image i2L Loader, and "
            "keep this one elsewhere"
        )


class OutputOutside(I2LError, ValueError):
    """A file name leads out of the folder that it belongs in."""

    def __init__(self, filename: str, folder: Path) -> None:
        super().__init__(
            f"{filename!r} is no name of a file below {format_path(folder)}: give a name such as style or "
            "portraits/style, without .. and not beginning with a slash or a drive"
        )


class LoraDataForeign(I2LError, ValueError):
    """What reached the save node holds no factors."""

    def __init__(self, tensors: int) -> None:
        super().__init__(
            f"lora_data holds no LoRA ({tensors} entries, no pair of lora_A and lora_B): connect the lora_data output "
            "of Z-Image i2L Apply"
        )


class ImagesUnfit(I2LError, ValueError):
    """What reached the images input is no batch of pictures."""

    def __init__(self, reason: str, remedy: str) -> None:
        super().__init__(f"images {reason}: {remedy}")


class FilenameRefused(I2LError, OSError):
    """The system does not take a file name."""

    def __init__(self, filename: str, reason: str) -> None:
        super().__init__(
            f"the filename {filename[:24]}... of {len(filename)} letters cannot be used ({reason}): give a shorter or "
            "simpler one"
        )


class NoPlaceForEngines(I2LError, OSError):
    """None of ComfyUI's folders can be written."""

    def __init__(self, folders: Sequence[Path]) -> None:
        listed = ", ".join(map(format_path, folders))
        super().__init__(
            f"engines can be written to none of {listed}: make one of them writable, or name a writable I2L folder in "
            "extra_model_paths.yaml"
        )


class LoraNotApplied(I2LError, RuntimeError):
    """ComfyUI put only a part of a LoRA on a model, or nothing."""

    def __init__(self, applied: int, modules: int) -> None:
        super().__init__(
            f"only {applied} of the LoRA's {modules} modules fit the model: connect a Z-Image model, and update "
            "ComfyUI if it is older than 0.3.76 (December 2025)"
        )
