"""Nodes for tests/real_comfyui.py, which puts this file into the custom_nodes of the ComfyUI that it starts.

No Z-Image weights are at hand, so one node makes ComfyUI's own Z-Image model with random weights and the sizes of the
tiny preset; the other computes what a LoRA does to every weight, as ComfyUI does it when it loads the model.
"""

from typing import Any

import torch

import comfy.lora
import comfy.model_patcher
import comfy.supported_models

CONFIG = {
    "image_model": "lumina2",
    "patch_size": 2,
    "in_channels": 16,
    "dim": 96,
    "cap_feat_dim": 64,
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


class TinyZImage:
    CATEGORY, FUNCTION, RETURN_TYPES = "check", "make", ("MODEL",)

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:  # noqa: N802 - ComfyUI's name
        return {"required": {}}

    def make(self) -> tuple[Any]:
        config = comfy.supported_models.ZImage(dict(CONFIG))
        config.set_inference_dtype(torch.float32, None)
        torch.manual_seed(0)
        model = config.get_model({}, "")
        for parameter in model.parameters():
            torch.nn.init.normal_(parameter, std=0.02)
        cpu = torch.device("cpu")
        return (comfy.model_patcher.ModelPatcher(model, cpu, cpu),)


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
            changes[key] = comfy.lora.calculate_weight(patches, before.clone(), key) - before
        down, up = ".lora_A.default.weight", ".lora_B.default.weight"
        worst, modules = 0.0, 0
        for module in (key.removesuffix(down) for key in lora_data if key.endswith(down)):
            wanted = lora_data[module + up].float() @ lora_data[module + down].float()
            got = self.change_of(module, changes, wanted.shape[0])
            worst = max(worst, float((got - wanted).norm() / wanted.norm()))
            modules += 1
        untouched = not any(model.patches.values())
        return {"ui": {"text": [str(modules), str(worst), str(untouched)]}}

    @staticmethod
    def change_of(module: str, changes: dict[str, torch.Tensor], rows: int) -> torch.Tensor:
        """The part of a weight's change that belongs to a module: q, k and v are thirds of one weight."""
        block, name = module.rsplit(".attention.", 1) if ".attention." in module else (module, "")
        if name in {"to_q", "to_k", "to_v"}:
            part = ("to_q", "to_k", "to_v").index(name)
            return changes[f"diffusion_model.{block}.attention.qkv.weight"][part * rows : (part + 1) * rows]
        if name == "to_out.0":
            return changes[f"diffusion_model.{block}.attention.out.weight"]
        return changes[f"diffusion_model.{module}.weight"]


NODES = {"Check_TinyZImage": TinyZImage, "Check_WeightChanges": WeightChanges}
NODE_CLASS_MAPPINGS = NODES if hasattr(comfy.supported_models, "ZImage") else {}
