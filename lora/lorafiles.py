"""LoRA files joined, and written in another form.

Joining is exact: the weight goes on A, then the ranks are put side by side, so ``B @ A`` of the result is the weighted
sum of the inputs' ``B @ A`` up to the rounding of the file's dtype. Where a LoRA has nothing it changes nothing.
"""

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import numpy as np

from ..engines.base import Array
from .errors import LoraNamesUnknown, LorasDiffer, LorasForOthers, NoLoras
from .keys import AnyKeyFormat
from .lora import CLAIMS, Dtype, Lora, joining_weights, model_metadata
from .names import component, diffusion_model, place
from .reading import LoraFile, one_rank


def lora_paths(paths: Iterable[Path], output: Path) -> list[Path]:
    """Replace every folder in ``paths`` by the safetensors files in it, by name, without ``output``.

    Raises:
        NoLoras: a folder holds none.
    """
    found: list[Path] = []
    for path in paths:
        if not path.is_dir():
            found.append(path)
            continue
        inside = sorted(p for p in path.glob("*.safetensors") if not p.name.startswith(".") and p.is_file())
        others = [p for p in inside if not (output.exists() and p.samefile(output))]
        if not others:
            raise NoLoras(path)
        found += others
    return found


def merge_loras(files: Sequence[LoraFile], weights: Sequence[float] | None = None) -> Lora:
    """The weighted sum of LoRAs, of all modules of any; its rank is at most the sum of theirs.

    Args:
        files: two or more, for one diffusion model.
        weights: one per file, taken as they are; by default ``1 / files`` each.

    Raises:
        LorasForOthers, LorasDiffer: they are not for the same diffusion model.
        StrengthInvalid, WeightsMismatch: a number is not finite, or there is not one weight per file.
    """
    gains = joining_weights(weights, len(files), "LoRA")
    for other in files[1:]:
        require_one_model(files[0], other)
    factors: dict[str, tuple[Array, Array]] = {}
    for module in dict.fromkeys(module for file in files for module in file.lora.factors):
        having = [(gain, file.lora.factors) for gain, file in zip(gains, files, strict=True)]
        pairs = [(gain, own[module]) for gain, own in having if module in own]
        a = np.concatenate([np.float32(gain) * a for gain, (a, _) in pairs])
        factors[module] = (a, np.concatenate([b for _, (_, b) in pairs], axis=1))
    marks = {"i2l.merge_weights": ",".join(f"{gain:.9g}" for gain in gains)}
    return Lora(one_rank(factors), _agreed_claims(files, factors) | marks)


def common_dtype(files: Sequence[LoraFile]) -> Dtype:
    """The files' dtype; float32 if they differ, as neither 16-bit form holds the other."""
    kinds = {file.dtype for file in files}
    return kinds.pop() if len(kinds) == 1 else "fp32"


def require_one_model(first: LoraFile, second: LoraFile) -> None:
    """Raise if two LoRAs are not for one diffusion model, by their modules' names or by the shapes of what they change.

    Raises:
        LorasForOthers, LorasDiffer: the one, and the other.
    """
    left, right = first.lora.shapes, second.lora.shapes
    models = diffusion_model(left), diffusion_model(right)
    parts = {component(module) for module in first.modules}, {component(module) for module in second.modules}
    contradict = None not in models and models[0] != models[1]
    if contradict or ((models != (models[0], models[0]) or models[0] is None) and not parts[0] & parts[1]):
        said = [
            model or f"an unknown model with {file.modules[0]}"
            for model, file in zip(models, (first, second), strict=True)
        ]
        raise LorasForOthers(first.path, second.path, *said)
    places = {place(module): shape for module, shape in left.items()}
    misshapen = {
        module: (places[place(module)], shape)
        for module, shape in right.items()
        if places.get(place(module), shape) != shape
    }
    if misshapen:
        raise LorasDiffer(first.path, second.path, misshapen)


def require_names(file: LoraFile, key_format: AnyKeyFormat) -> None:
    """Raise :class:`LoraNamesUnknown` if modules have a trainer's underscores whose dots are not known."""
    unknown = [module for module in file.lora.factors if module.startswith(("lora_unet_", "lora_transformer_"))]
    if unknown:
        raise LoraNamesUnknown(file.path, unknown, key_format)


def without_claims(file: LoraFile) -> dict[str, str]:
    """The metadata that stays true when a file is written in another form, and what its modules say it is for."""
    dropped = {"lora_adapter_metadata", "ss_network_alpha", "ss_network_dim", "format"}
    kept = {name: value for name, value in file.lora.metadata.items() if name not in dropped}
    return kept | model_metadata(diffusion_model(file.lora.shapes))


def _agreed_claims(files: Sequence[LoraFile], factors: Mapping[str, tuple[Array, Array]]) -> dict[str, str]:
    """What a merged file says it is for: what its modules say; else what all files say; else nothing."""
    shapes = {module: (b.shape[0], a.shape[1]) for module, (a, b) in factors.items()}
    model = diffusion_model(shapes)
    if claims := model_metadata(model):
        return claims
    first = files[0].lora.metadata
    agreed = {
        name: first[name] for name in CLAIMS if all(f.lora.metadata.get(name) == first.get(name, "") for f in files)
    }
    foreign = model is not None and any(
        value in model_metadata(other).values() for value in agreed.values() for other in ("z-image", "qwen-image")
    )
    return {} if foreign else agreed
