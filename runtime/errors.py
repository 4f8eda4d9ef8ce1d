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


class EmbeddingNotFinite(EnginesError, ValueError):
    """What was computed holds NaN or infinity: nothing is kept or saved."""

    def __init__(self, what: str, values: int) -> None:
        super().__init__(
            f"{what} gave {values} value{'s' * (values != 1)} that are NaN or infinite, so no LoRA is made: look at "
            "the engines with: i2l doctor --engines ENGINES --full, and compare them: i2l verify"
        )


class PipelineBusy(EnginesError, RuntimeError):
    """Two threads use one pipeline."""

    def __init__(self, directory: Path) -> None:
        super().__init__(
            f"the pipeline of {format_path(directory)} is at work in another thread: wait for it, or open one for each "
            "thread"
        )


class PipelineInChild(EnginesError, RuntimeError):
    """A pipeline is used in a process that was forked after it was opened."""

    def __init__(self, directory: Path) -> None:
        super().__init__(
            f"the pipeline of {format_path(directory)} was opened in the process that this one was forked from, whose "
            f"threads it needs: open one here with: i2l.open_engines({str(directory)!r})"
        )


class PipelineNotPicklable(EnginesError, TypeError):
    """A pipeline is sent to another process."""

    def __init__(self, directory: Path) -> None:
        super().__init__(
            "a pipeline is open files and sessions, which no other process can take over: open one there with: "
            f"i2l.open_engines({str(directory)!r})"
        )
