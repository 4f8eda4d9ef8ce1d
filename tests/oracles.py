"""Other people's implementations, made importable, for the tests to compare against."""

import importlib
import importlib.util
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file

from i2l.export.checkpoints.finding import find_checkpoints
from i2l.lora.lora import Lora
from i2l.lora.lowrank import product_error
from i2l.runtime.passes import ENCODERS
from i2l.specs import AdapterSpec, EncoderSpec, Family, Spec

TOLERANCES = {
    "fp32": 1e-4,  # the bound; two float32 programs differ by summation order, 1e-6 observed
    "bf16": 5e-2,  # weights rounded to 8 bits of mantissa where the checkpoint is float32; 0.5 % observed
    "int8": 0.12,  # 3 % observed
    "fp8": 0.25,  # e4m3 has 3 bits of mantissa: 2.6 % per product, and the CPU's int8 on top
}
"""Relative error of ``B @ A`` of the worst module, by the precision of the packs."""
_SCHEMAS: list[torch.library.Library] = []
"""Kept alive: a library that is collected takes its operators along."""


def import_torchvision() -> ModuleType:
    """Imports torchvision, also where its compiled operators do not fit the installed torch.

    torchvision registers shape functions for two of its C++ operators while it is imported, which fails where the
    operators are absent (a CPU torch beside a CUDA torchvision). Declaring them is enough: images are processed by
    torch and Pillow alone. Call it before importing anything of transformers that wants torchvision.
    """
    if not _SCHEMAS and not _compiled_operators_load():
        library = torch.library.Library("torchvision", "DEF")
        for name in ("nms", "qnms"):
            library.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        _SCHEMAS.append(library)
    return importlib.import_module("torchvision")


def _compiled_operators_load() -> bool:
    spec = importlib.util.find_spec("torchvision")
    if spec is None or spec.origin is None:
        raise ModuleNotFoundError("No module named 'torchvision'", name="torchvision")
    try:
        for path in Path(spec.origin).parent.glob("_C*.so"):
            torch.ops.load_library(path)
    except OSError:
        return False
    return hasattr(torch.ops.torchvision, "nms")


def encoder_oracle(
    spec: Spec, checkpoint: Path, dtype: torch.dtype = torch.float32
) -> Callable[[torch.Tensor], torch.Tensor]:
    """``pixels [B, 3, S, S] -> embedding [B, hidden]`` by transformers, from a checkpoint's published keys."""
    assert isinstance(spec, EncoderSpec)
    model = encoder_model(spec, {name: tensor.to(dtype) for name, tensor in load_file(checkpoint).items()})

    @torch.inference_mode()
    def run(pixels: torch.Tensor) -> torch.Tensor:
        return model(pixels).pooler_output

    return run


def encoder_model(spec: EncoderSpec, values: dict[str, torch.Tensor]) -> Any:
    """transformers' vision model with the values of a checkpoint's published keys."""
    import_torchvision()  # transformers imports it for its vision models
    from transformers.initialization import no_init_weights

    if spec.family == "siglip2":
        from transformers import SiglipVisionConfig, SiglipVisionModel

        config: Any = SiglipVisionConfig(
            hidden_size=spec.hidden,
            intermediate_size=spec.intermediate,
            num_hidden_layers=spec.depth,
            num_attention_heads=spec.heads,
            image_size=spec.image_size,
            patch_size=spec.patch,
            layer_norm_eps=spec.norm_eps,
            hidden_act="gelu_pytorch_tanh",
        )
        kind: Any = SiglipVisionModel
    else:
        from transformers import DINOv3ViTConfig, DINOv3ViTModel

        config = DINOv3ViTConfig(
            hidden_size=spec.hidden,
            intermediate_size=spec.intermediate,
            num_hidden_layers=spec.depth,
            num_attention_heads=spec.heads,
            image_size=spec.image_size,
            patch_size=spec.patch,
            num_register_tokens=spec.registers,
            layer_norm_eps=spec.norm_eps,
            rope_theta=spec.rope_theta,
            hidden_act="silu",
            use_gated_mlp=True,
            query_bias=False,
            key_bias=False,
            value_bias=False,
            proj_bias=True,
            mlp_bias=True,
        )
        kind = DINOv3ViTModel
    with no_init_weights():
        model = kind(config)
    _load_published(model, values)
    return model.eval()


