"""What a build for a backend refuses."""

from ...engines.errors import EnginesError


class PrecisionUnsupported(EnginesError, ValueError):
    """A generation of GPUs cannot compute in the precision of the packs."""

    def __init__(self, sm: int, precision: str, instead: str) -> None:
        super().__init__(
            f"sm{sm} cannot compute with {precision} packs: leave --precision out, or give --precision {instead}"
        )
