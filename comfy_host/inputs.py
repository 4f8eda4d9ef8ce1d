"""What the nodes ask for, in ComfyUI's own form, and what it shows about each input.

Saved workflows hold a node's widget values by position, and two booleans stood behind ``strength`` in earlier packs:
the values may be ``[strength]``, ``[strength, bool]`` or ``[strength, bool, bool]``. So these two stay where they were,
every new widget comes after them, and all are optional, so that prompts sent through the API need none. All but
``strength`` are ``advanced``: the frontend hides them at first, so a node is no higher than in the saved workflow.
"""

from typing import Any, TypeAlias

from ..engines.backends import BACKENDS

Inputs: TypeAlias = dict[str, dict[str, Any]]
CATEGORY = "Z-Image-i2L"
SEARCH_ALIASES = ("image to lora", "picture to lora", "style lora", "lora from images", "i2l")
"""What people type who do not know the name of Apply."""
LOADER_ALIASES = tuple(f"{alias}: load" for alias in SEARCH_ALIASES)
SAVE_ALIASES = (*(f"{alias}: save" for alias in SEARCH_ALIASES), "save lora")
"""Longer, so that the other nodes stand behind Apply in what a search finds."""
PICTURE_ALIASES = (
    *(f"{alias}: picture" for alias in SEARCH_ALIASES),
    *("load heic", "load jpeg xl", "colour profile", "color profile", "icc profile"),
)


def loader_inputs(names: list[str], default: str) -> Inputs:
    """The Loader's, for the adapter files that are there."""
    tooltip = "The Z-Image-i2L adapter. Put the file into models/I2L/Z-Image, then press R."
    return {"required": {"model_filename": (names, {"default": default, "tooltip": tooltip})}}


def picture_inputs(names: list[str]) -> Inputs:
    """Load Picture's, for the files that are there."""
    return {
        "required": {
            "image": (
                names,
                {
                    "image_upload": True,
                    "tooltip": "A file in ComfyUI's input folder. HEIC and JPEG XL: put it there, then press R.",
                },
            ),
            "ignore_icc": (
                "BOOLEAN",
                {
                    "default": False,
                    "tooltip": "Take the pixels for sRGB whatever colour profile the file carries, as Load Image and "
                    "the original do. The LoRA's metadata (i2l.icc) says which was done.",
                },
            ),
        },
    }


PICTURE_OUTPUTS = ("The picture, upright and in sRGB, for Apply or Batch Images.",)


def apply_inputs() -> Inputs:
    """Apply's; the prompt tells where the pictures come from."""
    return {
        "hidden": {"prompt": "DYNPROMPT", "unique_id": "UNIQUE_ID"},
        "required": {
            "z_image_file_path": ("ZI2L_FILE", {"tooltip": "From Z-Image i2L Loader."}),
            "images": (
                "IMAGE",
                {"tooltip": "One to eight pictures of one style, four are a good number; Batch Images joins them."},
            ),
            "strength": (
                "FLOAT",
                {
                    "default": 1.0,
                    "min": 0.0,
                    "max": 10.0,
                    "step": 0.1,
                    "tooltip": "The LoRA's effect, linear. It is part of the LoRA: load that with strength 1.",
                },
            ),
        },
        "optional": {
            "model": (
                "MODEL",
                {"tooltip": "A Z-Image model, which patched_model gives back with the LoRA on it."},
            ),
            "use_cpu_for_vision": (
                "BOOLEAN",
                {"default": False, "advanced": True, "tooltip": "Compute on the CPU, whatever is there."},
            ),
            "vram_optimization": (
                "BOOLEAN",
                {
                    "default": True,
                    "advanced": True,
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
                    "advanced": True,
                    "tooltip": "For GPU backends; 0 leaves it to i2l. No effect on the CPU.",
                },
            ),
            "precision": (
                ["auto", "int8", "fp8", "bf16", "fp32"],
                {
                    "default": "auto",
                    "advanced": True,
                    "tooltip": "Of the engines. Each precision used is built once and kept on disk.",
                },
            ),
            "rank": (
                "INT",
                {
                    "default": 0,
                    "min": 0,
                    "max": 256,
                    "advanced": True,
                    "tooltip": "Reduce the LoRA to this rank: a smaller file. 0 keeps four per picture.",
                },
            ),
            "backend": (
                ["auto", *BACKENDS],
                {
                    "default": "auto",
                    "advanced": True,
                    "tooltip": "Where to compute. auto: the best that is proven on this machine. webgpu: any card; it "
                    "needs pip install onnxruntime-ep-webgpu in ComfyUI's Python.",
                },
            ),
        },
    }


APPLY_OUTPUTS = (
    "The model with the LoRA on it, for both branches of the sampler. Nothing if no model is connected.",
    "The LoRA, for Save Z-Image i2L LoRA.",
    "The LoRA for the positive branch alone: to hooks of Cond Set Props. The sampler then takes the plain model.",
)
"""Tooltips, in the order of the sockets."""


def save_inputs() -> Inputs:
    """Save's."""
    return {
        "required": {
            "lora_data": ("lora_weights", {"tooltip": "From Z-Image i2L Apply."}),
            "filename": (
                "STRING",
                {
                    "default": "z_image_style_lora",
                    "tooltip": "Below output/loras; or in subfolders: portraits/style.",
                },
            ),
        },
    }
