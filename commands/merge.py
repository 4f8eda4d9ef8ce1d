"""``i2l merge``."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

import click

from ..machine.wording import format_bytes, format_path
from .options import (
    LORA_DTYPES,
    PATH,
    debug_option,
    force_option,
    json_option,
    key_format_option,
    lora_output_option,
    reduce_rank_option,
    require_weights,
    tell_left_out,
    weight_option,
)
from .telling import quiet_option, tell


@click.command()
@click.argument("loras", nargs=-1, type=PATH, metavar="LORA...")
@lora_output_option
@weight_option("LoRA")
@reduce_rank_option
@click.option("--dtype", type=LORA_DTYPES, show_default="as the inputs, or fp32 if they differ",
              help="Of the values in the LoRA file.")  # fmt: skip
@key_format_option
@force_option
@json_option
@quiet_option
@debug_option
def merge(
    loras: Sequence[Path],
    output: Path,
    weights: Sequence[float],
    reduce_rank: int | None,
    dtype: Literal["bf16", "fp16", "fp32"] | None,
    key_format: Literal["comfyui", "diffsynth"],
    *,
    force: bool,
    as_json: bool,
) -> None:
    """Join LoRAs into one, exactly.

    It takes two LORAs or more of any key form, for one diffusion model; the rank of the result is the sum of theirs.
    Where one has nothing it changes nothing. A folder stands for the LoRAs in it, in the order of their names.
    """
    from ..lora.lorafiles import common_dtype, lora_paths, merge_loras, require_names  # noqa: PLC0415
    from ..lora.lowrank import reduce_lora  # noqa: PLC0415
    from ..lora.reading import read_lora  # noqa: PLC0415
    from ..lora.replacing import LORA  # noqa: PLC0415
    from ..machine.files import require_writable  # noqa: PLC0415
    from ..machine.outputs import require_output  # noqa: PLC0415

    paths = lora_paths(loras, output)
    if len(paths) < 2:
        raise click.UsageError("merging takes two LoRA files or more, or a folder of them")
    require_weights(weights, len(paths), "LoRA")
    require_writable(output)
    require_output(output, LORA, inputs=paths, force=force)
    files = [read_lora(path) for path in paths]
    for file in files:
        require_names(file, key_format)
        tell_left_out(file)
    merged = merge_loras(files, weights or None)
    reduction = None
    if reduce_rank:
        merged, reduction = reduce_lora(merged, reduce_rank)
    dtype = dtype or common_dtype(files)
    merged.save(output, dtype=dtype, key_format=key_format, force=force)
    facts = {"output": str(output), "rank": merged.rank, "modules": len(merged.factors), "dtype": dtype}
    if as_json:
        click.echo(json.dumps(facts | ({"rank_reduction": reduction.to_dict()} if reduction else {})))
        return
    if reduction:
        tell(reduction)
    size = format_bytes(output.stat().st_size)
    tell(f"{format_path(output)}: {len(merged.factors)} modules, rank {merged.rank}, {dtype}, {size}")
