"""``i2l verify``."""

import json
from pathlib import Path

import click

from ...machine.progress import show_progress
from ..options import PATH, backend_option, debug_option, engines_option, json_option, models_option, needs_extra


@click.command()
@models_option
@engines_option
@click.option("--image", type=PATH, metavar="IMAGE", show_default="a made-up one", help="What to compare on.")
@backend_option
@json_option
@debug_option
def verify(models: Path, engines: Path, image: Path | None, backend: str, *, as_json: bool) -> None:
    """Compare engines with a float32 reference.

    Every step and the LoRA, on one picture; it needs torch and the checkpoints that the engines were built from. The
    last line says whether the LoRA is right; exit code 1 if it is not.
    """
    with needs_extra("export", "i2l verify"):
        from ...export import reference  # noqa: F401, PLC0415
    from ...look.errors import EnginesWrong  # noqa: PLC0415
    from ...look.verification import made_up_image, summary, verify_engines  # noqa: PLC0415

    with show_progress("steps", quiet=as_json) as report:
        result = verify_engines(models, engines, image or made_up_image(), backend=backend, report=report)
    click.echo(json.dumps(result.to_dict()) if as_json else "\n".join(summary(result)))
    if not result.right:
        raise EnginesWrong(result.lora_worst, result.lora_bound)
