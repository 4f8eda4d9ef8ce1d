"""Specs: the facts of one architecture, and the three presets.

Everything that depends on a model's size is derived from a spec; nothing else in the project holds a width. The
published checkpoints are the preset ``full``. ``tiny`` and ``small`` are the same architectures with other numbers:
their synthetic checkpoints carry the spec in the file's header, as they have no published shape hash.
"""

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any, Literal, TypeAlias

Family: TypeAlias = Literal["siglip2", "dinov3", "adapter"]
FAMILIES: tuple[Family, ...] = ("siglip2", "dinov3", "adapter")
DiffusionModel: TypeAlias = Literal["z-image", "qwen-image"]
"""What a LoRA is for; each has its own adapter."""
DIFFUSION_MODELS: tuple[DiffusionModel, ...] = ("z-image", "qwen-image")
Target: TypeAlias = tuple[str, int, int]
"""``(module, in_features, out_features)`` of a linear that a LoRA changes."""


@dataclass(frozen=True)
class EncoderSpec:
    """A vision transformer: ``siglip2`` (attention-pooling head) or ``dinov3`` (CLS token, 2-D RoPE)."""

    family: Literal["siglip2", "dinov3"]
    hidden: int
    """Channels of the residual stream."""
    depth: int
    """Number of blocks."""
    heads: int
    intermediate: int
    """Channels inside the MLP."""
    image_size: int
    """Pixels on a side of the square input."""
    patch: int = 16
    registers: int = 0
    """Register tokens after the CLS token (dinov3 only)."""
    norm_eps: float = 1e-6
    rope_theta: float = 100.0
    """Base of the rotary frequencies (dinov3 only)."""

    @property
    def blocks(self) -> int:
        """Blocks in the checkpoint."""
        return self.depth

    @property
    def head_dim(self) -> int:
        return self.hidden // self.heads

    @property
    def grid(self) -> int:
        """Patches on a side."""
        return self.image_size // self.patch

    @property
    def prefix_tokens(self) -> int:
        """Tokens that are not patches: CLS and registers, without position."""
        return 0 if self.family == "siglip2" else 1 + self.registers

    @property
    def tokens(self) -> int:
        return self.prefix_tokens + self.grid**2


@dataclass(frozen=True)
class AdapterSpec:
    """The image-to-LoRA adapter: for each target linear, two bias-free pairs of matrices give the factors A and B."""

    family: Literal["adapter"]
    embedding: int
    """Length of the concatenated encoder outputs."""
    compress: int
    """Channels between ``proj_in`` and ``proj_out``."""
    rank: int
    """Rank per image."""
    hidden: int
    """Width of the diffusion model's attention."""
    feed_forward: int
    """Width inside the diffusion model's feed-forward."""
    layers: int
    refiners: int
    """Blocks in each of ``context_refiner`` and ``noise_refiner`` (z-image only)."""
    diffusion_model: DiffusionModel = "z-image"

    @property
    def blocks(self) -> int:
        """Blocks of the diffusion model that the adapter serves."""
        return sum(blocks for _, blocks in self.components)

    @property
    def components(self) -> tuple[tuple[str, int], ...]:
        """``(prefix of the LoRA keys, number of blocks)`` in the checkpoint's order."""
        if self.diffusion_model == "qwen-image":
            return (("transformer_blocks", self.layers),)
        return (("layers", self.layers), ("context_refiner", self.refiners), ("noise_refiner", self.refiners))

    def checkpoint_blocks(self, component: str) -> str:
        """What the checkpoint calls the adapter blocks of a component: all of one kind, then all of the next."""
        return "blocks" if self.diffusion_model == "qwen-image" else f"{component}_lora.blocks"

    @property
    def kinds(self) -> tuple[tuple[str, tuple[Target, ...]], ...]:
        """``(kind of adapter block, its targets)`` in the checkpoint's order; one graph serves each kind."""
        if self.diffusion_model == "qwen-image":
            return (
                ("image_attention", self._attention("to_q", "to_k", "to_v", "to_out.0")),
                ("image_feed_forward", self._stream_targets("img")),
                ("text_attention", self._attention("add_q_proj", "add_k_proj", "add_v_proj", "to_add_out")),
                ("text_feed_forward", self._stream_targets("txt")),
            )
        return (("attention", self.attention_targets), ("feed_forward", self.feed_forward_targets))

    def _attention(self, *names: str) -> tuple[Target, ...]:
        return tuple((f"attn.{name}", self.hidden, self.hidden) for name in names)

    def _stream_targets(self, stream: str) -> tuple[Target, ...]:
        """Qwen-Image's second linear of the MLP, and the modulation that gives six vectors per block."""
        return (
            (f"{stream}_mlp.net.2", self.feed_forward, self.hidden),
            (f"{stream}_mod.1", self.hidden, 6 * self.hidden),
        )

    @property
    def attention_targets(self) -> tuple[Target, ...]:
        """The linears in an attention block of Z-Image."""
        return tuple((f"attention.{name}", self.hidden, self.hidden) for name in ("to_q", "to_k", "to_v", "to_out.0"))

    @property
    def feed_forward_targets(self) -> tuple[Target, ...]:
        """The linears in a feed-forward block of Z-Image."""
        wide, narrow = self.feed_forward, self.hidden
        return (
            ("feed_forward.w1", narrow, wide),
            ("feed_forward.w2", wide, narrow),
            ("feed_forward.w3", narrow, wide),
        )


Spec: TypeAlias = EncoderSpec | AdapterSpec


