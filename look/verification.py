"""Are the engines as good as the checkpoints? Every step and the final LoRA against a float32 reference.

Both sides get the same pixels. The hidden states are compared after each step, so the first step that goes wrong shows;
the LoRA by ``B @ A`` per module, as that is what changes the diffusion model. A global error hides a small token beside
a massive one, so the worst token is given too.
"""

import math
import time
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from ..engines.base import Array
from ..engines.directory.integrity import check_files
from ..engines.directory.manifest import read_manifest
from ..lora.lora import Lora, factors_by_module, lora_from_factors
from ..lora.lowrank import product_error
from ..machine.progress import Report, silent
from ..machine.wording import GIB, format_bytes
from ..runtime.pictures.images import ImageSource
from ..runtime.pipeline import Pipeline
from ..specs import AdapterSpec, Family
from .errors import ComparisonNotFinite, EnginesOfOtherCheckpoints

LORA_BOUNDS = {"fp32": 1e-3, "bf16": 0.1, "int8": 0.3, "fp8": 0.7}
"""Of the relative error of ``B @ A`` in the worst module, by the precision of the packs.

int8 and fp8: twice the worst at full size (0.14 and 0.33, benchmarks/RESULTS.md). bf16 showed 2e-3 at the preset small
and fp32 1e-6 at tiny; both grow with the depth. Engines of other weights are off by more than 1."""


@dataclass(frozen=True)
class StepError:
    """How far a step's output is from the reference."""

    step: str
    cosine: float
    relative_error: float
    """Norm of the difference over norm of the reference."""
    worst_token: float
    """The largest relative error of one token."""


@dataclass(frozen=True)
class Verification:
    """The outcome of :func:`verify_engines`."""

    precision: str
    backend: str
    checkpoint_dtypes: Mapping[Family, str]
    """Of most values, as safetensors names them. The reference computes with these values in float32, so the errors are
    what the engines' precision costs on top of whatever a cast cost before."""
    steps: tuple[StepError, ...]
    lora_median: float
    """Median over modules of the relative error of ``B @ A``."""
    lora_worst: float
    lora_worst_module: str
    hashed_bytes: int
    """Of the engines: every file was compared with its hash first."""
    hashed_seconds: float

    @property
    def lora_bound(self) -> float:
        """What :attr:`lora_worst` may be."""
        return LORA_BOUNDS[self.precision]

    @property
    def right(self) -> bool:
        return self.lora_worst <= self.lora_bound

    def to_dict(self) -> dict[str, Any]:
        return asdict(self) | {"lora_bound": self.lora_bound, "right": self.right}


def verify_engines(
    models: Path, engines: Path, image: ImageSource, *, backend: str = "auto", report: Report = silent
) -> Verification:
    """Run engines and reference on one image and compare.

    Raises:
        CheckpointError, EnginesError, ImageError: an input cannot be used.
        ComparisonNotFinite: an error is no number, as what is compared is none.
    """
    from ..export.checkpoints.finding import find_checkpoints  # noqa: PLC0415 - torch is needed only here
    from ..export.reference import reference_steps  # noqa: PLC0415

    adapter = read_manifest(engines).models["adapter"].spec
    assert isinstance(adapter, AdapterSpec)
    checkpoints = find_checkpoints(models, adapter=adapter.diffusion_model)
    start = time.perf_counter()
    hashed = check_files(engines, read_manifest(engines), again=True)
    seconds = time.perf_counter() - start
    recorded: dict[str, dict[str, Array]] = {}
    with Pipeline(engines, backend=backend) as pipeline:
        for family, checkpoint in checkpoints.items():
            if pipeline.manifest.models[family].spec != checkpoint.spec:
                raise EnginesOfOtherCheckpoints(engines, models, family)
        pixels = pipeline.pixels([image])
        lora = pipeline.lora_from_embeddings(pipeline.embed_pixels(pixels, observe=recorded.__setitem__))
        precision, name = pipeline.manifest.precision, pipeline.backend_name
        total = sum(len(chunk.steps) for model in pipeline.manifest.models.values() for chunk in model.chunks)

    steps: list[StepError] = []
    embeddings: dict[Family, Array] = {}
    done = 0
    for family in ("siglip2", "dinov3"):
        for step, outputs in reference_steps(checkpoints[family], pixels[family]):
            ((output, wanted),) = outputs.items()
            steps.append(step_error(step, recorded.pop(step)[output], wanted))
            embeddings[family] = wanted
            done += 1
            report("comparing with float32", done, total)
    factors: dict[str, tuple[Array, Array]] = {}
    joined = np.concatenate([embeddings["siglip2"], embeddings["dinov3"]], axis=1)
    for step, outputs in reference_steps(checkpoints["adapter"], joined):
        factors |= factors_by_module(step, outputs)
        done += 1
        report("comparing with float32", done, total)
    errors = lora_errors(lora, lora_from_factors(factors))
    worst = max(errors, key=lambda module: errors[module])
    found = {**{error.step: error.relative_error for error in steps}, **errors}
    if odd := [step for step, error in found.items() if not math.isfinite(error)]:
        raise ComparisonNotFinite(odd)
    return Verification(
        precision=precision,
        backend=name,
        checkpoint_dtypes={family: checkpoint.dtype for family, checkpoint in checkpoints.items()},
        steps=tuple(steps),
        lora_median=float(np.median(list(errors.values()))),
        lora_worst=errors[worst],
        lora_worst_module=worst,
        hashed_bytes=hashed,
        hashed_seconds=round(seconds, 3),
    )


