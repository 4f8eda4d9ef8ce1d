"""What the cuda backend refuses."""

from collections.abc import Sequence
from pathlib import Path

from ...machine.errors import I2LError
from ...machine.wording import command_path, format_path
from ..errors import EnginesError


class CudaGraphsUnusable(EnginesError):
    """The graphs of the cuda backend are absent, or not those of this build."""

    def __init__(self, engines: Path, reason: str) -> None:
        super().__init__(
            f"{format_path(engines)} has no graphs that the cuda backend can use ({reason}): make them with: "
            f"i2l build-engines --models MODELS --engines {command_path(engines)} --backend cuda"
        )


class ProviderMissing(I2LError, RuntimeError):
    """This onnxruntime cannot compute on the device."""

    def __init__(self, provider: str, found: Sequence[str]) -> None:
        super().__init__(
            f"onnxruntime runs without {provider} here (it has {', '.join(found)}): put the GPU build in the place of "
            'the CPU\'s: pip uninstall onnxruntime, then pip install "i2l-engines[cuda]", or use --backend cpu'
        )
