"""The tensors of a checkpoint of each spec: their names, as published, and their shapes."""

import hashlib
from collections.abc import Mapping

from ...engines.directory.tensorfile import TensorInfo
from ...specs import AdapterSpec, EncoderSpec, Spec

Shapes = Mapping[str, tuple[int, ...]]


def shapes_of(tensors: Mapping[str, TensorInfo]) -> dict[str, tuple[int, ...]]:
    """``name -> shape``."""
    return {name: info.shape for name, info in tensors.items()}


def shape_hash(shapes: Shapes) -> str:
    """MD5 over the sorted strings ``key:d0_d1`` and ``key`` joined by commas: how DiffSynth names a model's form."""
    words = [f"{name}:{'_'.join(map(str, shape))}" for name, shape in shapes.items()] + list(shapes)
    return hashlib.md5(",".join(sorted(words)).encode(), usedforsecurity=False).hexdigest()


def tensor_shapes(spec: Spec) -> dict[str, tuple[int, ...]]:
    """Every key of a checkpoint of this spec with its shape, in the published key style."""
    if isinstance(spec, AdapterSpec):
        return _adapter_shapes(spec)
    return _siglip2_shapes(spec) if spec.family == "siglip2" else _dinov3_shapes(spec)


def _linear(name: str, out_features: int, in_features: int, *, bias: bool = True) -> dict[str, tuple[int, ...]]:
    shapes: dict[str, tuple[int, ...]] = {f"{name}.weight": (out_features, in_features)}
    return shapes | {f"{name}.bias": (out_features,)} if bias else shapes


def _norm(name: str, width: int) -> dict[str, tuple[int, ...]]:
    return {f"{name}.weight": (width,), f"{name}.bias": (width,)}


def _siglip2_shapes(spec: EncoderSpec) -> dict[str, tuple[int, ...]]:
    width, inner = spec.hidden, spec.intermediate
    shapes: dict[str, tuple[int, ...]] = {
        "embeddings.patch_embedding.weight": (width, 3, spec.patch, spec.patch),
        "embeddings.patch_embedding.bias": (width,),
        "embeddings.position_embedding.weight": (spec.tokens, width),
    }
    for index in range(spec.depth):
        layer = f"encoder.layers.{index}"
        shapes |= _norm(f"{layer}.layer_norm1", width)
        for name in ("q_proj", "k_proj", "v_proj", "out_proj"):
            shapes |= _linear(f"{layer}.self_attn.{name}", width, width)
        shapes |= _norm(f"{layer}.layer_norm2", width)
        shapes |= _linear(f"{layer}.mlp.fc1", inner, width) | _linear(f"{layer}.mlp.fc2", width, inner)
    shapes |= _norm("post_layernorm", width)
    shapes |= {"head.probe": (1, 1, width), "head.attention.in_proj_weight": (3 * width, width)}
    shapes |= {"head.attention.in_proj_bias": (3 * width,)} | _linear("head.attention.out_proj", width, width)
    shapes |= _norm("head.layernorm", width)
    return shapes | _linear("head.mlp.fc1", inner, width) | _linear("head.mlp.fc2", width, inner)


def _dinov3_shapes(spec: EncoderSpec) -> dict[str, tuple[int, ...]]:
    width, inner = spec.hidden, spec.intermediate
    shapes: dict[str, tuple[int, ...]] = {
        "embeddings.cls_token": (1, 1, width),
        "embeddings.register_tokens": (1, spec.registers, width),
        "embeddings.mask_token": (1, 1, width),
        "embeddings.patch_embeddings.weight": (width, 3, spec.patch, spec.patch),
        "embeddings.patch_embeddings.bias": (width,),
    }
    for index in range(spec.depth):
        layer = f"layer.{index}"
        shapes |= _norm(f"{layer}.norm1", width) | _norm(f"{layer}.norm2", width)
        for name in ("q_proj", "k_proj", "v_proj"):
            shapes |= _linear(f"{layer}.attention.{name}", width, width, bias=False)
        shapes |= _linear(f"{layer}.attention.o_proj", width, width)
        shapes |= _linear(f"{layer}.mlp.gate_proj", inner, width) | _linear(f"{layer}.mlp.up_proj", inner, width)
        shapes |= _linear(f"{layer}.mlp.down_proj", width, inner)
        shapes |= {f"{layer}.layer_scale{n}.lambda1": (width,) for n in (1, 2)}
    return shapes | _norm("norm", width)


def _adapter_shapes(spec: AdapterSpec) -> dict[str, tuple[int, ...]]:
    shapes: dict[str, tuple[int, ...]] = {}
    for component, blocks in spec.components:
        for order, (_, targets) in enumerate(spec.kinds):
            for index in range(blocks):
                block = f"{spec.checkpoint_blocks(component)}.{order * blocks + index}"
                for target, (_, in_features, out_features) in enumerate(targets):
                    for factor, width in (("a", in_features), ("b", out_features)):
                        name = f"{block}.layers.{target}.proj_{factor}"
                        shapes |= _linear(f"{name}.proj_in", spec.compress, spec.embedding, bias=False)
                        shapes |= _linear(f"{name}.proj_out", width * spec.rank, spec.compress, bias=False)
    return shapes
