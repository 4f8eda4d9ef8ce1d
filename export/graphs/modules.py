"""The torch modules that become graphs: each model cut into embed, block and head, weights as arguments.

A module holds no parameters. ``forward`` takes the activations and a dictionary of weights, so that the exported graph
has the weights as inputs and one graph serves all blocks. The linears come from the precision. They see two dimensions,
``[batch * tokens, channels]``: with three, TensorRT keeps hidden copies of the weights (measured). What a linear gives
may have 16 bits on a GPU; norms, residual stream and outputs are float32 everywhere.

Shapes: B images, T tokens, D channels of the residual stream, H heads, C compressed channels of the adapter.
"""

import math

import torch
import torch.nn.functional as F  # noqa: N812 - the usual name
from torch import Tensor, nn

from ...specs import AdapterSpec, EncoderSpec, Spec, Target
from ..precisions.base import Precision, Weights


def graph_modules(spec: Spec, precision: Precision) -> dict[str, nn.Module]:
    """``graph name -> module`` of a model."""
    if isinstance(spec, AdapterSpec):
        return {f"adapter.{kind}": AdapterBlock(spec, targets, precision) for kind, targets in spec.kinds}
    if spec.family == "siglip2":
        return {
            "siglip2.embed": Siglip2Embed(spec, precision),
            "siglip2.block": Siglip2Block(spec, precision),
            "siglip2.head": Siglip2Head(spec, precision),
        }
    return {
        "dinov3.embed": Dinov3Embed(spec, precision),
        "dinov3.block": Dinov3Block(spec, precision),
        "dinov3.head": Dinov3Head(spec),
    }


def patches(pixel_values: Tensor, spec: EncoderSpec) -> Tensor:
    """``[B, 3, S, S] -> [B * patches, 3 * patch * patch]``: a strided convolution as rows for one product."""
    side, patch = spec.grid, spec.patch
    tiles = pixel_values.reshape(-1, 3, side, patch, side, patch).permute(0, 2, 4, 1, 3, 5)
    return tiles.reshape(-1, 3 * patch * patch)


def layer_norm(x: Tensor, weights: Weights, name: str, eps: float) -> Tensor:
    """The norm ``name`` over the last dimension, in the dtype of its weights."""
    weight, bias = weights[f"{name}.weight"], weights[f"{name}.bias"]
    return F.layer_norm(x.to(weight.dtype), x.shape[-1:], weight, bias, eps)


class Siglip2Embed(nn.Module):
    """Patches through the projection, plus the learned positions."""

    def __init__(self, spec: EncoderSpec, precision: Precision) -> None:
        super().__init__()
        self.spec = spec
        self.patch = precision.patch()

    def forward(self, pixel_values: Tensor, weights: Weights) -> Tensor:
        x = self.patch(patches(pixel_values, self.spec), weights)
        return x.view(-1, self.spec.tokens, self.spec.hidden) + weights["position"]


class Siglip2Block(nn.Module):
    """Pre-norm attention and a tanh-GELU MLP."""

    def __init__(self, spec: EncoderSpec, precision: Precision) -> None:
        super().__init__()
        self.spec = spec
        self.qkv = precision.linear("attention.qkv", spec.hidden)
        self.out = precision.linear("attention.out", spec.hidden)
        self.up = precision.linear("mlp.up", spec.hidden)
        self.down = precision.linear("mlp.down", spec.intermediate)

    def forward(self, hidden_in: Tensor, weights: Weights) -> Tensor:
        spec = self.spec
        x = layer_norm(hidden_in, weights, "norm1", spec.norm_eps).view(-1, spec.hidden)
        q, k, v = self.qkv.heads(x, weights, 3, spec.heads, spec.tokens)  # each [B, H, T, D/H]
        attended = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(-1, spec.hidden)
        hidden = hidden_in + self.out(attended, weights).view(-1, spec.tokens, spec.hidden)
        x = layer_norm(hidden, weights, "norm2", spec.norm_eps).view(-1, spec.hidden)
        (up,) = self.up.spread(x, weights, 1)
        x = self.down.gathered(F.gelu(up, approximate="tanh"), weights)
        return hidden + x.view(-1, spec.tokens, spec.hidden)


class Siglip2Head(nn.Module):
    """Attention pooling: one learned probe looks at all tokens."""

    def __init__(self, spec: EncoderSpec, precision: Precision) -> None:
        super().__init__()
        self.spec = spec
        self.q = precision.linear("attention.q", spec.hidden)
        self.kv = precision.linear("attention.kv", spec.hidden)
        self.out = precision.linear("attention.out", spec.hidden)
        self.up = precision.linear("mlp.up", spec.hidden)
        self.down = precision.linear("mlp.down", spec.intermediate)

    def forward(self, hidden_in: Tensor, weights: Weights) -> Tensor:
        spec = self.spec
        x = layer_norm(hidden_in, weights, "norm", spec.norm_eps).view(-1, spec.hidden)
        q = self.q(weights["probe"], weights).view(1, spec.heads, 1, spec.head_dim)
        k, v = self.kv.heads(x, weights, 2, spec.heads, spec.tokens)
        q = q.expand(k.shape[0], -1, -1, -1)
        pooled = F.scaled_dot_product_attention(q, k, v).reshape(-1, spec.hidden)  # [B, D]: the probe is one token
        pooled = self.out(pooled, weights).to(hidden_in.dtype)
        x = layer_norm(pooled, weights, "norm2", spec.norm_eps)
        x = F.gelu(self.up(x, weights), approximate="tanh")
        return pooled + self.down(x, weights)


