"""How far is a LoRA from the float32 one: this project's precisions, and the original's path, on the same checkpoints?

The original stores matrices as unscaled FP8 e4m3 and computes in bfloat16; its path is this project's float32 reference
with those two changes (matrices alone are stored so here, norms and biases stay: kinder than the original, which wraps
whole modules). Prints one JSON line per path. Usage:
python benchmarks/fidelity.py --models DIR --engines DIR [DIR...] --image FILE
"""

import argparse
import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch

from i2l.engines.base import Array
from i2l.export.checkpoints.finding import find_checkpoints
from i2l.export.checkpoints.recognise import Checkpoint
from i2l.export.reference import reference_steps
from i2l.look.verification import lora_errors, step_error
from i2l.lora.lora import Lora, factors_by_module, lora_from_factors
from i2l.runtime.passes import ENCODERS
from i2l.runtime.pipeline import Pipeline
from i2l.specs import Family


@dataclass(frozen=True)
class Outcome:
    """What one path gave."""

    tokens: Mapping[Family, Array]
    """Hidden states behind the last block, ``[1, T, D]``."""
    embeddings: Mapping[Family, Array]
    lora: Lora


@dataclass(frozen=True)
class Fidelity:
    """Relative errors against float32."""

    path: str
    siglip2: float
    siglip2_worst_token: float
    dinov3: float
    dinov3_worst_token: float
    lora_median: float
    lora_worst: float


def main() -> None:
    """Compare every engines directory and the original's path with float32."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--models", type=Path, required=True)
    parser.add_argument("--engines", type=Path, required=True, nargs="+")
    parser.add_argument("--image", type=Path, required=True)
    arguments = parser.parse_args()
    for fidelity in compared(arguments.models, arguments.engines, arguments.image):
        print(json.dumps(asdict(fidelity)), flush=True)


def compared(models: Path, engines: list[Path], image: Path) -> Iterator[Fidelity]:
    """The fidelity of the original's path, then of every engines directory."""
    checkpoints = find_checkpoints(models)
    with Pipeline(engines[0], backend="cpu") as pipeline:
        pixels = pipeline.pixels([image])
    wanted = from_reference(checkpoints, pixels, torch.Tensor.float)
    yield fidelity("original", from_reference(checkpoints, pixels, unscaled_fp8), wanted)
    for directory in engines:
        with Pipeline(directory, backend="cpu") as pipeline:
            yield fidelity(pipeline.manifest.precision, from_engines(pipeline, pixels), wanted)


def unscaled_fp8(values: torch.Tensor) -> torch.Tensor:
    """A weight as the original keeps it: e4m3 without a scale for matrices, bfloat16 for the rest."""
    stored = values.to(torch.float8_e4m3fn) if values.shape[-1] > 1 else values
    return stored.to(torch.bfloat16)


def from_reference(
    checkpoints: Mapping[Family, Checkpoint],
    pixels: Mapping[Family, Array],
    cast: Callable[[torch.Tensor], torch.Tensor],
) -> Outcome:
    """The torch path, step by step."""
    tokens: dict[Family, Array] = {}
    embeddings: dict[Family, Array] = {}
    for family in ENCODERS:
        for step, outputs in reference_steps(checkpoints[family], pixels[family], cast):
            (kept,) = outputs.values()
            if step.endswith(".head"):
                embeddings[family] = kept
            else:
                tokens[family] = kept
    factors: dict[str, tuple[Array, Array]] = {}
    for step, outputs in reference_steps(checkpoints["adapter"], joined(embeddings), cast):
        factors |= factors_by_module(step, outputs)
    return Outcome(tokens, embeddings, lora_from_factors(factors))


def from_engines(pipeline: Pipeline, pixels: Mapping[Family, Array]) -> Outcome:
    """This project's path."""
    tokens: dict[Family, Array] = {}
    embeddings: dict[Family, Array] = {}

    def keep(step: str, outputs: dict[str, Array]) -> None:
        family: Family = "siglip2" if step.startswith("siglip2") else "dinov3"
        (values,) = outputs.values()
        (embeddings if step.endswith(".head") else tokens)[family] = values

    lora = pipeline.lora_from_embeddings(pipeline.embed_pixels(pixels, observe=keep))
    return Outcome(tokens, embeddings, lora)


def fidelity(path: str, found: Outcome, wanted: Outcome) -> Fidelity:
    """Compare two outcomes."""
    errors = list(lora_errors(found.lora, wanted.lora).values())
    whole = {name: step_error(name, found.embeddings[name], wanted.embeddings[name]) for name in ENCODERS}
    tokens = {name: step_error(name, found.tokens[name], wanted.tokens[name]) for name in ENCODERS}
    return Fidelity(
        path,
        whole["siglip2"].relative_error,
        tokens["siglip2"].worst_token,
        whole["dinov3"].relative_error,
        tokens["dinov3"].worst_token,
        float(np.median(errors)),
        max(errors),
    )


def joined(embeddings: Mapping[Family, Array]) -> Array:
    """What the adapter takes, ``[1, embedding]``."""
    return np.concatenate([embeddings[family] for family in ENCODERS], axis=1)


if __name__ == "__main__":
    main()
