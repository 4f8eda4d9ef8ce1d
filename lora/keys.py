"""Keys of LoRA files: every form in use, taken apart into modules and what each tensor is of them.

A key is a prefix (``diffusion_model.``, ``transformer.``, ``base_model.model.``, ``lora_unet_``, or none), a module,
and what the tensor is: a factor (``lora_A`` or ``lora_down``), a scale (``alpha``), or a part of another kind of
adapter.
"""

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Literal, TypeAlias

from .names import dotted

KeyFormat: TypeAlias = Literal["comfyui", "diffsynth"]
AnyKeyFormat: TypeAlias = Literal["comfyui", "diffsynth", "diffusers", "peft", "kohya", "bare"]
KEYS: Mapping[KeyFormat, tuple[str, str]] = {
    "comfyui": ("diffusion_model.{}.lora_A.weight", "diffusion_model.{}.lora_B.weight"),
    "diffsynth": ("{}.lora_A.default.weight", "{}.lora_B.default.weight"),
}
"""What i2l makes LoRAs with."""
ALL_KEYS: Mapping[AnyKeyFormat, tuple[str, str]] = {
    "comfyui": KEYS["comfyui"],
    "diffsynth": KEYS["diffsynth"],
    "diffusers": ("transformer.{}.lora_A.weight", "transformer.{}.lora_B.weight"),
    "peft": ("base_model.model.{}.lora_A.weight", "base_model.model.{}.lora_B.weight"),
    "kohya": ("lora_unet_{}.lora_down.weight", "lora_unet_{}.lora_up.weight"),
    "bare": ("{}.lora_A.weight", "{}.lora_B.weight"),
}
"""What ``i2l convert`` can write; ``kohya`` has underscores for the module's dots, and alphas."""
PREFIXES: Mapping[str, AnyKeyFormat] = {
    "base_model.model.": "peft",
    "model.diffusion_model.": "comfyui",
    "diffusion_model.": "comfyui",
    "transformer.": "diffusers",
    "lora_unet__": "kohya",
    "lora_unet_": "kohya",
    "lora_transformer_": "kohya",
}
TEXT_ENCODER = re.compile(
    r"(?:base_model\.model\.)?(?:text_encoders?(?:_\d)?\.|lora_te\d*_|te\d?\.|text_model\.|cond_stage_model\.|conditioner\."
    r"|clip_[lgh]\.|t5xxl\.|qwen\w*\.|gemma\w*\.|llama\w*\.)"
)
PARTS: tuple[tuple[str, str, str | None], ...] = (
    ("down", r"lora_A|lora_down|lora\.down|lora_linear_layer\.down", None),
    ("up", r"lora_B|lora_up|lora\.up|lora_linear_layer\.up", None),
    ("alpha", r"alpha", None),
    ("other", r"dora_scale|lora_magnitude_vector", "DoRA"),
    ("other", r"lokr_(?:w[12](?:_[ab])?|t2)", "LoKr"),
    ("other", r"hada_(?:w[12]_[ab]|t[12])", "LoHa"),
    ("other", r"oft_(?:blocks|diag|R|r)", "OFT"),
    ("other", r"boft_(?:R|s)", "BOFT"),
    ("other", r"lora_mid", "LoCon with a middle factor"),
    ("other", r"vera_lambda_[bd]", "VeRA"),
    ("other", r"on_input|ia3_l", "IA3"),
    ("other", r"diff|diff_b|w_norm|b_norm|set_weight", "full differences"),
)
ENDINGS = tuple(
    (part, variant, re.compile(rf"(.+)\.(?:{words})(?:(?:\.([^.]+))?\.weight)?")) for part, words, variant in PARTS
)
"""``(part, variant, module . part [. name of the adapter] [. weight])``."""


@dataclass
class Parts:
    """The tensors of one module, by name."""

    down: str | None = None
    up: str | None = None
    alpha: str | None = None
    head: str = ""
    """Prefix and module as the file has them."""
    adapter: str | None = None
    others: dict[str, str] = field(default_factory=dict)
    """``part -> name`` of the tensors of other kinds, such as ``lokr_w1``."""


@dataclass
class ParsedKeys:
    """A file's keys, taken apart."""

    modules: dict[str, Parts] = field(default_factory=dict)
    """With factors, or with the tensors of another kind of adapter."""
    formats: set[AnyKeyFormat] = field(default_factory=set)
    variants: set[str] = field(default_factory=set)
    """Other kinds of adapters, such as ``DoRA``."""
    text_encoder: list[str] = field(default_factory=list)
    """Tensors for a text encoder."""
    foreign: list[str] = field(default_factory=list)
    """Tensors that are nothing known."""
    adapters: set[str] = field(default_factory=set)
    """Names of adapters, such as ``default``."""
    spelling: set[str] = field(default_factory=set)
    """How the lower factor is called."""

    @property
    def text_modules(self) -> int:
        """Modules of a text encoder."""
        return len({found[1] for key in self.text_encoder if (found := _split(key))})

    @property
    def key_format(self) -> str:
        """The form in one word, with ``lora_down`` where that is not usual in it."""
        name: str = self.formats.copy().pop() if len(self.formats) == 1 else "mixed"
        if name == "bare" and self.adapters == {"default"}:
            name = "diffsynth"
        odd = "lora_down" in self.spelling and name != "kohya"
        return f"{name}, lora_down" if odd else name


def parse_keys(names: Iterable[str]) -> ParsedKeys:
    """Take every key of a file apart."""
    parsed = ParsedKeys()
    for name in names:
        found = _split(name)
        if found is None:
            parsed.foreign.append(name)
            continue
        if TEXT_ENCODER.match(name):
            parsed.text_encoder.append(name)
            continue
        part, full, adapter, variant = found
        module, key_format = _module(full)
        parsed.formats.add(key_format)
        if adapter:
            parsed.adapters.add(adapter)
        if variant:
            parsed.variants.add(variant)
        parts = parsed.modules.setdefault(module, Parts(head=full))
        if part in {"down", "up"} and parts.down is None and parts.up is None:
            parts.adapter = adapter
        if part == "other" and parts.head == full:
            parts.others[name.removeprefix(f"{full}.").split(".")[0]] = name
            continue
        same = part == "alpha" or parts.adapter == adapter
        if parts.head != full or not same or getattr(parts, part) is not None:
            parsed.foreign.append(name)
            continue
        setattr(parts, part, name)
        if part == "down":
            parsed.spelling.add("lora_down" if "down" in name[len(full) :] else "lora_A")
    return parsed


def written_keys(key_format: AnyKeyFormat, module: str) -> tuple[str, str]:
    """The keys of a module's two factors."""
    down, up = ALL_KEYS[key_format]
    name = module.replace(".", "_") if key_format == "kohya" else module
    return down.format(name), up.format(name)


def _split(name: str) -> tuple[str, str, str | None, str | None] | None:
    """``(part, prefix and module, name of the adapter, variant)`` of a key."""
    for part, variant, ending in ENDINGS:
        if match := ending.fullmatch(name):
            return part, match[1], match[2], variant
    return None


def _module(full: str) -> tuple[str, AnyKeyFormat]:
    """The module without its prefixes, with dots, and the form; a kohya name of no known model stays as it is."""
    name, key_format = full, None
    while prefix := next((known for known in PREFIXES if name.startswith(known)), None):
        name, key_format = name.removeprefix(prefix), key_format or PREFIXES[prefix]
    if key_format == "kohya":
        return dotted(name) or full, key_format
    return name, key_format or "bare"