class Dinov3Embed(nn.Module):
    """CLS and register tokens, then the patches through the projection."""

    def __init__(self, spec: EncoderSpec, precision: Precision) -> None:
        super().__init__()
        self.spec = spec
        self.patch = precision.patch()

    def forward(self, pixel_values: Tensor, weights: Weights) -> Tensor:
        x = self.patch(patches(pixel_values, self.spec), weights)
        x = x.view(-1, self.spec.grid**2, self.spec.hidden)
        return torch.cat([weights["prefix"].unsqueeze(0).expand(x.shape[0], -1, -1), x], dim=1)


class Dinov3Block(nn.Module):
    """Pre-norm attention with rotary positions and a SiLU-gated MLP, each with LayerScale."""

    rotary_cos: Tensor
    rotary_sin: Tensor
    positions: Tensor

    def __init__(self, spec: EncoderSpec, precision: Precision) -> None:
        super().__init__()
        self.spec = spec
        self.qkv = precision.linear("attention.qkv", spec.hidden)
        self.out = precision.linear("attention.out", spec.hidden)
        self.gate_up = precision.linear("mlp.gate_up", spec.hidden)
        self.down = precision.linear("mlp.down", spec.intermediate)
        cos, sin = rotary_tables(spec)
        self.register_buffer("rotary_cos", cos)
        self.register_buffer("rotary_sin", sin)
        self.register_buffer("positions", torch.arange(spec.tokens).unsqueeze(0))

    def forward(self, hidden_in: Tensor, weights: Weights) -> Tensor:
        spec = self.spec
        x = layer_norm(hidden_in, weights, "norm1", spec.norm_eps).view(-1, spec.hidden)
        q, k, v = self.qkv.heads(x, weights, 3, spec.heads, spec.tokens)  # each [B, H, T, D/H]
        attended = F.scaled_dot_product_attention(self.rotate(q), self.rotate(k), v)
        x = self.out(attended.transpose(1, 2).reshape(-1, spec.hidden), weights)
        hidden = hidden_in + x.view(-1, spec.tokens, spec.hidden) * weights["scale1"]
        x = layer_norm(hidden, weights, "norm2", spec.norm_eps).view(-1, spec.hidden)
        gate, up = self.gate_up.spread(x, weights, 2)
        x = self.down.gathered(F.silu(gate) * up, weights)
        return hidden + x.view(-1, spec.tokens, spec.hidden) * weights["scale2"]

    def rotate(self, x: Tensor) -> Tensor:
        positions = self.positions.expand(x.shape[0], -1)
        exact = x.to(self.rotary_cos.dtype)
        return torch.onnx.ops.rotary_embedding(exact, self.rotary_cos, self.rotary_sin, positions).to(x.dtype)


class Dinov3Head(nn.Module):
    """The final norm of the CLS token."""

    def __init__(self, spec: EncoderSpec) -> None:
        super().__init__()
        self.spec = spec

    def forward(self, hidden_in: Tensor, weights: Weights) -> Tensor:
        return layer_norm(hidden_in[:, 0], weights, "norm", self.spec.norm_eps)


class AdapterBlock(nn.Module):
    """The factors A and B of all target linears of one kind of adapter block.

    Outputs, per target: A ``[B, rank, in_features]`` and B ``[B, out_features, rank]``.
    """

    def __init__(self, spec: AdapterSpec, targets: tuple[Target, ...], precision: Precision) -> None:
        super().__init__()
        self.spec = spec
        self.targets = targets
        self.proj_in = precision.linear("proj_in", spec.embedding)
        self.names = [f"{target}.{factor}" for target, _, _ in targets for factor in "AB"]
        self.proj_out = precision.linears(self.names, spec.compress)

    def forward(self, embedding: Tensor, weights: Weights) -> dict[str, Tensor]:
        compressed = self.proj_in(embedding, weights).view(-1, 2 * len(self.targets), self.spec.compress)
        rank = self.spec.rank
        shapes = {f"{target}.A": (rank, in_features) for target, in_features, _ in self.targets}
        shapes |= {f"{target}.B": (out_features, rank) for target, _, out_features in self.targets}
        outputs = self.proj_out(compressed, weights, [shapes[name] for name in self.names])
        return {name: y.to(embedding.dtype) for name, y in zip(self.names, outputs, strict=True)}


def rotary_tables(spec: EncoderSpec) -> tuple[Tensor, Tensor]:
    """Cosine and sine ``[T, D/H/2]`` of DINOv3's 2-D rotary positions: channel i of a head turns with i + D/H/2.

    Patch centres run over [-1, 1] in y and x; a quarter of the head's channels turns with each. CLS and register tokens
    have no position: cosine 1 and sine 0 leave them as they are, which saves splitting and joining q and k in every
    block.
    """
    centres = (torch.arange(spec.grid, dtype=torch.float32) + 0.5) / spec.grid * 2 - 1
    yx = torch.stack(torch.meshgrid(centres, centres, indexing="ij"), dim=-1).view(-1, 2, 1)
    frequencies = spec.rope_theta ** -torch.arange(0, 1, 4 / spec.head_dim, dtype=torch.float32)
    angles = (2 * math.pi * yx * frequencies).flatten(1)
    prefix = torch.zeros(spec.prefix_tokens, spec.head_dim // 2)
    angles = torch.cat([prefix, angles])  # an angle of 0 has cosine 1 and sine 0
    return angles.cos(), angles.sin()
