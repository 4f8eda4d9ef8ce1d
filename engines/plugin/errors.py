"""What plugin providers refuse, and how they fail."""

from pathlib import Path

from ...machine.errors import I2LError
from ...machine.wording import format_path
from ..errors import EnginesError

PRECISIONS = ("int8", "fp32")
"""Of packs that they run."""


class PluginGraphsMissing(EnginesError):
    """An engines directory has no graphs for plugin providers."""

    def __init__(self, engines: Path, precision: str) -> None:
        made = precision in PRECISIONS
        reason = "an older i2l built it" if made else f"its packs are {precision}, they run {' and '.join(PRECISIONS)}"
        super().__init__(
            f"{format_path(engines)} has no graphs for plugin providers ({reason}): rebuild with: "
            f"i2l build-engines --models MODELS --engines {format_path(engines)}{'' if made else ' --precision int8'}"
            ", or use --backend cpu"
        )


class ProviderFailed(I2LError, RuntimeError):
    """The provider or its driver failed, and not for lack of memory."""

    def __init__(self, backend: str, card: str, reason: str) -> None:
        super().__init__(f"backend {backend} failed on {card}: {reason}: use --backend cpu, or renew the card's driver")
