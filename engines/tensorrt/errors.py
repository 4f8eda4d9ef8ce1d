"""What is wrong with a plan."""

from collections.abc import Sequence
from pathlib import Path

from ...machine.wording import command_path, format_path
from ..errors import EnginesError


class PlanMissing(EnginesError, FileNotFoundError):
    """There is no TensorRT plan of a graph for this GPU."""

    def __init__(self, graph: str, engines: Path, flavour: str, sm: int, target: str) -> None:
        super().__init__(
            f"{format_path(engines)} has no TensorRT plan of {graph} for sm{sm}, which {flavour} wants: build it with: "
            f"{_build_plans(engines, target)}"
        )


class PlanStale(EnginesError, ValueError):
    """A TensorRT plan is not the one that is wanted."""

    def __init__(self, path: Path, parts: Sequence[str], engines: Path, target: str) -> None:
        super().__init__(
            f"{format_path(path)} cannot be used ({'; '.join(parts)}): rebuild with: {_build_plans(engines, target)}"
        )


class PlanBuildFailed(EnginesError, RuntimeError):
    """TensorRT refuses a graph."""

    def __init__(self, graph: str, flavour: str, sm: int, reasons: Sequence[str]) -> None:
        said = "; ".join(reason.strip() for reason in reasons) or "it gives no reason"
        super().__init__(
            f"{flavour} makes no plan of {graph} for sm{sm} ({said}): try another --sm or --precision, or use "
            "--backend cpu"
        )


def _build_plans(engines: Path, target: str) -> str:
    return (
        f"i2l build-engines --models MODELS --engines {command_path(engines)} --backend tensorrt --sm {target}, and "
        "--sm for every other card that shall use the directory"
    )
