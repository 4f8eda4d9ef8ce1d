"""LoRA files: factors to a safetensors file that every loader reads.

``comfyui`` keys, ``diffusion_model.<module>.lora_A.weight``, are the one form that ComfyUI (also before 2026),
diffusers and DiffSynth all load. ``diffsynth`` is what the original node saved: newer ComfyUI loads it, older ones load
nothing. There is no alpha key, which means scale 1.0 everywhere; DiffSynth warns about one, and diffusers refuses some.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal, TypeAlias

import numpy as np
from numpy.typing import NDArray

from ..engines.base import Array
from ..engines.directory.tensorfile import LayoutWriter, plan_layout
from ..machine.files import remove_leftovers
from ..machine.outputs import output_path
from ..specs import DiffusionModel
from .errors import LoraNotFinite, StrengthInvalid, WeightsMismatch
from .keys import AnyKeyFormat, written_keys
from .names import diffusion_model
from .replacing import LORA

Dtype: TypeAlias = Literal["bf16", "fp16", "fp32"]
MODEL_METADATA: Mapping[DiffusionModel, dict[str, str]] = {
    "z-image": {
        "modelspec.architecture": "Z-Image/lora",
        "modelspec.implementation": "https://github.com/Tongyi-MAI/Z-Image",
        "ss_base_model_version": "zimage",
    },
    "qwen-image": {
        "modelspec.architecture": "Qwen-Image/lora",
        "modelspec.implementation": "https://github.com/QwenLM/Qwen-Image",
        "ss_base_model_version": "qwen_image",
    },
}
"""How LoRA managers tell which diffusion model a LoRA is for."""
CLAIMS = tuple(MODEL_METADATA["z-image"])
DTYPES: Mapping[Dtype, str] = {"bf16": "BF16", "fp16": "F16", "fp32": "F32"}


@dataclass
class Lora:
    """The factors of every target linear: the change of a weight is ``B @ A``."""

    factors: Mapping[str, tuple[Array, Array]]
    """``module -> (A [rank, in_features], B [out_features, rank])``, float32."""
    metadata: dict[str, str] = field(default_factory=dict)

    @property
    def rank(self) -> int:
        a, _ = next(iter(self.factors.values()))
        return int(a.shape[0])

    @property
    def shapes(self) -> dict[str, tuple[int, int]]:
        """``module -> [out, in]`` of the weight that it changes."""
        return {module: (b.shape[0], a.shape[1]) for module, (a, b) in self.factors.items()}

    def save(
        self, path: Path | str, *, dtype: Dtype = "bf16", key_format: AnyKeyFormat = "comfyui", force: bool = False
    ) -> Path:
        """Write the file, whole or not at all. What it is for is read from its modules if the metadata does not say.

        A LoRA that i2l wrote is replaced, another one with ``force``, and nothing else.

        Raises:
            OutputMisnamed: the name does not end in ``.safetensors``.
            OutputTaken: something is there that is not replaced.
            OutputUnwritable, DiskFull: nothing is left half written.
            LoraNotFinite: a value is not finite, or beyond what ``dtype`` holds.
        """
        path = Path(path).expanduser()
        tensors = {
            key: factor
            for module, pair in self.factors.items()
            for key, factor in zip(written_keys(key_format, module), pair, strict=True)
        }
        if key_format == "kohya":  # its loaders divide by the rank
            names = (key.removesuffix("lora_down.weight") for key in tensors if key.endswith("lora_down.weight"))
            tensors |= {f"{name}alpha": np.array(self.rank, np.float32) for name in list(names)}
        claims = {} if self.metadata.keys() & set(CLAIMS) else model_metadata(diffusion_model(self.shapes))
        layout = plan_layout(
            ((name, DTYPES[dtype], factor.shape) for name, factor in tensors.items()),
            file_metadata(path.stem, self.rank) | {"i2l.dtype": dtype} | claims | self.metadata,
        )
        remove_leftovers(path.parent)
        with output_path(path, LORA, force=force) as temporary, LayoutWriter(temporary, layout) as writer:
            for name, factor in tensors.items():
                writer.write(name, converted(name, factor, dtype).tobytes())
        return path


@dataclass(frozen=True)
class Origin:
    """The engines behind a LoRA, as its header says: equal for all that make the same ones, wherever they lie."""

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


def factors_by_module(step: str, outputs: Mapping[str, Array]) -> dict[str, tuple[Array, Array]]:
    """``module -> (A, B)`` from an adapter step's outputs ``<target>.A`` and ``<target>.B``."""
    _, component, index, _ = step.split(".")
    targets = [name.removesuffix(".A") for name in outputs if name.endswith(".A")]
    return {f"{component}.{int(index)}.{t}": (outputs[f"{t}.A"], outputs[f"{t}.B"]) for t in targets}


