"""The ComfyUI nodes: ComfyUI's types in, i2l's calls, ComfyUI's types out.

Saved workflows hold a node's widget values by position, and two booleans stood behind ``strength`` in earlier packs:
the values may be ``[strength]``, ``[strength, bool]`` or ``[strength, bool, bool]``. So these two stay where they were,
every new widget comes after them, and all are optional, so that prompts sent through the API need none.

ComfyUI imports this module; nothing else does. It is the one place outside ``export`` that sees torch.
"""

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

import comfy.sd

from .comfy_host.engines import prepare_engines
from .comfy_host.errors import ImagesUnfit, LoraDataForeign, LoraNotApplied
from .comfy_host.folders import (
    DEFAULT_ADAPTER,
    adapter_names,
    adapter_path,
    engine_folders,
    free_lora_path,
    model_roots,
    register_folders,
    root_of,
)
from .comfy_host.pipelines import OpenPipelines, backend_names
from .comfy_host.progress import comfy_report, total_steps
from .lora.errors import LoraNotASum
from .lora.keys import KEYS, KeyFormat, parse_keys
from .lora.lora import Lora, converted
from .lora.lowrank import reduce_lora
from .lora.reading import factors_of, one_rank
from .machine.wording import GIB, format_path

log = logging.getLogger(__name__)
register_folders()
open_pipelines = OpenPipelines()
LORA_DATA = Path("lora_data")
"""How messages call what comes through that socket."""


class LoraData(dict[str, torch.Tensor]):
    """What goes through a ``lora_weights`` socket: bfloat16 tensors under DiffSynth's keys, and the file's metadata."""

    metadata: Mapping[str, str]


class I2LPipeline(torch.nn.Module):
    """Stands for the open pipeline in ComfyUI's list of loaded models, and in its log."""


class PipelineLoader:
    """Names the adapter that Apply runs."""

    CATEGORY = "Z-Image-i2L"
    DESCRIPTION = "Chooses the Z-Image-i2L adapter, a file in models/I2L/Z-Image."
    RETURN_TYPES = ("ZI2L_FILE",)
    RETURN_NAMES = ("z_image_file_path",)
    FUNCTION = "load"

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:  # noqa: N802 - ComfyUI's name
        names = adapter_names() or [DEFAULT_ADAPTER]
        default = DEFAULT_ADAPTER if DEFAULT_ADAPTER in names else names[0]
        return {"required": {"model_filename": (names, {"default": default})}}

    def load(self, model_filename: str) -> tuple[str]:
        return (str(adapter_path(model_filename)),)