def adapter_oracle(
    spec: Spec, checkpoint: Path, dtype: torch.dtype = torch.float32
) -> Callable[[torch.Tensor], dict[str, torch.Tensor]]:
    """``embedding [embedding] -> LoRA tensors`` of one image by DiffSynth's own adapter code, in DiffSynth's keys.

    The published model has its sizes written into its constructor; other sizes go through the class that it is made of.
    """
    assert isinstance(spec, AdapterSpec)
    if spec.diffusion_model == "qwen-image":
        return _qwen_image_oracle(spec, checkpoint, dtype)
    adapter = diffsynth_module("models.z_image_image2lora")
    model = torch.nn.Module()
    patterns = [list(spec.attention_targets), list(spec.feed_forward_targets)]
    for prefix, blocks in spec.components:
        component = adapter.ZImageImage2LoRAComponent(
            lora_patterns=[],
            prefix=prefix,
            num_blocks=blocks,
            use_residual=False,
            compress_dim=spec.compress,
            rank=spec.rank,
        )
        component.blocks = torch.nn.ModuleList(
            adapter.LoRATrainerBlock(
                pattern,
                in_dim=spec.embedding,
                compress_dim=spec.compress,
                rank=spec.rank,
                block_id=block,
                use_residual=False,
                prefix=prefix,
            )
            for pattern in patterns
            for block in range(blocks)
        )
        model.add_module(f"{prefix}_lora", component)
    values = {name: tensor.to(dtype) for name, tensor in load_file(checkpoint).items()}
    model.load_state_dict(values, assign=True)

    @torch.inference_mode()
    def run(embedding: torch.Tensor) -> dict[str, torch.Tensor]:
        lora: dict[str, torch.Tensor] = {}
        for component in model.children():
            lora |= component(embedding[None])
        return lora

    return run


def _qwen_image_oracle(
    spec: AdapterSpec, checkpoint: Path, dtype: torch.dtype
) -> Callable[[torch.Tensor], dict[str, torch.Tensor]]:
    """The ancestor's class, its blocks made at the spec's sizes; the targets are read from the published class."""
    adapter = diffsynth_module("models.qwen_image_image2lora")
    with torch.device("meta"):
        model = adapter.QwenImageImage2LoRAModel(num_blocks=1, use_residual=False, compress_dim=64)
    sizes = {3072: spec.hidden, 3072 * 4: spec.feed_forward, 3072 * 6: 6 * spec.hidden}
    model.blocks = torch.nn.ModuleList(
        adapter.LoRATrainerBlock(
            [(name, sizes[wide], sizes[tall]) for name, wide, tall in pattern],
            in_dim=spec.embedding,
            compress_dim=spec.compress,
            rank=spec.rank,
            block_id=block,
            use_residual=False,
        )
        for pattern in model.lora_patterns
        for block in range(spec.layers)
    )
    model.load_state_dict({name: tensor.to(dtype) for name, tensor in load_file(checkpoint).items()}, assign=True)

    @torch.inference_mode()
    def run(embedding: torch.Tensor) -> dict[str, torch.Tensor]:
        lora: dict[str, torch.Tensor] = model(embedding[None])
        return lora

    return run


def oracle_lora(
    models: Path, pixels: Mapping[Family, np.ndarray]
) -> tuple[np.ndarray, dict[str, tuple[np.ndarray, np.ndarray]]]:
    """Embeddings, and the factors of all images joined the way the reference does."""
    checkpoints = find_checkpoints(models)
    embeddings = torch.cat(
        [
            encoder_oracle(checkpoints[family].spec, checkpoints[family].path)(torch.from_numpy(pixels[family]))
            for family in ENCODERS
        ],
        dim=1,
    )
    adapter = adapter_oracle(checkpoints["adapter"].spec, checkpoints["adapter"].path)
    loras = [adapter(embedding) for embedding in embeddings]
    factors = {}
    for key in loras[0]:
        if key.endswith(".lora_A.default.weight"):
            module = key.removesuffix(".lora_A.default.weight")
            a = torch.cat([lora[key] for lora in loras]) / len(loras)
            b = torch.cat([lora[f"{module}.lora_B.default.weight"] for lora in loras], dim=1)
            factors[module] = (a.numpy(), b.numpy())
    return embeddings.numpy(), factors


def relative_error(found: np.ndarray, wanted: np.ndarray) -> float:
    return float(np.linalg.norm(found - wanted) / np.linalg.norm(wanted))


def worst_module(lora: Lora, factors: dict[str, tuple[np.ndarray, np.ndarray]]) -> float:
    assert lora.factors.keys() == factors.keys()
    return max(product_error(lora.factors[module], factors[module]) for module in factors)


def _load_published(model: torch.nn.Module, values: dict[str, torch.Tensor]) -> None:
    """Load the published keys, which lack the prefixes that transformers 5 puts before them."""
    renamed = {}
    for wanted in model.state_dict():
        suffix = next(
            key
            for key in (wanted, wanted.removeprefix("model."), wanted.removeprefix("vision_model."))
            if key in values
        )
        renamed[wanted] = values.pop(suffix)
    assert not values, f"not in the oracle: {list(values)[:5]}"
    model.load_state_dict(renamed, assign=True)


def diffsynth_module(name: str) -> ModuleType:
    """One file of DiffSynth; importing the package would want far more than that file does."""
    if "diffsynth" not in sys.modules:
        spec = importlib.util.find_spec("diffsynth")
        assert spec is not None
        assert spec.origin is not None
        for folder in (".", "models", "utils", "utils/lora"):
            package = f"diffsynth.{folder.replace('/', '.')}".rstrip(".")
            module = ModuleType(package)
            module.__path__ = [str(Path(spec.origin).parent / folder)]
            sys.modules[package] = module
    return importlib.import_module(f"diffsynth.{name}")
