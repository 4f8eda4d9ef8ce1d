"""Nodes for tests/real_comfyui.py, which puts this file into the custom_nodes of the ComfyUI that it starts.

No Z-Image weights are at hand, so one node makes ComfyUI's own Z-Image model with random weights, narrow, at the depth
of the tiny preset or of the published model. Others compute what a LoRA does to every weight: as ComfyUI does it when
it loads the model, and while its sampler runs the positive and the negative branch.
"""

from collections.abc import Mapping
from typing import Any

import torch

import comfy.lora
import comfy.model_patcher
import comfy.sample
import comfy.supported_models

FEATURES = 64
CONFIG = {
    "image_model": "lumina2",
    "patch_size": 2,
    "in_channels": 16,
    "dim": 96,
    "cap_feat_dim": FEATURES,
    "n_layers": 2,
    "n_refiner_layers": 1,
    "qk_norm": True,
    "n_heads": 4,
    "n_kv_heads": 4,
    "axes_dims": [8, 8, 8],
    "axes_lens": [64, 64, 64],
    "rope_theta": 256.0,
    "ffn_dim_multiplier": 8.0 / 3.0,
    "z_image_modulation": True,
    "time_scale": 1000.0,
}
WHOLE_DEPTH = {
    "n_layers": 30,
    "n_refiner_layers": 2,
    "dim": 256,  # narrower ones cannot run: the modulation of Z-Image is 256 wide
    "n_heads": 8,
    "n_kv_heads": 8,
    "axes_dims": [8, 12, 12],
}
"""The depth of the published Z-Image: 238 modules have a LoRA."""
DOWN, UP = ".lora_A.default.weight", ".lora_B.default.weight"
STEPS = 2


class TinyZImage:
    CATEGORY, FUNCTION, RETURN_TYPES = "check", "make", ("MODEL",)

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:  # noqa: N802 - ComfyUI's name
        return {"required": {"whole_depth": ("BOOLEAN", {"default": False})}}

    def make(self, whole_depth: bool) -> tuple[Any]:
        config = comfy.supported_models.ZImage(CONFIG | WHOLE_DEPTH if whole_depth else dict(CONFIG))
        config.set_inference_dtype(torch.float32, None)
        torch.manual_seed(0)
        model = config.get_model({}, "")
        for parameter in model.parameters():
            torch.nn.init.normal_(parameter, std=0.02)
        cpu = torch.device("cpu")
        return (comfy.model_patcher.ModelPatcher(model, cpu, cpu),)


class Prompt:
    """Random features in place of a text encoder's."""

    CATEGORY, FUNCTION, RETURN_TYPES = "check", "encode", ("CONDITIONING",)

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:  # noqa: N802 - ComfyUI's name
        return {"required": {"text": ("STRING", {})}}

    def encode(self, text: str) -> tuple[Any]:
        features = torch.randn((1, 7, FEATURES), generator=torch.Generator().manual_seed(len(text)))
        return ([[features, {}]],)


class Branches:
    """Samples a few steps, and counts the modules whose weights differ while each branch is computed."""

    CATEGORY, FUNCTION, RETURN_TYPES, OUTPUT_NODE = "check", "sample", (), True

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:  # noqa: N802 - ComfyUI's name
        sockets = {
            "model": "MODEL",
            "positive": "CONDITIONING",
            "negative": "CONDITIONING",
            "lora_data": "lora_weights",
        }
        return {"required": {**{name: (kind,) for name, kind in sockets.items()}, "cfg": ("FLOAT", {"default": 4.0})}}

    def sample(
        self, model: Any, positive: Any, negative: Any, lora_data: Mapping[str, torch.Tensor], cfg: float
    ) -> dict[str, Any]:
        network = model.model.diffusion_model
        modules = [key.removesuffix(DOWN) for key in lora_data if key.endswith(DOWN)]
        before = {key: value.clone() for key, value in network.state_dict().items()}
        changed: dict[int, set[str]] = {0: set(), 1: set()}

        def look(_: object, __: object, options: Mapping[str, Any]) -> None:
            now = network.state_dict()
            for branch in options["transformer_options"]["cond_or_uncond"]:
                changed[branch] |= {name for name in modules if not equal(name, now, before)}

        latent = torch.zeros(1, 16, 8, 8)
        noise = comfy.sample.prepare_noise(latent, 0)
        hook = network.register_forward_pre_hook(look, with_kwargs=True)
        try:
            comfy.sample.sample(model, noise, STEPS, cfg, "euler", "simple", positive, negative, latent, seed=0)
        finally:
            hook.remove()
        model.detach()
        restored = all(torch.equal(value, before[key]) for key, value in network.state_dict().items())
        return {"ui": {"text": [str(len(changed[0])), str(len(changed[1])), str(restored)]}}


class WeightChanges:
    """Compares the changes of a patched model's weights with ``B @ A`` of a LoRA."""

    CATEGORY, FUNCTION, RETURN_TYPES, OUTPUT_NODE = "check", "compare", (), True

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:  # noqa: N802 - ComfyUI's name
        return {"required": {"model": ("MODEL",), "patched": ("MODEL",), "lora_data": ("lora_weights",)}}

    def compare(self, model: Any, patched: Any, lora_data: dict[str, torch.Tensor]) -> dict[str, Any]:
        weights = model.model.state_dict()
        changes = {}
        for key, patches in patched.patches.items():
            before = weights[key].clone()
            changes[key.removeprefix("diffusion_model.")] = (
                comfy.lora.calculate_weight(patches, before.clone(), key) - before
            )
        worst, modules = 0.0, 0
        for module in (key.removesuffix(DOWN) for key in lora_data if key.endswith(DOWN)):
            wanted = lora_data[module + UP].float() @ lora_data[module + DOWN].float()
            got = weight_of(module, changes)
            worst = max(worst, float((got - wanted).norm() / wanted.norm()))
            modules += 1
        untouched = not any(model.patches.values())
        return {"ui": {"text": [str(modules), str(worst), str(untouched)]}}


def weight_of(module: str, weights: Mapping[str, torch.Tensor]) -> torch.Tensor:
    """A module's part of ComfyUI's weights: q, k and v are thirds of one."""
    block, name = module.rsplit(".attention.", 1) if ".attention." in module else (module, "")
    if name in {"to_q", "to_k", "to_v"}:
        return weights[f"{block}.attention.qkv.weight"].chunk(3)[("to_q", "to_k", "to_v").index(name)]
    return weights[f"{block}.attention.out.weight" if name == "to_out.0" else f"{module}.weight"]


def equal(module: str, first: Mapping[str, torch.Tensor], second: Mapping[str, torch.Tensor]) -> bool:
    """Has a module the same weight in both?"""
    return torch.equal(weight_of(module, first), weight_of(module, second))


NODES = {
    "Check_TinyZImage": TinyZImage,
    "Check_Prompt": Prompt,
    "Check_Branches": Branches,
    "Check_WeightChanges": WeightChanges,
}
NODE_CLASS_MAPPINGS = NODES if hasattr(comfy.supported_models, "ZImage") else {}