def lora_from_factors(
    factors: Mapping[str, tuple[Array, Array]], strength: float = 1.0, weights: Sequence[float] | None = None
) -> Lora:
    """Join the factors of several images into one LoRA: the weighted sum of their ``B @ A``, times ``strength``.

    Strength and weights multiply A alone, before the ranks are joined: multiplying both factors, as the original does,
    squares them, and averaging A and B each by itself is not the average of ``B @ A``.

    Args:
        factors: ``module -> (A [images, rank, in], B [images, out, rank])``.
        strength: linear.
        weights: one per image, taken as they are; by default ``1 / images`` each, which gives the mean.

    Raises:
        StrengthInvalid, WeightsMismatch: a number is not finite, or there is not one weight per image.
    """
    images = len(next(iter(factors.values()))[0])
    gains = joining_weights(weights, images, "image") * require_finite("strength", strength)
    joined = {}
    for module, (a, b) in factors.items():
        _, rank, in_features = a.shape
        flat_a = (a * gains.astype(np.float32)[:, None, None]).reshape(images * rank, in_features)
        joined[module] = (flat_a, np.ascontiguousarray(b.transpose(1, 0, 2)).reshape(b.shape[1], images * rank))
    return Lora(joined)


def joining_weights(weights: Sequence[float] | None, count: int, noun: str) -> NDArray[np.float64]:
    """The weights of ``count`` things that are joined, ``1 / count`` each if none are given.

    Raises:
        StrengthInvalid, WeightsMismatch: a number is not finite, or there is not one for each.
    """
    if weights is None:
        return np.full(count, 1 / count)
    if len(weights) != count:
        raise WeightsMismatch(len(weights), count, noun)
    return np.array([require_finite(f"weight {index}", value) for index, value in enumerate(weights, 1)])


def require_finite(name: str, value: float) -> float:
    """``value``; raises :class:`StrengthInvalid` if it is infinite or not a number."""
    if not math.isfinite(value):
        raise StrengthInvalid(name, value)
    return float(value)


def model_metadata(model: str | None) -> dict[str, str]:
    """The claims for a diffusion model; none for one that is unknown or that i2l has no words for."""
    return dict(next((claims for name, claims in MODEL_METADATA.items() if name == model), {}))


def file_metadata(title: str, rank: int) -> dict[str, str]:
    """What LoRA managers and loaders look for. Source paths stay out: they say more about a user than they should."""
    title = title.encode("utf-8", "replace").decode()  # a file name may hold bytes that are no text
    return {
        "format": "pt",
        "modelspec.sai_model_spec": "1.0.0",
        "modelspec.title": title,
        "modelspec.date": datetime.now(UTC).strftime("%Y-%m-%d"),
        "modelspec.resolution": "1024x1024",
        "ss_network_module": "networks.lora",
        "ss_network_dim": str(rank),
        "ss_network_alpha": str(rank),
        "ss_output_name": title,
    }


def converted(name: str, values: Array, dtype: Dtype) -> NDArray[Any]:
    """Values in the file's dtype; bfloat16 as its 16 bits, as numpy does not know it.

    Raises:
        LoraNotFinite: a value is not finite, or beyond what ``dtype`` holds.
    """
    result: NDArray[Any]
    if dtype == "bf16":
        result = bfloat16_bits(values)
        finite = np.isfinite(values) & (result & 0x7F80 != 0x7F80)  # the largest float32 values round to infinity
    else:
        with np.errstate(over="ignore"):
            result = values.astype(np.float16 if dtype == "fp16" else np.float32)
        finite = np.isfinite(result)
    if not finite.all():
        raise LoraNotFinite(name, dtype)
    return result


def bfloat16_bits(values: Array) -> NDArray[np.uint16]:
    """The upper half of each float32, rounded to nearest, ties to even."""
    bits = np.ascontiguousarray(values, np.float32).view(np.uint32)
    return ((bits + (0x7FFF + ((bits >> 16) & 1))) >> 16).astype(np.uint16)
