"""A LoRA on a ComfyUI model: on a clone of it, or as hooks that act on one branch of the sampler alone.

Both go through ComfyUI's own loading, which is silent about keys that it does not know; here they are errors. A hook
meets its model only when the sampler begins, so what does not fit is said there.
"""

from collections.abc import Mapping
from typing import Any

import comfy.hooks
import comfy.lora
import comfy.sd

from .errors import LoraNotApplied


def patched_model(model: Any, tensors: Mapping[str, Any]) -> Any:
    """A clone of a ``MODEL`` with the LoRA on it; the strength is in the LoRA already.

    Raises:
        LoraNotApplied: some of the modules are not the model's.
    """
    patched, _ = comfy.sd.load_lora_for_models(model, None, dict(tensors), 1.0, 0.0)
    applied = sum(map(len, patched.patches.values())) - sum(map(len, model.patches.values()))
    if applied != len(tensors) // 2:
        raise LoraNotApplied(applied, len(tensors) // 2)
    return patched


def positive_hooks(tensors: Mapping[str, Any]) -> Any:
    """``HOOKS`` that put the LoRA on whichever conditioning they are set on, and on no text encoder.

    The sampler raises :class:`LoraNotApplied` if some of the modules are not its model's.
    """
    hooks = comfy.hooks.create_hook_lora(dict(tensors), strength_model=1.0, strength_clip=0.0)
    for hook in hooks.hooks:
        hook.custom_should_register = require_whole  # ComfyUI's place for code that looks at the model first
    return hooks


def require_whole(hook: Any, model: Any, model_options: Any, target_dict: Mapping[str, Any], registered: Any) -> bool:  # noqa: ARG001
    """Whether a hook acts on a model or a text encoder: on all, but on a model with each module or not at all.

    Raises:
        LoraNotApplied: some of the modules are not the model's.
    """
    if target_dict.get("target") == comfy.hooks.EnumWeightTarget.Model:
        keys = comfy.lora.model_lora_keys_unet(model.model, {})
        applied = len(comfy.lora.load_lora(hook.weights, keys, log_missing=False))
        if applied != len(hook.weights) // 2:
            raise LoraNotApplied(applied, len(hook.weights) // 2)
    return True
