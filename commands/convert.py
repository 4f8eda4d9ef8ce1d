"""``i2l convert``."""

import json
from pathlib import Path
from typing import Literal

import click

from ..machine.wording import format_bytes, format_path
from .options import LORA_DTYPES, PATH, debug_option, force_option, json_option, lora_output_option, tell_left_out
from .telling import quiet_option, tell

FORMATS = ("comfyui", "diffsynth", "diffusers", "peft", "kohya", "bare")


@click.command()
@click.argument("lora", type=PATH)
@lora_output_option
@click.option("--key-format", type=click.Choice(FORMATS), default="comfyui", show_default=True,
              help="comfyui loads everywhere; the others are for loaders that want their own.")  # fmt: skip
@click.option("--dtype", type=LORA_DTYPES, show_default="as the input; bf16 for FP8",
              help="Of the values in the LoRA file.")  # fmt: skip
@force_option
@json_option
@quiet_option
@debug_option
def convert(
    lora: Path,
    output: Path,
    key_format: Literal["comfyui", "diffsynth", "diffusers", "peft", "kohya", "bare"],
    dtype: Literal["bf16", "fp16", "fp32"] | None,
    *,
    force: bool,
    as_json: bool,
) -> None:
    """Write a LoRA in the form a loader needs.

    Alphas are counted into the factors, all of which then have one rank.
    """
    from ..lora.lora import Lora  # noqa: PLC0415
    from ..lora.lorafiles import require_names, without_claims  # noqa: PLC0415
    from ..lora.reading import read_lora  # noqa: PLC0415
    from ..lora.replacing import LORA  # noqa: PLC0415
    from ..machine.files import require_writable  # noqa: PLC0415
    from ..machine.outputs import require_output  # noqa: PLC0415

    file = read_lora(lora)
    require_names(file, key_format)
    require_writable(output)
    require_output(output, LORA, inputs=[lora], force=force)
    tell_left_out(file)
    dtype = dtype or file.dtype
    Lora(file.lora.factors, without_claims(file)).save(output, dtype=dtype, key_format=key_format, force=force)
    facts = {"output": str(output), "modules": len(file.lora.factors), "rank": file.lora.rank, "dtype": dtype}
    if as_json:
        click.echo(json.dumps(facts | {"key_format": key_format}))
        return
    size = format_bytes(output.stat().st_size)
    tell(f"{format_path(output)}: {facts['modules']} modules, rank {facts['rank']}, {dtype}, {key_format}, {size}")
