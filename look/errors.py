"""What cannot be looked at."""

from collections.abc import Sequence
from pathlib import Path

from ..engines.errors import EnginesError
from ..machine.errors import I2LError
from ..machine.wording import command_path, format_path, some


class NothingToInspect(I2LError, ValueError):
    """The path is neither a checkpoint, nor an engines directory, nor a LoRA; ``what`` it is, if that can be told."""

    def __init__(self, path: Path, what: str = "neither a checkpoint, nor an engines directory, nor a LoRA") -> None:
        super().__init__(
            f"{format_path(path)} is {what}: give a checkpoint, an engines directory, a LoRA, or a folder of them"
        )


class TraceUnreadable(I2LError, ValueError):
    """A file is not a trace."""

    def __init__(self, path: Path, reason: str) -> None:
        super().__init__(
            f"{format_path(path)} is not a trace ({reason}): make one with: i2l run ... --trace {command_path(path)}"
        )


class EnginesOfOtherCheckpoints(EnginesError, ValueError):
    """The engines were built from checkpoints of another architecture."""

    def __init__(self, directory: Path, models: Path, family: str) -> None:
        super().__init__(
            f"{format_path(directory)} was built for another {family} than the one under {format_path(models)}: give "
            f"the checkpoints it was built from, or rebuild with: i2l build-engines --models {command_path(models)} "
            f"--engines {command_path(directory)}"
        )


class EnginesWrong(EnginesError, ValueError):
    """Engines make another LoRA than their checkpoints."""

    def __init__(self, worst: float, bound: float) -> None:
        super().__init__(
            f"the LoRA of these engines is off by {worst:.2g}, {bound:g} is allowed: give the --models that they were "
            "built from, rebuild them with: i2l build-engines ... --force, or try --backend cpu"
        )


class ComparisonNotFinite(EnginesError, ValueError):
    """Engines and reference cannot be compared: one of them computes what is no number."""

    def __init__(self, steps: Sequence[str]) -> None:
        super().__init__(
            f"the comparison gives no number in {some(steps)}: the checkpoints or the engines hold NaN or infinity; "
            "download the checkpoints again, and rebuild with: i2l build-engines ... --force"
        )
