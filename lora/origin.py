"""How a LoRA came about, as its header says it."""

from collections.abc import Sequence
from dataclasses import dataclass

from .lora import joining_weights


@dataclass(frozen=True)
class Origin:
    """The engines behind a LoRA: equal for all that make the same ones, wherever they lie."""

    precision: str
    engines: str
    """The beginning of their content id."""

    def marks(self, images: int, strength: float, weights: Sequence[float] | None) -> dict[str, str]:
        """The metadata of a LoRA of so many images, the images themselves aside."""
        return {
            "i2l.precision": self.precision,
            "i2l.engines": self.engines,
            "i2l.strength": f"{strength:.9g}",
            "i2l.weights": ",".join(f"{weight:.9g}" for weight in joining_weights(weights, images, "image")),
        }
