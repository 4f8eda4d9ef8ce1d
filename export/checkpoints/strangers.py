"""What a file is that is none of the known checkpoints: named, so that nobody downloads a good file again."""

from collections.abc import Mapping

from ...engines.directory.tensorfile import TensorInfo
from ...specs import PUBLISHED, AdapterSpec, Family, Spec
from .errors import TITLES
from .shapes import Shapes, tensor_shapes
from .tensor_names import likeness, prefixes_of, resolved

NEARLY_ALL = 0.3
"""Share of a model's names that makes a file a relative of it."""
KINDS = (
    ("a LoRA", ("lora_A", "lora_down", "lokr_w", "hada_w")),
    ("a diffusion model", ("single_blocks", "double_blocks", "noise_refiner", "transformer_blocks", "input_blocks")),
    ("a VAE", ("decoder.conv_in", "decoder.up.", "decoder.up_blocks", "decoder.middle")),
    ("a text encoder or a language model", ("self_attn.q_proj", "self_attn.k_proj", "token_embedding", "embed_tokens")),
)
QWEN_STYLE_COMPRESS = 64


def name_stranger(tensors: Mapping[str, TensorInfo]) -> tuple[str, Family | None]:
    """``(what it is in a few words, the model that it is a relative of)``; empty where nothing is known."""
    shapes = {name: info.shape for name, info in tensors.items()}
    spec = max(PUBLISHED, key=lambda spec: _share(shapes, spec))
    if _share(shapes, spec) >= NEARLY_ALL:
        return _relative(shapes, spec), spec.family
    text = "\n".join(tensors)
    return next((kind for kind, words in KINDS if any(word in text for word in words)), ""), None


def _share(shapes: Shapes, spec: Spec) -> float:
    wanted = tensor_shapes(spec)
    return max(likeness(shapes, wanted, prefix, by_shape=False) for prefix in prefixes_of(shapes, wanted))


def _relative(shapes: Shapes, spec: Spec) -> str:
    wanted = tensor_shapes(spec)
    prefix = max(prefixes_of(shapes, wanted), key=lambda p: likeness(shapes, wanted, p, by_shape=False))
    names = resolved(shapes, wanted, prefix)
    first, own = next(iter(names.items()))
    if not isinstance(spec, AdapterSpec):
        size = f"its {first} is {list(shapes[own])}, this needs {list(wanted[first])}"
        return f"another size of {TITLES[spec.family]}: {size}"
    compress = next((shapes[o][0] for n, o in names.items() if n.endswith("proj_in.weight") and shapes[o]), 0)
    if spec.diffusion_model == "qwen-image":
        kind = "Coarse or Fine" if compress > QWEN_STYLE_COMPRESS else "not Style"
        return f"Qwen-Image-i2L, {kind} (compressed to {compress}); this needs Style ({QWEN_STYLE_COMPRESS})"
    return f"another Z-Image-i2L (compressed to {compress}); this needs the published one ({spec.compress})"
