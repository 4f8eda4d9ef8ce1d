"""Which checkpoint tensors each graph takes, as data: the one table between checkpoints, modules and packs.

A graph's weights are named without the block's number (``attention.qkv.weight``); ``{}`` in a source key stands for it.
Matrices that multiply the same input are stacked into one (q, k and v; gate and up; all ``proj_in`` of an adapter
block): one large product is faster than several small ones, and a stack of rows costs nothing in the pack.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TypeAlias

from ...specs import AdapterSpec, EncoderSpec, Spec, Target


@dataclass(frozen=True)
class Source:
    """Rows of one checkpoint tensor; a tensor of any rank is seen as ``[shape[0], the rest]``."""

    key: str
    start: int = 0
    rows: int | None = None
    """None: all."""

    def at(self, block: str) -> "Source":
        return Source(self.key.format(block), self.start, self.rows)


@dataclass(frozen=True)
class Plain:
    """A tensor that every precision stores as float32: norms, biases, positions, the patch projection."""

    name: str
    shape: tuple[int, ...]
    sources: tuple[Source, ...]


@dataclass(frozen=True)
class Matrix:
    """The weight of a linear, ``[out_features, in_features]``: stored in the engines' precision."""

    name: str
    """Without a suffix: the precision adds ``.weight``, ``.scale``."""
    out_features: int
    in_features: int
    sources: tuple[Source, ...]
    group: int | None = None
    """Rows that belong together, such as a head's: what a precision lays side by side does not cross them."""


Weight: TypeAlias = Plain | Matrix


@dataclass(frozen=True)
class Step:
    """One run of a graph with one set of weights."""

    name: str
    """Such as ``dinov3.block.07``; the pack's tensors are named ``<name>.<weight>``."""
    graph: str
    """Such as ``dinov3.block``."""
    block: str
    """What replaces ``{}`` in the source keys."""


def plan_steps(spec: Spec) -> list[list[Step]]:
    """The steps of a model in the order of their running; each inner list stays in one chunk."""
    if isinstance(spec, AdapterSpec):
        return _adapter_steps(spec)
    digits = len(str(spec.depth - 1))
    kind = f"{spec.family}.block"
    blocks = [[Step(f"{kind}.{index:0{digits}}", kind, str(index))] for index in range(spec.depth)]
    embed, head = f"{spec.family}.embed", f"{spec.family}.head"
    return [[Step(embed, embed, "")], *blocks, [Step(head, head, "")]]


def graph_weights(spec: Spec) -> dict[str, list[Weight]]:
    """``graph name -> weights`` of a model, in the order of the graph's inputs and of the pack."""
    if isinstance(spec, AdapterSpec):
        return {f"adapter.{kind}": list(_adapter_weights(spec, targets)) for kind, targets in spec.kinds}
    if spec.family == "siglip2":
        return {
            "siglip2.embed": _siglip2_embed(spec),
            "siglip2.block": _siglip2_block(spec),
            "siglip2.head": _siglip2_head(spec),
        }
    return {
        "dinov3.embed": _dinov3_embed(spec),
        "dinov3.block": _dinov3_block(spec),
        "dinov3.head": _norm("norm", "norm", spec.hidden),
    }


def _plain(name: str, shape: tuple[int, ...], *keys: str) -> Plain:
    return Plain(name, shape, tuple(Source(key) for key in keys))


def _norm(name: str, key: str, width: int) -> list[Weight]:
    return [_plain(f"{name}.{part}", (width,), f"{key}.{part}") for part in ("weight", "bias")]


def _linear(
    name: str, out_features: int, in_features: int, *keys: str, bias: bool = True, group: int | None = None
) -> list[Weight]:
    matrix = Matrix(name, out_features, in_features, tuple(Source(f"{key}.weight") for key in keys), group)
    return [matrix, _plain(f"{name}.bias", (out_features,), *(f"{key}.bias" for key in keys))] if bias else [matrix]


def _siglip2_embed(spec: EncoderSpec) -> list[Weight]:
    patch = "embeddings.patch_embedding"
    return [
        _plain("patch.weight", (spec.hidden, 3 * spec.patch**2), f"{patch}.weight"),
        _plain("patch.bias", (spec.hidden,), f"{patch}.bias"),
        _plain("position", (spec.tokens, spec.hidden), "embeddings.position_embedding.weight"),
    ]