class Apply:
    """Images to a LoRA, as data and on a model."""

    CATEGORY = "Z-Image-i2L"
    DESCRIPTION = (
        "Turns images into one LoRA of rank four per image. The first run builds the engines in models/I2L/engines, "
        "which takes minutes; they are used from then on."
    )
    RETURN_TYPES = ("MODEL", "lora_weights")
    RETURN_NAMES = ("patched_model", "lora_data")
    FUNCTION = "apply"

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:  # noqa: N802 - ComfyUI's name
        return {
            "required": {
                "z_image_file_path": ("ZI2L_FILE",),
                "images": ("IMAGE", {"tooltip": "One to eight pictures of one style; four are a good number."}),
                "strength": (
                    "FLOAT",
                    {"default": 1.0, "min": 0.0, "max": 10.0, "step": 0.1, "tooltip": "The LoRA's effect; linear."},
                ),
            },
            "optional": {
                "model": ("MODEL", {"tooltip": "A Z-Image model that patched_model gives back with the LoRA on it."}),
                "use_cpu_for_vision": (
                    "BOOLEAN",
                    {"default": False, "tooltip": "Compute on the CPU, whatever is there."},
                ),
                "vram_optimization": (
                    "BOOLEAN",
                    {
                        "default": True,
                        "tooltip": "No effect: weights always stream. It is here as saved workflows have it.",
                    },
                ),
                "vram_budget_gib": (
                    "FLOAT",
                    {
                        "default": 0.0,
                        "min": 0.0,
                        "max": 256.0,
                        "step": 0.5,
                        "tooltip": "For GPU backends; 0 leaves it to i2l. No effect on the CPU.",
                    },
                ),
                "precision": (
                    ["auto", "int8", "fp8", "bf16", "fp32"],
                    {
                        "default": "auto",
                        "tooltip": "Of the engines. Each precision used is built once and kept on disk.",
                    },
                ),
                "rank": (
                    "INT",
                    {
                        "default": 0,
                        "min": 0,
                        "max": 256,
                        "tooltip": "Reduce the LoRA to this rank: a smaller file. 0 keeps four per picture.",
                    },
                ),
                "backend": (
                    backend_names(),
                    {
                        "default": "auto",
                        "tooltip": "Where to compute. auto: the best that is proven on this machine. webgpu: any card; "
                        "it needs pip install onnxruntime-ep-webgpu in ComfyUI's Python, 3.11 or newer.",
                    },
                ),
            },
        }

    def apply(
        self,
        z_image_file_path: str,
        images: torch.Tensor,
        strength: float,
        *,
        model: Any = None,
        use_cpu_for_vision: bool = False,
        vram_optimization: bool = True,  # noqa: ARG002 - a slot of saved workflows
        vram_budget_gib: float = 0.0,
        precision: str = "auto",
        rank: int = 0,
        backend: str = "auto",
    ) -> tuple[Any, LoraData]:
        arrays = arrays_from_images(images)
        adapter = Path(z_image_file_path)
        home = root_of(adapter)
        roots = [home, *(root for root in model_roots() if root != home)]
        with torch.inference_mode(mode=False):  # ComfyUI runs nodes in it, torch.export refuses it
            engines, manifest = prepare_engines(adapter, roots, precision, comfy_report(), engine_folders(home))
        backend = "cpu" if use_cpu_for_vision else backend
        report = comfy_report(total_steps(manifest, len(images)))
        budget_bytes = round(vram_budget_gib * GIB) or None
        with open_pipelines.use(engines, manifest, backend, budget_bytes, report, I2LPipeline()) as pipeline:
            # Load Image has dropped the profiles: the metadata says so
            lora = pipeline.lora_from_images(arrays, strength=strength, ignore_icc=True)
        if rank:
            lora, reduction = reduce_lora(lora, rank)
            log.info("i2l: %s", reduction)
        log.info(
            "i2l: rank %d from %d images (%d known before) in %.1f s, backend %s (%s)",
            *(lora.rank, len(images), sum(pipeline.from_cache), sum(pipeline.timings.seconds.values())),
            *(pipeline.backend_name, pipeline.backend_reason),
        )
        return (
            None if model is None else patched_model(model, tensors_from_lora(lora, "comfyui")),
            tensors_from_lora(lora, "diffsynth"),
        )


class Save:
    """A LoRA to a file that Load LoRA and other programs read."""

    CATEGORY = "Z-Image-i2L"
    DESCRIPTION = "Saves to output/loras, where Load LoRA finds the file. A name that is taken gets a number."
    RETURN_TYPES = ()
    FUNCTION = "save"
    OUTPUT_NODE = True

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:  # noqa: N802 - ComfyUI's name
        filename = {"default": "z_image_style_lora", "tooltip": "May name subfolders: portraits/style."}
        return {"required": {"lora_data": ("lora_weights",), "filename": ("STRING", filename)}}

    def save(self, lora_data: Mapping[str, torch.Tensor], filename: str) -> dict[str, Any]:
        lora = lora_from_tensors(lora_data)
        path = lora.save(free_lora_path(filename))
        log.info("i2l: saved %s, rank %d", format_path(path), lora.rank)
        return {"ui": {"text": [str(path)]}}