def made_up_image(side: int = 640) -> Image.Image:
    """A seeded picture with smooth areas, edges and noise, for when the user gives none."""
    y, x = np.mgrid[0:side, 0:side] / side
    noise = np.random.default_rng(0).normal(0, 0.05, (side, side, 3))
    waves = np.stack([np.sin(9 * x + 3 * y), np.cos(7 * y), (x - 0.5) ** 2 + (y - 0.5) ** 2 < 0.1], axis=-1)
    return Image.fromarray((np.clip(0.5 + 0.4 * waves + noise, 0, 1) * 255).astype(np.uint8))


def step_error(step: str, found: Array, wanted: Array) -> StepError:
    """Compare ``[B, T, D]`` or ``[B, D]``."""
    x = found.astype(np.float64).reshape(-1, found.shape[-1])
    y = wanted.astype(np.float64).reshape(-1, wanted.shape[-1])
    tokens = np.linalg.norm(x - y, axis=1) / np.linalg.norm(y, axis=1)
    cosine = float((x * y).sum() / (np.linalg.norm(x) * np.linalg.norm(y)))
    return StepError(step, cosine, float(np.linalg.norm(x - y) / np.linalg.norm(y)), float(tokens.max()))


def lora_errors(found: Lora, wanted: Lora) -> dict[str, float]:
    """Relative error of ``B @ A`` per module, without forming the products."""
    return {module: product_error(found.factors[module], wanted.factors[module]) for module in wanted.factors}


def summary(verification: Verification) -> Iterator[str]:
    """What a person wants to read: first, middle and last steps of each encoder, and the LoRA."""
    rate = verification.hashed_bytes / GIB / max(verification.hashed_seconds, 1e-3)
    yield f"every file as it was written: {format_bytes(verification.hashed_bytes)} hashed, {rate:.2f} GiB/s"
    yield f"{'step':<24}{'cosine':>12}{'rel. error':>12}{'worst token':>13}"
    for family in ("siglip2", "dinov3"):
        steps = [error for error in verification.steps if error.step.startswith(f"{family}.")]
        shown = sorted({0, 1, len(steps) // 2, len(steps) - 2, len(steps) - 1})
        for error in (steps[index] for index in shown):
            yield f"{error.step:<24}{error.cosine:>12.6f}{error.relative_error:>12.2e}{error.worst_token:>13.2e}"
    yield (
        f"LoRA, B @ A per module: median {verification.lora_median:.2e}, worst {verification.lora_worst:.2e} "
        f"({verification.lora_worst_module})"
    )
    verdict = "right" if verification.right else "wrong"
    yield f"{verdict}: in the worst module {verification.lora_bound:g} is allowed for {verification.precision}"