def _siglip2_block(spec: EncoderSpec) -> list[Weight]:
    width, inner, layer = spec.hidden, spec.intermediate, "encoder.layers.{}"
    attention = f"{layer}.self_attn"
    return [
        *_norm("norm1", f"{layer}.layer_norm1", width),
        *_linear(
            "attention.qkv", 3 * width, width, *(f"{attention}.{name}_proj" for name in "qkv"), group=spec.head_dim
        ),
        *_linear("attention.out", width, width, f"{attention}.out_proj"),
        *_norm("norm2", f"{layer}.layer_norm2", width),
        *_linear("mlp.up", inner, width, f"{layer}.mlp.fc1"),
        *_linear("mlp.down", width, inner, f"{layer}.mlp.fc2"),
    ]


def _siglip2_head(spec: EncoderSpec) -> list[Weight]:
    width, inner, attention = spec.hidden, spec.intermediate, "head.attention"
    query, key_value = (0, width), (width, 2 * width)
    stacked: list[Weight] = []
    for name, (start, rows) in (("attention.q", query), ("attention.kv", key_value)):
        source = Source(f"{attention}.in_proj_weight", start, rows)
        stacked.append(Matrix(name, rows, width, (source,), spec.head_dim))
        stacked.append(Plain(f"{name}.bias", (rows,), (Source(f"{attention}.in_proj_bias", start, rows),)))
    return [
        *_norm("norm", "post_layernorm", width),
        _plain("probe", (1, width), "head.probe"),
        *stacked,
        *_linear("attention.out", width, width, f"{attention}.out_proj"),
        *_norm("norm2", "head.layernorm", width),
        *_linear("mlp.up", inner, width, "head.mlp.fc1"),
        *_linear("mlp.down", width, inner, "head.mlp.fc2"),
    ]


def _dinov3_embed(spec: EncoderSpec) -> list[Weight]:
    patch = "embeddings.patch_embeddings"
    return [
        _plain("patch.weight", (spec.hidden, 3 * spec.patch**2), f"{patch}.weight"),
        _plain("patch.bias", (spec.hidden,), f"{patch}.bias"),
        _plain("prefix", (spec.prefix_tokens, spec.hidden), "embeddings.cls_token", "embeddings.register_tokens"),
    ]


def _dinov3_block(spec: EncoderSpec) -> list[Weight]:
    width, inner, layer = spec.hidden, spec.intermediate, "layer.{}"
    attention = f"{layer}.attention"
    return [
        *_norm("norm1", f"{layer}.norm1", width),
        *_linear(
            "attention.qkv",
            3 * width,
            width,
            *(f"{attention}.{name}_proj" for name in "qkv"),
            bias=False,
            group=spec.head_dim,
        ),
        *_linear("attention.out", width, width, f"{attention}.o_proj"),
        _plain("scale1", (width,), f"{layer}.layer_scale1.lambda1"),
        *_norm("norm2", f"{layer}.norm2", width),
        *_linear("mlp.gate_up", 2 * inner, width, f"{layer}.mlp.gate_proj", f"{layer}.mlp.up_proj", group=inner),
        *_linear("mlp.down", width, inner, f"{layer}.mlp.down_proj"),
        _plain("scale2", (width,), f"{layer}.layer_scale2.lambda1"),
    ]


def _adapter_steps(spec: AdapterSpec) -> list[list[Step]]:
    steps = []
    for component, blocks in spec.components:
        for index in range(blocks):
            name, source = f"adapter.{component}.{index:02}", spec.checkpoint_blocks(component)
            steps.append(
                [
                    Step(f"{name}.{kind}", f"adapter.{kind}", f"{source}.{order * blocks + index}")
                    for order, (kind, _) in enumerate(spec.kinds)
                ]
            )
    return steps


def _adapter_weights(spec: AdapterSpec, targets: tuple[Target, ...]) -> Iterator[Weight]:
    factors = [(index, *target, factor) for index, target in enumerate(targets) for factor in "ab"]
    compressed = tuple(
        Source(f"{{}}.layers.{index}.proj_{factor}.proj_in.weight") for index, _, _, _, factor in factors
    )
    yield Matrix("proj_in", len(factors) * spec.compress, spec.embedding, compressed)
    for index, target, in_features, out_features, factor in factors:
        rows = spec.rank * (in_features if factor == "a" else out_features)
        source = Source(f"{{}}.layers.{index}.proj_{factor}.proj_out.weight")
        yield Matrix(f"{target}.{factor.upper()}", rows, spec.compress, (source,))
