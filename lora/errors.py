"""What is wrong with a LoRA, or with the numbers that make one."""

from collections.abc import Mapping, Sequence
from pathlib import Path

from ..machine.errors import I2LError
from ..machine.wording import format_path


class LoraUnreadable(I2LError, ValueError):
    """A file is not a LoRA that i2l understands."""

    def __init__(self, path: Path, reason: str) -> None:
        super().__init__(f"{format_path(path)} is not a LoRA that i2l understands ({reason})")


class LoraNotFinite(I2LError, ValueError):
    """The LoRA holds a value that the file's dtype cannot."""

    def __init__(self, tensor: str, dtype: str) -> None:
        super().__init__(
            f"{tensor} has values that are not finite or too large for {dtype}: try --dtype fp32, and if that fails "
            "too, compare the engines with the checkpoints: i2l verify --models MODELS --engines ENGINES"
        )


class LorasDiffer(I2LError, ValueError):
    """LoRAs do not change the same modules, or not of the same shape."""

    def __init__(
        self,
        first: Path,
        second: Path,
        only_first: Sequence[str],
        only_second: Sequence[str],
        misshapen: Mapping[str, tuple[tuple[int, int], tuple[int, int]]],
    ) -> None:
        parts = [
            f"{len(modules)} module{'s' * (len(modules) != 1)} only in {path.name}, such as {modules[0]}"
            for path, modules in ((first, only_first), (second, only_second))
            if modules
        ]
        if misshapen:
            name, (left, right) = next(iter(misshapen.items()))
            parts.append(f"{name} changes a weight of {list(left)} in one and of {list(right)} in the other")
        super().__init__(
            f"{format_path(first)} and {format_path(second)} do not change the same modules ({'; '.join(parts)}): "
            "give LoRAs of one diffusion model, made with all its modules"
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