@dataclass(frozen=True)
class Preset:
    """Three specs that fit together."""

    siglip2: EncoderSpec
    dinov3: EncoderSpec
    adapter: AdapterSpec

    def __iter__(self) -> Any:
        return iter((self.siglip2, self.dinov3, self.adapter))


LARGEST_IMAGE = 1024
"""Pixels on a side of the square that encoders see at most a part of."""
LARGEST_EPS, LARGEST_THETA = 1e-2, 1e8
PRESETS: Mapping[str, Preset] = {
    "tiny": Preset(
        siglip2=EncoderSpec("siglip2", hidden=64, depth=2, heads=4, intermediate=128, image_size=64),
        dinov3=EncoderSpec(
            "dinov3", hidden=128, depth=3, heads=4, intermediate=256, image_size=64, registers=4, norm_eps=1e-5
        ),
        adapter=AdapterSpec(
            "adapter", embedding=192, compress=16, rank=4, hidden=96, feed_forward=256, layers=2, refiners=1
        ),
    ),
    "small": Preset(
        siglip2=EncoderSpec("siglip2", hidden=384, depth=6, heads=6, intermediate=1536, image_size=384),
        dinov3=EncoderSpec(
            "dinov3", hidden=512, depth=6, heads=8, intermediate=1024, image_size=224, registers=4, norm_eps=1e-5
        ),
        adapter=AdapterSpec(
            "adapter", embedding=896, compress=64, rank=4, hidden=480, feed_forward=1280, layers=6, refiners=2
        ),
    ),
    "full": Preset(
        siglip2=EncoderSpec("siglip2", hidden=1536, depth=40, heads=16, intermediate=6144, image_size=384),
        dinov3=EncoderSpec(
            "dinov3", hidden=4096, depth=40, heads=32, intermediate=8192, image_size=224, registers=4, norm_eps=1e-5
        ),
        adapter=AdapterSpec(
            "adapter", embedding=5632, compress=128, rank=4, hidden=3840, feed_forward=10240, layers=30, refiners=2
        ),
    ),
}


def _qwen_image_adapter(embedding: int, compress: int, hidden: int, layers: int) -> AdapterSpec:
    sizes = {"embedding": embedding, "compress": compress, "hidden": hidden, "layers": layers}
    return AdapterSpec("adapter", rank=4, feed_forward=4 * hidden, refiners=0, diffusion_model="qwen-image", **sizes)


QWEN_IMAGE_ADAPTERS: Mapping[str, AdapterSpec] = {
    "tiny": _qwen_image_adapter(embedding=192, compress=16, hidden=48, layers=2),
    "small": _qwen_image_adapter(embedding=896, compress=32, hidden=384, layers=6),
    "full": _qwen_image_adapter(embedding=5632, compress=64, hidden=3072, layers=60),
}
"""Qwen-Image-i2L Style, the ancestor of Z-Image-i2L: the same encoders, another adapter. Presets as in PRESETS."""
PUBLISHED: tuple[Spec, ...] = (*PRESETS["full"], QWEN_IMAGE_ADAPTERS["full"])


def spec_to_dict(spec: Spec) -> dict[str, Any]:
    """The spec as plain JSON values."""
    return asdict(spec)


def spec_from_dict(values: Mapping[str, Any]) -> Spec:
    """The spec that :func:`spec_to_dict` wrote.

    Raises:
        ValueError: a field is missing, unknown or of the wrong type.
    """
    kind: type[EncoderSpec | AdapterSpec]
    kind = AdapterSpec if values.get("family") == "adapter" else EncoderSpec
    if values.get("family") not in FAMILIES:
        raise ValueError(f"unknown family {values.get('family')!r}")
    if kind is AdapterSpec:  # files from before there was another one do not say
        values = {"diffusion_model": "z-image", **values}
        if values["diffusion_model"] not in DIFFUSION_MODELS:
            raise ValueError(f"diffusion_model is {values['diffusion_model']!r}, not one of {DIFFUSION_MODELS}")
    wanted = {field.name for field in fields(kind)}
    if wanted != set(values):
        raise ValueError(f"fields differ from {kind.__name__}: {sorted(wanted ^ set(values))}")
    for field in fields(kind):
        value = values[field.name]
        if field.type is int and not (type(value) is int and value >= (field.name not in ("registers", "refiners"))):
            raise ValueError(f"{field.name} is {value!r}, not a count")
        if field.type is float and not (type(value) in (int, float) and 0 <= value < math.inf):
            raise ValueError(f"{field.name} is {value!r}, not a number")
    spec = kind(**values)
    _require_sound(spec)
    return spec


def _require_sound(spec: Spec) -> None:
    """Raise :class:`ValueError` for numbers that no model of these kinds can have, each by itself a good number."""
    if isinstance(spec, AdapterSpec):
        rules = {"refiners": spec.diffusion_model == "z-image" or spec.refiners == 0}
    else:
        whole_heads = spec.hidden % spec.heads == 0
        rules = {
            "heads": whole_heads and (spec.family == "siglip2" or spec.head_dim % 4 == 0),  # RoPE turns pairs, in 2-D
            "image_size": spec.image_size % spec.patch == 0 and spec.image_size <= LARGEST_IMAGE,
            "registers": spec.family == "dinov3" or spec.registers == 0,
            "norm_eps": 0 < spec.norm_eps <= LARGEST_EPS,
            "rope_theta": 1 <= spec.rope_theta <= LARGEST_THETA,
        }
    for name, sound in rules.items():
        if not sound:
            raise ValueError(f"{name} is {getattr(spec, name)!r}, which does not fit the rest of {spec}")
