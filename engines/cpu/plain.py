"""What a step must give: the same arithmetic in plain numpy and float32, from whatever a pack holds.

Written apart from the graphs, and with their weights: so it tells what a backend computes from what its precision
rounds. Weights are taken back to float32 exactly, nothing is quantised on the way, and nothing is fused. An int8 matrix
stays in its rotated basis, where the activations are brought instead: one product less.

Shapes: B images, T tokens, D channels, H heads, R = B T rows.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from ...specs import AdapterSpec, EncoderSpec, Spec
from ..base import Array
from ..directory.dtypes import ELEMENT_TYPES
from ..directory.manifest import Model, Step, inputs_of
from ..directory.tensorfile import TensorInfo
from .rotation import balanced_rotation, rotate, rotation
from .transcode import VALUES

Held: TypeAlias = NDArray[Any]


@dataclass(frozen=True)
class HeldWeights:
    """A step's tensors as a pack holds them."""

    infos: Mapping[str, TensorInfo]
    arrays: Mapping[str, Held]

    def vector(self, name: str) -> Array:
        """A tensor that every precision keeps in float32."""
        assert self.infos[name].dtype == "F32"
        return np.asarray(self.arrays[name], np.float32)

    def product(self, x: Array, name: str) -> Array:
        """``[R, in] -> [R, out]``: times the matrix ``name``, plus its bias if there is one."""
        info, held = self.infos[f"{name}.weight"], self.arrays[f"{name}.weight"]
        if info.dtype == "I8" and len(info.shape) == 5:  # [in / p, out / q, 1, p', q], rotated and balanced
            parts = rotate(x, balanced_rotation(x.shape[1])).reshape(len(x), len(held), 1, -1).transpose(1, 2, 0, 3)
            rows = ((parts @ held[:, :, 0].astype(np.float32)) * self.vector(f"{name}.scale")[:, :, 0]).sum(axis=0)
            y: Array = rows.swapaxes(0, 1).reshape(len(x), -1)
        elif info.dtype == "I8":  # [out / p, in, p], rotated
            rotated, scale = rotate(x, rotation(x.shape[1])), self.vector(f"{name}.scale")
            panels = [(rotated @ panel.astype(np.float32)) * scale[index] for index, panel in enumerate(held)]
            y = np.concatenate(panels, axis=1)
        else:
            y = x @ self._matrix(info, held, name).T
        return y + self.vector(f"{name}.bias") if f"{name}.bias" in self.infos else y

    def _matrix(self, info: TensorInfo, held: Held, name: str) -> Array:
        """``[out, in]`` in float32."""
        if info.dtype == "F32":
            return np.asarray(held, np.float32)
        if info.dtype == "BF16":  # the upper half of a float32
            return np.asarray((held.astype(np.uint32) << 16).view(np.float32))
        scale: Array = self.vector(f"{name}.scale")[:, None]
        return np.asarray(VALUES.look_up(np.ascontiguousarray(held)) * scale, np.float32)  # of FP8


def held_weights(pack: Path, model: Model, step: Step) -> HeldWeights:
    """A step's tensors, over the mapped pack: pages are read as they are used."""
    infos = inputs_of(step, model)
    arrays = {}
    for name, info in infos.items():
        arrays[name] = np.memmap(pack, ELEMENT_TYPES[info.dtype][0], "r", info.offset, info.shape)
    return HeldWeights(infos, arrays)


def plain_step(spec: Spec, graph: str, activation: Array, weights: HeldWeights) -> dict[str, Array]:
    """The outputs of one step by name, float32.

    Args:
        spec: of the model.
        graph: such as ``dinov3.block``.
        activation: what the graph takes, float32 ``[B, ...]``.
        weights: of the step.
    """
    if isinstance(spec, AdapterSpec):
        return _adapter(spec, graph, activation, weights)
    part = graph.rpartition(".")[2]
    if part == "embed":
        return {"hidden_out": _embed(spec, activation, weights)}
    if part == "head":
        return {"embedding": _pooled(spec, activation, weights)}
    return {"hidden_out": _block(spec, activation, weights)}


def _embed(spec: EncoderSpec, pixels: Array, weights: HeldWeights) -> Array:
    side, patch = spec.grid, spec.patch
    tiles = pixels.reshape(-1, 3, side, patch, side, patch).transpose(0, 2, 4, 1, 3, 5)
    x = weights.product(tiles.reshape(-1, 3 * patch * patch), "patch").reshape(-1, side * side, spec.hidden)
    if spec.family == "siglip2":
        return x + weights.vector("position")
    prefix = np.broadcast_to(weights.vector("prefix"), (len(x), spec.prefix_tokens, spec.hidden))
    return np.concatenate([prefix, x], axis=1)


