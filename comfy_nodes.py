"""The ComfyUI nodes: ComfyUI's types in, i2l's calls, ComfyUI's types out.

Their ids, sockets and widgets are those of the original pack, as saved workflows hold them: ``comfy_host/inputs.py``.
docs/adr/0007 says why they are V1 nodes. ComfyUI imports this module; nothing else does.
"""

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from comfy.model_management import intermediate_device

from .comfy_host.engines import adapter_checkpoint, prepare_engines
from .comfy_host.folders import (
    DEFAULT_ADAPTER,
    adapter_names,
    adapter_path,
    engine_folders,
    free_lora_path,
    model_roots,
    new_preview,
    register_folders,
    root_of,
    shown_path,
)
from .comfy_host.heat_map import heat_map
from .comfy_host.inputs import (
    APPLY_OUTPUTS,
    CATEGORY,
    LOADER_ALIASES,
    PICTURE_ALIASES,
    PICTURE_OUTPUTS,
    SAVE_ALIASES,
    SEARCH_ALIASES,
    Inputs,
    apply_inputs,
    loader_inputs,
    picture_inputs,
    save_inputs,
)
from .comfy_host.node_text import node_text
from .comfy_host.patching import patched_model, positive_hooks
from .comfy_host.pictures.input_files import picture_is_there, picture_names, picture_sha256, read_picture
from .comfy_host.pictures.profiles import Prompt, profiles_mark
from .comfy_host.pipelines import OpenPipelines
from .comfy_host.progress import comfy_report, of_run, total_steps, whole
from .comfy_host.requirements import absent_packages, install_command, require_packages
from .comfy_host.tensors import LoraData, arrays_from_images, image_from_picture, lora_from_tensors, tensors_from_lora
from .lora.lowrank import reduce_lora
from .lora.norms import norm_table
from .machine.wording import GIB, format_bytes, format_path

log = logging.getLogger(__name__)
register_folders()
if absent := absent_packages():
    log.warning("i2l: %s not installed; close ComfyUI and run: %s", ", ".join(absent), install_command(absent))
open_pipelines = OpenPipelines()


class I2LPipeline(torch.nn.Module):
    """Stands for the open pipeline in ComfyUI's list of loaded models, and in its log."""


class PipelineLoader:
    """Names the adapter that Apply runs."""

    CATEGORY = CATEGORY
    DESCRIPTION = "Chooses the Z-Image-i2L adapter, a file in models/I2L/Z-Image, for Z-Image i2L Apply."
    SEARCH_ALIASES = LOADER_ALIASES
    RETURN_TYPES = ("ZI2L_FILE",)
    RETURN_NAMES = ("z_image_file_path",)
    OUTPUT_TOOLTIPS = ("The chosen file, for Z-Image i2L Apply.",)
    FUNCTION = "load"

    @classmethod
    def INPUT_TYPES(cls) -> Inputs:  # noqa: N802 - ComfyUI's name
        names = adapter_names() or [DEFAULT_ADAPTER]
        return loader_inputs(names, DEFAULT_ADAPTER if DEFAULT_ADAPTER in names else names[0])

    def load(self, model_filename: str) -> tuple[str]:
        with node_text():  # what is wrong with packages or files is said here, before the pictures are computed
            require_packages()
            path = adapter_path(model_filename)
            adapter_checkpoint(path)
        return (str(path),)


class LoadPicture:
    """A picture as ``i2l run`` reads it, which ComfyUI's Load Image does not: by its colour profile."""

    CATEGORY = CATEGORY
    DESCRIPTION = (
        "Loads a picture for Z-Image i2L Apply with the colours that a person sees: its colour profile is converted to "
        "sRGB, or ignored on request. Also reads HEIC and JPEG XL."
    )
    SEARCH_ALIASES = PICTURE_ALIASES
    RETURN_TYPES = ("IMAGE",)
    RETURN_NAMES = ("image",)
    OUTPUT_TOOLTIPS = PICTURE_OUTPUTS
    FUNCTION = "load"

    @classmethod
    def INPUT_TYPES(cls) -> Inputs:  # noqa: N802 - ComfyUI's name
        return picture_inputs(picture_names())

    @classmethod
    def IS_CHANGED(cls, image: str, ignore_icc: bool) -> str:  # noqa: ARG003, N802 - ComfyUI's form
        return picture_sha256(image)

    @classmethod
    def VALIDATE_INPUTS(cls, image: str) -> bool | str:  # noqa: N802 - ComfyUI's name
        return picture_is_there(image) or f"{image} is not in ComfyUI's input folder: put it there, then press R"

    def load(self, image: str, ignore_icc: bool) -> tuple[torch.Tensor]:
        with node_text():
            return (image_from_picture(read_picture(image, ignore_icc=ignore_icc)).to(intermediate_device()),)


