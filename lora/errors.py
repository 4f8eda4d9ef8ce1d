"""What is wrong with a LoRA, or with the numbers that make one."""

from collections.abc import Mapping, Sequence
from pathlib import Path

from ..machine.errors import I2LError
from ..machine.wording import format_path


class LoraUnreadable(I2LError, ValueError):
    """A file is not a LoRA that i2l understands."""

    def __init__(self, path: Path, reason: str) -> None:
        super().__init__(
            f"{format_path(path)} is not a LoRA that i2l understands ({reason}): i2l inspect says what it is"
        )


class LoraMissing(LoraUnreadable, FileNotFoundError):
    """There is no such file."""

    def __init__(self, path: Path) -> None:
        I2LError.__init__(self, f"{format_path(path)} is not there: check the name and the folder")


class NoLoras(I2LError, ValueError):
    """A folder holds no LoRA."""

    def __init__(self, folder: Path) -> None:
        super().__init__(f"{format_path(folder)} holds no .safetensors file: give LoRA files, or a folder of them")


class LoraNotFinite(I2LError, ValueError):
    """The LoRA holds a value that the file's dtype cannot."""

    def __init__(self, tensor: str, dtype: str) -> None:
        super().__init__(
            f"{tensor} has values that are not finite or too large for {dtype}: try --dtype fp32, and if that fails "
            "too, compare the engines with the checkpoints: i2l verify --models MODELS --engines ENGINES"
        )


class LorasDiffer(I2LError, ValueError):
    """LoRAs change weights of different shapes."""

    def __init__(
        self, first: Path, second: Path, misshapen: Mapping[str, tuple[tuple[int, int], tuple[int, int]]]
    ) -> None:
        name, (left, right) = next(iter(misshapen.items()))
        super().__init__(
            f"{format_path(first)} and {format_path(second)} are not for the same model ({name} changes a weight of "
            f"{list(left)} in one and of {list(right)} in the other): give LoRAs of one diffusion model"
        )


class LorasForOthers(I2LError, ValueError):
    """LoRAs are for different diffusion models."""

    def __init__(self, first: Path, second: Path, left: str, right: str) -> None:
        super().__init__(
            f"{format_path(first)} is for {left}, {format_path(second)} for {right}: give LoRAs of one diffusion model"
        )


class LoraNotASum(I2LError, ValueError):
    """The adapter is of a kind whose change is no product of two factors."""

    def __init__(self, path: Path, kinds: Sequence[str]) -> None:
        kind = " and ".join(kinds)
        super().__init__(
            f"{format_path(path)} is {kind}: its change is not a plain B @ A, so it has no exact sum with others; load "
            "it by itself, beside the merged LoRA"
        )


class LoraNamesUnknown(I2LError, ValueError):
    """Modules are written with underscores, and which of them are dots is not known."""

    def __init__(self, path: Path, modules: Sequence[str], key_format: str) -> None:
        super().__init__(
            f"{format_path(path)} names {len(modules)} modules with underscores for a model that i2l does not know, "
            f"such as {modules[0]}, so they cannot be written as {key_format}: give a LoRA for "
            "Z-Image, Qwen-Image or FLUX.1"
        )


class StrengthInvalid(I2LError, ValueError):
    """A strength or a weight is not a finite number."""

    def __init__(self, name: str, value: float) -> None:
        super().__init__(f"{name} is {value}, but it must be a finite number: give one such as 0.7")


class WeightsMismatch(I2LError, ValueError):
    """There is not one weight for each thing that is joined."""

    def __init__(self, weights: int, things: int, noun: str) -> None:
        super().__init__(
            f"{weights} weight{'s' * (weights != 1)} for {things} {noun}{'s' * (things != 1)}: give one weight for "
            "each, in the same order, or none for equal ones"
        )