def _block(spec: EncoderSpec, hidden: Array, weights: HeldWeights) -> Array:
    heads = _heads(spec, _normed(spec, hidden, weights, "norm1"), weights, "attention.qkv", 3)
    if spec.family == "dinov3":
        heads = np.stack([_turned(spec, heads[0]), _turned(spec, heads[1]), heads[2]])
    attended = _attended(heads[0], heads[1], heads[2])
    x: Array = weights.product(attended, "attention.out").reshape(hidden.shape)
    hidden = hidden + x * _layer_scale(weights, "scale1")
    x = _normed(spec, hidden, weights, "norm2").reshape(-1, spec.hidden)
    if spec.family == "dinov3":
        gate, up = np.split(weights.product(x, "mlp.gate_up"), 2, axis=1)
        inner: Array = gate / (1 + np.exp(-gate)) * up
    else:
        inner = _gelu(weights.product(x, "mlp.up"))
    return hidden + weights.product(inner, "mlp.down").reshape(hidden.shape) * _layer_scale(weights, "scale2")


def _pooled(spec: EncoderSpec, hidden: Array, weights: HeldWeights) -> Array:
    if spec.family == "dinov3":
        return _normed(spec, hidden[:, 0], weights, "norm")
    k, v = _heads(spec, _normed(spec, hidden, weights, "norm"), weights, "attention.kv", 2)
    q = weights.product(weights.vector("probe"), "attention.q").reshape(1, spec.heads, 1, spec.head_dim)
    pooled = weights.product(_attended(np.broadcast_to(q, (len(k), *q.shape[1:])), k, v), "attention.out")
    x = _gelu(weights.product(_normed(spec, pooled, weights, "norm2"), "mlp.up"))
    return pooled + weights.product(x, "mlp.down")


def _adapter(spec: AdapterSpec, graph: str, embedding: Array, weights: HeldWeights) -> dict[str, Array]:
    targets = dict(spec.kinds)[graph.removeprefix("adapter.")]
    compressed = weights.product(embedding, "proj_in").reshape(len(embedding), 2 * len(targets), spec.compress)
    factors = {}
    for index, (target, in_features, out_features) in enumerate(targets):
        a = weights.product(compressed[:, 2 * index], f"{target}.A")
        b = weights.product(compressed[:, 2 * index + 1], f"{target}.B")
        factors[f"{target}.A"] = a.reshape(-1, spec.rank, in_features)
        factors[f"{target}.B"] = b.reshape(-1, out_features, spec.rank)
    return factors


def _normed(spec: EncoderSpec, x: Array, weights: HeldWeights, name: str) -> Array:
    """Layer norm over the last dimension; in float64, as a massive channel eats the others' digits in the variance."""
    wide = x.astype(np.float64)
    centred = wide - wide.mean(axis=-1, keepdims=True)
    scaled = centred / np.sqrt((centred**2).mean(axis=-1, keepdims=True) + spec.norm_eps)
    return np.asarray(scaled * weights.vector(f"{name}.weight") + weights.vector(f"{name}.bias"), np.float32)


def _heads(spec: EncoderSpec, x: Array, weights: HeldWeights, name: str, parts: int) -> Array:
    """``[B, T, D] -> [parts, B, H, T, D / H]``."""
    y = weights.product(x.reshape(-1, spec.hidden), name)
    return np.asarray(y.reshape(-1, spec.tokens, parts, spec.heads, spec.head_dim).transpose(2, 0, 3, 1, 4))


def _attended(q: Array, k: Array, v: Array) -> Array:
    """``[R, D]`` of ``[B, H, T, D / H]`` each."""
    scores = q @ k.swapaxes(-1, -2) / np.float32(math.sqrt(q.shape[-1]))
    shares = np.exp(scores - scores.max(axis=-1, keepdims=True))
    mixed = (shares / shares.sum(axis=-1, keepdims=True)) @ v
    return np.asarray(mixed.transpose(0, 2, 1, 3).reshape(-1, q.shape[1] * q.shape[3]), np.float32)


def _turned(spec: EncoderSpec, x: Array) -> Array:
    """Rotary positions in y and x: channel i of a head turns with i + D/H/2; CLS and registers stay as they are."""
    centres = (np.arange(spec.grid) + 0.5) / spec.grid * 2 - 1
    yx = np.stack(np.meshgrid(centres, centres, indexing="ij"), axis=-1).reshape(-1, 2, 1)
    frequencies = spec.rope_theta ** -np.arange(0, 1, 4 / spec.head_dim)
    angles = (2 * math.pi * yx * frequencies).reshape(len(yx), -1)
    angles = np.concatenate([np.zeros((spec.prefix_tokens, angles.shape[1])), angles])
    cos, sin = np.cos(angles).astype(np.float32), np.sin(angles).astype(np.float32)
    first, second = np.split(x, 2, axis=-1)
    return np.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)


def _layer_scale(weights: HeldWeights, name: str) -> Array | float:
    return weights.vector(name) if name in weights.infos else 1.0


def _gelu(x: Array) -> Array:
    inner = np.float32(math.sqrt(2 / math.pi)) * (x + np.float32(0.044715) * x**3)
    return np.asarray(x * np.float32(0.5) * (1 + np.tanh(inner)), np.float32)
