"""i2l turns a picture into a LoRA for the Z-Image diffusion model.

    import i2l

    with i2l.open_engines("engines") as pipeline:
        pipeline.lora_from_images(["photo.jpg"]).save("photo.safetensors")

Importing this package imports nothing heavy: the names below are resolved at their first use. So does ComfyUI, for
which this folder is a node pack: it asks for ``NODE_CLASS_MAPPINGS`` and what belongs to it, and nobody else does.
"""

import os
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .lora.lora import Lora
    from .machine.errors import I2LError
    from .runtime.pipeline import Pipeline, open_engines

__all__ = ["I2LError", "Lora", "Pipeline", "__version__", "open_engines"]
__version__ = "0.1.0"

# From 1.29 on onnxruntime's builds for Linux and macOS tell their maker of every session, over the network, and keep an
# id of the user in the home directory. It asks this variable once, when it is imported; 0 in it lets them.
os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")

_HOMES = {
    "I2LError": "machine.errors",
    "NODE_CLASS_MAPPINGS": "comfy_nodes",
    "NODE_DISPLAY_NAME_MAPPINGS": "comfy_nodes",
    "WEB_DIRECTORY": "comfy_nodes",
    "Lora": "lora.lora",
    "Pipeline": "runtime.pipeline",
    "open_engines": "runtime.pipeline",
}


def __getattr__(name: str) -> Any:
    """Import a public name when it is first used (PEP 562)."""
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module  # noqa: PLC0415 - keeps the package import free of work

    return getattr(import_module(f".{_HOMES[name]}", __name__), name)