class Apply:
    """Images to a LoRA: as data, on a model, and as hooks."""

    CATEGORY = CATEGORY
    DESCRIPTION = (
        "Turns images into one LoRA of rank four per image. The first run builds the engines in models/I2L/engines, "
        "which takes minutes; they are used from then on."
    )
    SEARCH_ALIASES = SEARCH_ALIASES
    RETURN_TYPES = ("MODEL", "lora_weights", "HOOKS")
    RETURN_NAMES = ("patched_model", "lora_data", "positive_hooks")
    OUTPUT_TOOLTIPS = APPLY_OUTPUTS
    FUNCTION = "apply"

    @classmethod
    def INPUT_TYPES(cls) -> Inputs:  # noqa: N802 - ComfyUI's name
        return apply_inputs()

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
        prompt: Prompt | None = None,
        unique_id: str = "",
    ) -> tuple[Any, LoraData, Any]:
        adapter = Path(z_image_file_path)
        home = root_of(adapter)
        roots = [home, *(root for root in model_roots() if root != home)]
        backend = "cpu" if use_cpu_for_vision else backend
        budget_bytes = round(vram_budget_gib * GIB) or None
        with node_text() as tell:
            arrays = arrays_from_images(images)
            with torch.inference_mode(mode=False):  # ComfyUI runs nodes in it, torch.export refuses it
                engines, manifest = prepare_engines(
                    adapter, roots, precision, tell, engine_folders(home), close=open_pipelines.close
                )
            opening = comfy_report(tell, whole, "")
            report = comfy_report(tell, of_run(total_steps(manifest, len(images))), "computing ")
            with open_pipelines.use(
                engines, manifest, backend, budget_bytes, opening, report, I2LPipeline()
            ) as pipeline:
                lora = pipeline.lora_from_images(arrays, strength=strength)
            lora.metadata |= profiles_mark(prompt, unique_id)
            reduced = ""
            if rank:
                lora, reduction = reduce_lora(lora, rank)
                reduced = f"; {reduction}"
            data, own = tensors_from_lora(lora, "diffsynth"), tensors_from_lora(lora, "comfyui")
            seconds, known = sum(pipeline.timings.seconds.values()), sum(pipeline.from_cache)
            pictures = f"{len(images)} picture{'s'[: len(images) != 1]}"
            data.made = f"from {pictures} ({known} known before) in {seconds:.1f} s{reduced}"
            patched = None if model is None else patched_model(model, own)
            tell(f"rank {lora.rank} {data.made}")
            backend_is = f"backend {pipeline.backend_name} ({pipeline.backend_reason})"
            log.info("i2l: rank %d %s, %s", lora.rank, data.made, backend_is)
        return patched, data, positive_hooks(own)


class Save:
    """A LoRA to a file that Load LoRA and other programs read."""

    CATEGORY = CATEGORY
    DESCRIPTION = (
        "Saves to output/loras, where Load LoRA finds the file, and shows how much it changes each weight. A name that "
        "is taken gets a number."
    )
    SEARCH_ALIASES = SAVE_ALIASES
    RETURN_TYPES = ()
    FUNCTION = "save"
    OUTPUT_NODE = True

    @classmethod
    def INPUT_TYPES(cls) -> Inputs:  # noqa: N802 - ComfyUI's name
        return save_inputs()

    def save(self, lora_data: Mapping[str, torch.Tensor], filename: str) -> dict[str, Any]:
        with node_text() as tell:
            lora = lora_from_tensors(lora_data)
            path = lora.save(free_lora_path(filename))
            size, made = format_bytes(path.stat().st_size), getattr(lora_data, "made", "")
            tell(f"{shown_path(path)}\nrank {lora.rank}, {size} {made}".rstrip())
            log.info("i2l: saved %s, rank %d", format_path(path), lora.rank)
            picture, preview = new_preview()
            heat_map(norm_table(lora), f"{path.stem}, rank {lora.rank}").save(picture)
        return {"ui": {"text": [str(path)], "images": [preview]}}


NODE_CLASS_MAPPINGS: Mapping[str, type] = {
    "ZImageI2L_PipelineLoader": PipelineLoader,
    "ZImageI2L_Apply": Apply,
    "ZImageI2L_Save": Save,
    "ZImageI2L_LoadPicture": LoadPicture,
}
NODE_DISPLAY_NAME_MAPPINGS: Mapping[str, str] = {
    "ZImageI2L_PipelineLoader": "\U0001f527 Z-Image i2L Loader",
    "ZImageI2L_Apply": "\U0001f3a8 Z-Image i2L Apply",
    "ZImageI2L_Save": "\U0001f4be Save Z-Image i2L LoRA",
    "ZImageI2L_LoadPicture": "\U0001f5bc Z-Image i2L Load Picture",
}
WEB_DIRECTORY = "./comfy_web"
"""Help pages, which the frontend finds in ``docs`` by the node's id."""
