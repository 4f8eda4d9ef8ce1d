"""How many modules of our LoRAs a ComfyUI finds a place for, by its own code.

    PYTHONPATH=.typecheck <python of the ComfyUI> benchmarks/comfyui_keys.py <folder of the ComfyUI>

Only ``comfy.lora`` runs: it maps keys to weights, so a model with the right names and empty weights is enough.
"""

import sys
from types import SimpleNamespace
from typing import Any

from i2l.specs import PRESETS, QWEN_IMAGE_ADAPTERS, AdapterSpec

sys.path.insert(0, sys.argv[1])
sys.argv[1:] = ["--cpu"]  # read by ComfyUI

import comfy.options  # noqa: E402

comfy.options.enable_args_parsing()

import torch  # noqa: E402

import comfy.lora  # noqa: E402
import comfy.model_base  # noqa: E402

KEYS = {
    "comfyui": ("diffusion_model.{}.lora_A.weight", "diffusion_model.{}.lora_B.weight"),
    "diffsynth": ("{}.lora_A.default.weight", "{}.lora_B.default.weight"),
}
FUSED = {"to_q": "qkv", "to_k": "qkv", "to_v": "qkv", "to_out.0": "out"}
"""How ComfyUI's Z-Image calls what holds a module."""


def modules(spec: AdapterSpec) -> list[str]:
    """Every module that a LoRA of this adapter changes."""
    return [
        f"{component}.{index}.{target}"
        for component, blocks in spec.components
        for index in range(blocks)
        for _, targets in spec.kinds
        for target, _, _ in targets
    ]


def nominal_model(kind: type, names: list[str]) -> Any:
    """A model of ComfyUI's class that has the names of its weights and nothing else."""
    weights = {f"diffusion_model.{name}.weight": torch.zeros(1) for name in names}
    model: Any = object.__new__(kind)
    torch.nn.Module.__init__(model)
    object.__setattr__(model, "state_dict", lambda: weights)
    model.model_config = SimpleNamespace(unet_config={"n_layers": 30, "dim": 3840, "n_refiner_layers": 2})
    return model


def fused(module: str) -> str:
    """A module's weight in ComfyUI's Z-Image."""
    block, _, name = module.partition(".attention.")
    return f"{block}.attention.{FUSED[name]}" if name else module


for spec, kind, own_name in (
    (PRESETS["full"].adapter, comfy.model_base.Lumina2, fused),
    (QWEN_IMAGE_ADAPTERS["full"], comfy.model_base.QwenImage, str),
):
    wanted = modules(spec)
    places = comfy.lora.model_lora_keys_unet(nominal_model(kind, [own_name(name) for name in wanted]), {})
    for key_format, (down, up) in KEYS.items():
        lora = {down.format(name): torch.zeros(4, 2) for name in wanted}
        lora |= {up.format(name): torch.zeros(2, 4) for name in wanted}
        print(f"{spec.diffusion_model}, {key_format}: {len(comfy.lora.load_lora(lora, places))} of {len(wanted)}")
