"""What is wrong with a checkpoint."""

from collections.abc import Mapping, Sequence
from pathlib import Path

from ...machine.errors import I2LError
from ...machine.wording import command_path, format_path, some
from ...specs import DiffusionModel, Family

TITLES: Mapping[Family, str] = {"siglip2": "SigLIP2-G384", "dinov3": "DINOv3-7B", "adapter": "an i2L adapter"}
"""How people call the three models."""


class CheckpointError(I2LError):
    """A checkpoint cannot be used."""

    family: Family | None = None
    """Which model the file looks like, where that can be told."""


class CheckpointMissing(CheckpointError, FileNotFoundError):
    """No file under the models directory is one of the wanted models; what is there instead is named."""

    def __init__(
        self,
        families: Sequence[Family],
        models: Path,
        damaged: Sequence[CheckpointError] = (),
        strangers: Sequence["CheckpointForeign"] = (),
        *,
        empty: bool = False,
    ) -> None:
        self.families, self.damaged = tuple(families), tuple(damaged)
        files = "".join(f"{error}; " for error in damaged)
        seen = some([f"{s.path.name} is {s.what or 'another model'}" for s in strangers], shown=4)
        # Who has one real checkpoint must not be led to random ones.
        synthetic = f", or try synthetic ones with: i2l make-checkpoints {command_path(models)} --preset tiny"
        super().__init__(
            f"{files}no checkpoint for {' and '.join(families)} under {format_path(models)}"
            f"{f' ({seen})' if seen else ''}: download it there (README, 'Real checkpoints')"
            f"{synthetic if empty else ''}"
        )


class FolderInUse(CheckpointError, FileExistsError):
    """Synthetic checkpoints do not go where there are others."""

    def __init__(self, directory: Path, found: Path) -> None:
        super().__init__(
            f"{format_path(directory)} holds {format_path(found)}, which is no synthetic checkpoint: give a folder of "
            "its own to make-checkpoints"
        )


class CheckpointUnreadable(CheckpointError, ValueError):
    """The file is not a whole safetensors file."""

    def __init__(self, path: Path, reason: str, family: Family | None = None) -> None:
        self.family = family
        super().__init__(
            f"{format_path(path)} is not a whole safetensors file ({reason}), such as half of a download: "
            "download it again"
        )


class CheckpointLocked(CheckpointError, OSError):
    """The system does not let this user read the file."""

    def __init__(self, path: Path, reason: str) -> None:
        super().__init__(f"{format_path(path)} cannot be read ({reason}): let this user read it")


class CheckpointForeign(CheckpointError, ValueError):
    """The file's tensors belong to no model that i2l knows."""

    def __init__(self, path: Path, tensors: int, what: str = "", family: Family | None = None) -> None:
        self.path, self.what, self.family = path, what, family
        seems = f" ({what})" if what else ""
        super().__init__(
            f"{format_path(path)} holds {tensors} tensors of a model that i2l does not know{seems}: it needs "
            "SigLIP2-G384, DINOv3-7B and Z-Image-i2L (README, 'Real checkpoints')"
        )


class CheckpointOfAnotherKind(CheckpointError, ValueError):
    """The one file that was named is another of the three models."""

    def __init__(self, path: Path, kind: Family, wanted: Family) -> None:
        self.family, self.kind = kind, kind
        super().__init__(
            f"{format_path(path)} is {TITLES[kind]}, not {TITLES[wanted]}: name the file of {TITLES[wanted]}"
        )


class CheckpointIncomplete(CheckpointError, FileNotFoundError):
    """A checkpoint is in several files, and some of them are not there."""

    def __init__(self, folder: Path, missing: Sequence[str], count: int) -> None:
        super().__init__(
            f"{format_path(folder)} holds a checkpoint in {count} shards, of which {some(missing)} "
            f"{'is' if len(missing) == 1 else 'are'} missing: download the rest there"
        )


class CheckpointMismatch(CheckpointError, ValueError):
    """The file is nearly a known model, but some tensors are missing, unexpected or misshapen."""

    def __init__(
        self,
        path: Path,
        family: Family,
        missing: Sequence[str],
        unexpected: Sequence[str],
        misshapen: Mapping[str, tuple[tuple[int, ...], tuple[int, ...]]],
        wrong_dtype: Mapping[str, str],
    ) -> None:
        self.family = family
        differences = {
            "missing": missing,
            "unexpected": unexpected,
            "misshapen": [f"{k} is {list(found)}, not {list(wanted)}" for k, (found, wanted) in misshapen.items()],
            "neither F32, F16 nor BF16": [f"{name} is {dtype}" for name, dtype in wrong_dtype.items()],
        }
        parts = (f"{what}: {some(items)}" for what, items in differences.items() if items)
        remedy = "give the published file, or a copy in F32, F16, BF16 or FP8 (README, 'Checkpoints')"
        if missing:  # what is there is whole: a second download of the same file would change nothing
            remedy = "this is a part of it: give the whole published file, or all of its shards in one folder"
        super().__init__(f"{format_path(path)} looks like {family}, but {'; '.join(parts)}: {remedy}")


class CheckpointNotFinite(CheckpointError, ValueError):
    """Weights are no numbers, or too large to be stored: every picture would give the same LoRA, or none."""

    def __init__(self, path: Path, step: str, wrong: Mapping[str, int]) -> None:
        tensors = [f"{name} ({count} value{'s' * (count != 1)})" for name, count in wrong.items()]
        what = (
            f"is NaN or infinite in {some(tensors)}" if wrong else f"has weights in {step} that are too large to store"
        )
        super().__init__(f"{format_path(path)} {what}: download it again")


class CheckpointAmbiguous(CheckpointError, ValueError):
    """Two files under the models directory hold the same model with different specs."""

    def __init__(self, family: str, paths: Sequence[Path]) -> None:
        super().__init__(
            f"{len(paths)} checkpoints are {family}: {', '.join(format_path(p) for p in paths)}: keep one of them "
            "under the models directory"
        )


class CheckpointsUnfit(CheckpointError, ValueError):
    """The adapter was made for other encoders."""

    def __init__(self, adapter: Path, embedding: int, siglip2: int, dinov3: int) -> None:
        super().__init__(
            f"{format_path(adapter)} takes embeddings of {embedding} values, but siglip2 and dinov3 give {siglip2} + "
            f"{dinov3} = {siglip2 + dinov3}: put three checkpoints that belong together under the models directory"
        )


class AdapterAmbiguous(CheckpointError, ValueError):
    """The adapters of several diffusion models lie under the models directory."""

    def __init__(self, paths: Mapping[DiffusionModel, Path]) -> None:
        listed = ", ".join(f"{format_path(path)} (for {model})" for model, path in paths.items())
        super().__init__(
            f"there are adapters for several diffusion models: {listed}: choose one with --adapter "
            f"{next(iter(paths))}; each needs an engines directory of its own"
        )
