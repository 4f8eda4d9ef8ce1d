"""What the cpu backend refuses."""

from pathlib import Path

from ...machine.wording import format_path
from ..errors import EnginesError


class CpuPacksUnwritable(EnginesError, OSError):
    """FP8 engines need packs of their own for the CPU, and these cannot be written."""

    def __init__(self, directory: Path, reason: str) -> None:
        super().__init__(
            f"{format_path(directory)} holds fp8 engines, whose packs are converted once for the CPU, but nothing can "
            f"be written there ({reason}): make it writable, or build engines for the CPU elsewhere: "
            "i2l build-engines --models MODELS --engines ENGINES --precision int8"
        )