def arrays_from_images(images: torch.Tensor) -> list[NDArray[np.uint8]]:
    """``IMAGE`` [images, height, width, channels] in [0, 1] to 8 bits, cut off as Save Image does it.

    Any floating dtype and device; picture by picture, so that no float copy of the whole batch is made.

    Raises:
        ImagesUnfit: it is no batch of pictures, or values are not finite.
    """
    channels = images.shape[-1] in {1, 3, 4}  # a MASK is [pictures, height, width]
    if not images.is_floating_point() or (images.ndim, channels) not in {(4, True), (3, False)}:
        form = f"{list(images.shape)}, {str(images.dtype).removeprefix('torch.')}"
        raise ImagesUnfit(
            f"is {form}, not [pictures, height, width, channels]", "connect an IMAGE of 1, 3 or 4 channels"
        )
    if not len(images):
        raise ImagesUnfit(
            "is an empty batch", "connect at least one picture, and see what the node before it leaves out"
        )
    arrays = []
    for number, image in enumerate(images, 1):
        values = image.detach().float().cpu().numpy()
        if not np.isfinite(values).all():
            raise ImagesUnfit(
                f"has values that are not finite (NaN or infinite) in picture {number} of {len(images)}",
                "look at what the node before it gives; a VAE in float16 often does this, with --fp32-vae it does not",
            )
        eight_bit = np.clip(255.0 * values, 0, 255).astype(np.uint8)
        arrays.append(eight_bit[..., 0] if eight_bit.shape[2:] == (1,) else eight_bit)
    return arrays


def tensors_from_lora(lora: Lora, key_format: KeyFormat) -> LoraData:
    """A LoRA as bfloat16 tensors, with the very values that its file has.

    Raises:
        LoraNotFinite: a value is not finite.
    """
    tensors = LoraData()
    tensors.metadata = lora.metadata
    for module, pair in lora.factors.items():
        for key, factor in zip(KEYS[key_format], pair, strict=True):
            bits = converted(key.format(module), factor, "bf16")
            tensors[key.format(module)] = torch.from_numpy(bits.view(np.int16)).view(torch.bfloat16)
    return tensors


def lora_from_tensors(tensors: Mapping[str, torch.Tensor]) -> Lora:
    """The LoRA in a ``lora_weights`` dictionary, ours or another pack's, of any key form.

    Raises:
        LoraDataForeign: there is none in it.
        LoraUnreadable: some of it is no pair of factors.
    """
    parsed = parse_keys(tensors)
    if not any(parts.down and parts.up for parts in parsed.modules.values()):
        raise LoraDataForeign(len(tensors))
    if parsed.variants:
        raise LoraNotASum(LORA_DATA, sorted(parsed.variants))
    factors = factors_of(parsed, lambda name: tensors[name].float().cpu().numpy(), LORA_DATA)
    return Lora(one_rank(factors), dict(getattr(tensors, "metadata", {})))


def patched_model(model: Any, tensors: Mapping[str, torch.Tensor]) -> Any:
    """A clone of a ``MODEL`` with the LoRA on it, through ComfyUI's own loading; the strength is in the LoRA already.

    Raises:
        LoraNotApplied: some of the modules are not the model's.
    """
    patched, _ = comfy.sd.load_lora_for_models(model, None, dict(tensors), 1.0, 0.0)
    applied = sum(map(len, patched.patches.values())) - sum(map(len, model.patches.values()))
    if applied != len(tensors) // 2:
        raise LoraNotApplied(applied, len(tensors) // 2)
    return patched


NODE_CLASS_MAPPINGS: Mapping[str, type] = {
    "ZImageI2L_PipelineLoader": PipelineLoader,
    "ZImageI2L_Apply": Apply,
    "ZImageI2L_Save": Save,
}
NODE_DISPLAY_NAME_MAPPINGS: Mapping[str, str] = {
    "ZImageI2L_PipelineLoader": "\U0001f527 Z-Image i2L Loader",
    "ZImageI2L_Apply": "\U0001f3a8 Z-Image i2L Apply",
    "ZImageI2L_Save": "\U0001f4be Save LoRA",
}
