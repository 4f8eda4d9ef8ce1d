"""Tensors between ComfyUI's sockets and i2l: ``IMAGE`` to arrays, a LoRA to ``lora_weights`` and back."""

from collections.abc import Mapping
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image

from ..lora.errors import LoraNotASum
from ..lora.keys import KEYS, KeyFormat, parse_keys
from ..lora.lora import Lora, converted
from ..lora.reading import factors_of, one_rank
from .errors import ImagesUnfit, LoraDataForeign

LORA_DATA = Path("lora_data")
"""How messages call what comes through that socket."""


class LoraData(dict[str, torch.Tensor]):
    """What goes through a ``lora_weights`` socket: bfloat16 tensors under DiffSynth's keys, and the file's metadata."""

    metadata: Mapping[str, str]
    made: str = ""
    """From what and how fast, for people."""


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


def image_from_picture(picture: Image.Image) -> torch.Tensor:
    """``IMAGE`` [1, height, width, 3] of a picture of mode ``RGB``, float32, from which each value comes back."""
    return torch.from_numpy(np.asarray(picture, np.float32) / 255)[None]


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
