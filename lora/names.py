"""Names of modules: which diffusion model they are of, and their dots where a trainer wrote underscores.

A LoRA file seldom says what it is for, and what it says may be wrong. Its modules say it: each architecture names its
blocks and their linears in its own way, and where two agree, the width decides. What cannot be told stays unnamed.
"""

import re
from collections.abc import Iterable, Mapping
from typing import Literal, TypeAlias

ModelName: TypeAlias = Literal["z-image", "qwen-image", "flux.1"]
ATTENTION = ("attn.to_q", "attn.to_k", "attn.to_v", "attn.to_out.0")
JOINT = (*ATTENTION, "attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj", "attn.to_add_out")
STREAMS = ("img", "txt")
TARGETS: Mapping[str, tuple[str, ...]] = {
    **dict.fromkeys(
        ("layers", "noise_refiner", "context_refiner"),
        (
            *(f"attention.{name}" for name in ("to_q", "to_k", "to_v", "to_out.0", "qkv", "out")),
            *(f"feed_forward.w{number}" for number in (1, 2, 3)),
            *("adaLN_modulation.0", "adaLN_modulation.1"),
        ),
    ),
    "transformer_blocks": (
        *JOINT,
        *(f"{stream}_{name}" for stream in STREAMS for name in ("mlp.net.0.proj", "mlp.net.2", "mod.1")),
        *("ff.net.0.proj", "ff.net.2", "ff_context.net.0.proj", "ff_context.net.2"),
        *("norm1.linear", "norm1_context.linear"),
    ),
    "single_transformer_blocks": (*ATTENTION[:3], "proj_mlp", "proj_out", "norm.linear"),
    "double_blocks": tuple(
        f"{stream}_{name}" for stream in STREAMS for name in ("attn.qkv", "attn.proj", "mlp.0", "mlp.2", "mod.lin")
    ),
    "single_blocks": ("linear1", "linear2", "modulation.lin"),
}
"""``component -> the linears in each of its blocks``, of the architectures that are told apart."""
ALONE = (
    *("x_embedder", "cap_embedder.1", "t_embedder.mlp.0", "t_embedder.mlp.2", "final_layer.linear"),
    *("final_layer.adaLN_modulation.1", "img_in", "txt_in", "proj_out", "norm_out.linear", "context_embedder"),
    *("time_text_embed.timestep_embedder.linear_1", "time_text_embed.timestep_embedder.linear_2"),
    *("all_x_embedder.2-1", "all_final_layer.2-1.linear", "all_final_layer.2-1.adaLN_modulation.1"),
)
"""Linears outside the blocks."""
DOTTED = {(part, name.replace(".", "_")): f"{part}.{{}}.{name}" for part, names in TARGETS.items() for name in names}
DOTTED_ALONE = {name.replace(".", "_"): name for name in ALONE}
Z_IMAGE_WIDTH, WIDTH = 3840, 3072
"""Of Z-Image; of Qwen-Image and FLUX.1. HunyuanVideo has the latter, too, and one block more of each kind."""
FLUX_BLOCKS, FLUX_SINGLE_BLOCKS, SD3_BLOCKS = 19, 38, 38


def dotted(name: str) -> str | None:
    """``layers.0.attention.to_q`` of ``layers_0_attention_to_q``; None if it is of no known architecture."""
    if name in DOTTED_ALONE:
        return DOTTED_ALONE[name]
    match = re.fullmatch(r"(\w+?)_(\d+)_(\w+)", name)
    pattern = DOTTED.get((match[1], match[3])) if match else None
    return pattern.format(match[2]) if match and pattern else None


def component(module: str) -> str:
    """``layers`` of ``layers.7.attention.to_q``: what stands before the first number."""
    return re.split(r"[._](?=\d+(?:[._]|$))", module, maxsplit=1)[0]


def place(module: str) -> str:
    """A module without the number of its block: the same in every block of one model, shape included."""
    return re.sub(r"(?<=[._])\d+(?=[._]|$)", "N", module, count=1)


def diffusion_model(shapes: Mapping[str, tuple[int, int]]) -> ModelName | None:
    """The diffusion model that a LoRA is for, None if its modules do not say.

    Args:
        shapes: ``module -> [out, in]`` of the weight that it changes.
    """
    blocks: dict[str, int] = {}
    targets: dict[str, set[str]] = {}
    for module in shapes:
        match = re.match(r"(\w+)\.(\d+)\.(.+)", module)
        if match:
            blocks[match[1]] = max(blocks.get(match[1], 0), int(match[2]) + 1)
            targets.setdefault(match[1], set()).add(match[3])
    widths = {side for shape in shapes.values() for side in shape}
    known = {name for name in targets if name in TARGETS and targets[name] & set(TARGETS[name])}
    if known & {"layers", "noise_refiner", "context_refiner"}:
        return (
            "z-image" if not known & {"transformer_blocks", "double_blocks"} and _is_z_image(targets, widths) else None
        )
    streams = any(name.startswith(("img_m", "txt_m")) for name in targets.get("transformer_blocks", ()))
    if known and known <= {"double_blocks", "single_blocks", "single_transformer_blocks", "transformer_blocks"}:
        return _joint_model(known, targets, blocks, widths, streams=streams)
    return None


def _is_z_image(targets: Mapping[str, set[str]], widths: Iterable[int]) -> bool:
    """Lumina 2 has the fused names too, language models ``feed_forward.w1``; only Z-Image has ``attention.to_q``."""
    names = set().union(*targets.values())
    own = any(name.startswith("attention.to_") for name in names)
    return Z_IMAGE_WIDTH in set(widths) or (own and not {2304, 2560} & set(widths))


def _joint_model(
    known: set[str], targets: Mapping[str, set[str]], blocks: Mapping[str, int], widths: set[int], *, streams: bool
) -> ModelName | None:
    if streams:
        return "qwen-image" if known == {"transformer_blocks"} else None
    if known & {"double_blocks", "single_blocks"}:  # FLUX.2 is wider
        fits = blocks.get("double_blocks", 0) <= FLUX_BLOCKS and blocks.get("single_blocks", 0) <= FLUX_SINGLE_BLOCKS
        return "flux.1" if fits and not widths & {6144 * 3, 4096 * 3} and WIDTH * 2 not in widths else None
    if "single_transformer_blocks" in known:
        fits = blocks.get("transformer_blocks", 0) <= FLUX_BLOCKS
        return "flux.1" if fits and blocks["single_transformer_blocks"] <= FLUX_SINGLE_BLOCKS else None
    joint = targets["transformer_blocks"]
    if blocks["transformer_blocks"] > SD3_BLOCKS and WIDTH in widths and joint <= set(JOINT):
        return "qwen-image"
    return None
