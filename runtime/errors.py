"""What is wrong with an opened pipeline."""

from pathlib import Path

from ..engines.errors import EnginesError
from ..machine.wording import format_path


class PipelineClosed(EnginesError, RuntimeError):
    """A pipeline is used after it was closed."""

    def __init__(self, directory: Path) -> None:
        super().__init__(
            f"the pipeline of {format_path(directory)} is closed: open a new one with: "
            f"i2l.open_engines({str(directory)!r})"
        )


class EnginesReplaced(EnginesError, RuntimeError):
    """The CPU would have to go on with fp8 engines that a rebuild has removed."""

    def __init__(self, directory: Path, backend: str) -> None:
        super().__init__(
            f"{backend} ran out of memory, and {format_path(directory)} was rebuilt since it was opened, so the CPU "
            f"cannot go on with the same fp8 engines: open it again with: i2l.open_engines({str(directory)!r})"
        )
