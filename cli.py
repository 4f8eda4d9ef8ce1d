"""The command line: thin commands over the library.

Heavy imports stay inside the commands, so that ``--help`` answers at once.
"""

import errno
import json
import logging
import os
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, Literal

import click

from . import __version__
from .errors import I2LError, NoImages, PackageMissing, format_bytes, format_path
from .progress import show_progress


class UserPath(click.Path):
    """A path in which ``~`` is the home directory even where the shell did not expand it."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Path:
        path = Path(os.fsdecode(super().convert(value, param, ctx)))
        with suppress(RuntimeError):  # there is no such user: the name just begins with ~
            path = path.expanduser()
        try:
            path.lstat()
        except OSError as error:
            if error.errno == errno.ENAMETOOLONG:  # the system refuses even to look
                self.fail(f"{format_path(path)}: {error.strerror}", param, ctx)
        return path


PATH = UserPath()
DEBUG = "i2l.debug"


class Commands(click.Group):
    """Commands whose explained errors become one ``error:`` line and exit code 1."""

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except I2LError as error:
            if ctx.meta.get(DEBUG):
                traceback.print_exc()
            click.echo(f"error: {error}", err=True)
            ctx.exit(1)


@contextmanager
def needs_extra(extra: str, purpose: str) -> Iterator[None]:
    """Turn the import error of an optional package into the command that installs it."""
    try:
        yield
    except ModuleNotFoundError as error:
        raise PackageMissing(error.name or extra, purpose, extra) from error


def debug_option(command: Callable[..., None]) -> Callable[..., None]:
    """Add ``--debug``, which :class:`Commands` looks for."""

    def remember(ctx: click.Context, _: click.Parameter, value: bool) -> None:
        ctx.meta[DEBUG] = value

    return click.option(
        "--debug", is_flag=True, expose_value=False, callback=remember, help="Show the traceback of an error."
    )(command)


def json_option(command: Callable[..., None]) -> Callable[..., None]:
    """Add ``--json``."""
    return click.option("--json", "as_json", is_flag=True, help="Print one JSON object instead of text.")(command)


@click.group(cls=Commands, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__)
def main() -> None:
    """Turn a picture into a LoRA for the Z-Image diffusion model.

    First `i2l build-engines` once, then `i2l run` for every picture.
    """
    log = logging.getLogger("i2l")
    if not log.handlers:
        handler = logging.StreamHandler()
        handler.setFormatter(logging.Formatter("%(message)s"))
        log.addHandler(handler)
    log.setLevel(logging.INFO)


@main.command()
@click.argument("directory", type=PATH)
@click.option("--preset", type=click.Choice(["tiny", "small", "full"]), default="tiny", show_default=True,
              help="full has the published keys and shapes: 21 GB.")  # fmt: skip
@click.option("--seed", type=int, default=0, show_default=True)
@click.option(
    "--dtype", type=click.Choice(["bf16", "f16", "f32"]), help="Default: as published (SigLIP2 f32, others bf16)."
)
@click.option("--outliers", is_flag=True, help="Plant massive activations, as real vision transformers have.")
@debug_option
def make_checkpoints(directory: Path, preset: str, seed: int, dtype: str | None, *, outliers: bool) -> None:
    """Write synthetic checkpoints into DIRECTORY, for tests and benchmarks."""
    with needs_extra("export", "i2l make-checkpoints"):
        from .export.synthetic import make_checkpoints as make  # noqa: PLC0415

    with show_progress("bytes") as report:
        kind = dtype.upper() if dtype else None
        paths = make(directory, preset, seed=seed, dtype=kind, outliers=outliers, report=report)
    for path in paths:
        click.echo(f"{format_path(path)}  {format_bytes(path.stat().st_size)}")


@main.command()
@click.option("--models", type=PATH, required=True, help="Folder with the three checkpoints, under any names.")
@click.option("--engines", type=PATH, required=True, help="The engines directory to make or renew.")
@click.option(
    "--precision", type=click.Choice(["auto", "fp8", "int8", "bf16", "fp32"]), default="auto", show_default=True
)
@click.option("--blocks-per-chunk", type=click.IntRange(min=1), default=1, show_default=True,
              help="Transformer blocks that move as one copy.")  # fmt: skip
@click.option("--force", is_flag=True, help="Build even if nothing changed.")
@debug_option
def build_engines(models: Path, engines: Path, precision: str, blocks_per_chunk: int, *, force: bool) -> None:
    """Build an engines directory from the checkpoints: once per machine."""
    with needs_extra("export", "i2l build-engines"):
        from .export.build import build_engines as build  # noqa: PLC0415

    with show_progress("bytes") as report:
        result = build(
            models, engines, precision=precision, blocks_per_chunk=blocks_per_chunk, force=force, report=report
        )
    manifest = result.manifest
    size = format_bytes(sum(facts.nbytes for facts in manifest.files.values()))
    if result.rebuilt:
        click.echo(
            f"built {format_path(engines)}: {size}, precision {manifest.precision} ({manifest.precision_reason})"
        )
    else:
        click.echo(f"nothing to do: {format_path(engines)} is up to date ({size}, precision {manifest.precision})")


@main.command()
@click.argument("images", nargs=-1, type=PATH, metavar="IMAGE...")
@click.option("--engines", type=PATH, required=True, help="The engines directory.")
@click.option("--output", type=PATH, required=True, help="The LoRA file to write.")
@click.option("--backend", type=click.Choice(["auto", "cpu", "cuda", "tensorrt"]), default="auto", show_default=True)
@click.option("--strength", type=float, default=1.0, show_default=True, help="Multiplies the LoRA's effect; linear.")
@click.option("--dtype", type=click.Choice(["bf16", "fp16", "fp32"]), default="bf16", show_default=True)
@click.option("--key-format", type=click.Choice(["comfyui", "diffsynth"]), default="comfyui", show_default=True,
              help="comfyui loads everywhere; diffsynth is what the original node saved.")  # fmt: skip
@json_option
@debug_option
def run(
    images: Sequence[Path],
    engines: Path,
    output: Path,
    backend: str,
    strength: float,
    dtype: Literal["bf16", "fp16", "fp32"],
    key_format: Literal["comfyui", "diffsynth"],
    *,
    as_json: bool,
) -> None:
    """Turn one or more IMAGEs into one LoRA of rank four per image."""
    if not images:
        raise click.UsageError(str(NoImages()))
    from .files import require_writable  # noqa: PLC0415
    from .memory import peak_resident_bytes  # noqa: PLC0415
    from .runtime.pipeline import Pipeline  # noqa: PLC0415

    if output.exists() and any(image.exists() and image.samefile(output) for image in images):
        raise click.UsageError(f"{format_path(output)} is an input: give another --output")
    require_writable(output)
    with show_progress("steps", quiet=as_json) as report, Pipeline(engines, backend=backend, report=report) as pipeline:
        lora = pipeline.lora_from_images(images, strength=strength)
        with pipeline.timings.stage("save"):
            lora.save(output, dtype=dtype, key_format=key_format)
    seconds = pipeline.timings.seconds
    facts = {
        "output": str(output),
        "tensors": 2 * len(lora.factors),
        "rank": lora.rank,
        "seconds": {
            **{stage: round(value, 4) for stage, value in seconds.items()},
            "total": round(sum(seconds.values()), 4),
        },
        "peak_resident_bytes": peak_resident_bytes(),
        "backend": pipeline.backend_name,
        "backend_reason": pipeline.backend_reason,
        "precision": pipeline.manifest.precision,
    }
    if as_json:
        click.echo(json.dumps(facts))
        return
    stages = ", ".join(f"{stage} {value:.2f}" for stage, value in seconds.items())
    click.echo(
        f"{format_path(output)}: {2 * len(lora.factors)} tensors, rank {lora.rank}, "
        f"{format_bytes(output.stat().st_size)}\n"
        f"{sum(seconds.values()):.2f} s ({stages}), peak {format_bytes(peak_resident_bytes())} resident, "
        f"backend {pipeline.backend_name} ({pipeline.backend_reason})"
    )


@main.command()
@click.argument("path", type=PATH)
@json_option
@debug_option
def inspect(path: Path, *, as_json: bool) -> None:
    """Say what PATH is: a checkpoint or a folder of them, an engines directory, a LoRA file."""
    from .inspection import inspect_path, text_lines  # noqa: PLC0415

    facts = inspect_path(path)
    click.echo(json.dumps(facts) if as_json else "\n".join(text_lines(facts)))


@main.command()
@click.option("--models", type=PATH, required=True, help="The checkpoints that the engines were built from.")
@click.option("--engines", type=PATH, required=True, help="The engines directory.")
@click.option("--image", type=PATH, help="The picture to compare on; default: a made-up one.")
@click.option("--backend", type=click.Choice(["auto", "cpu", "cuda", "tensorrt"]), default="auto", show_default=True)
@json_option
@debug_option
def verify(models: Path, engines: Path, image: Path | None, backend: str, *, as_json: bool) -> None:
    """Compare every step and the LoRA with a float32 reference (needs the checkpoints and torch)."""
    with needs_extra("export", "i2l verify"):
        from .export import reference  # noqa: F401, PLC0415
    from .verification import made_up_image, summary, verify_engines  # noqa: PLC0415

    with show_progress("steps", quiet=as_json) as report:
        result = verify_engines(models, engines, image or made_up_image(), backend=backend, report=report)
    click.echo(json.dumps(result.to_dict()) if as_json else "\n".join(summary(result)))


@main.command()
@json_option
@debug_option
def doctor(*, as_json: bool) -> None:
    """Say which backends work here and, for each that does not, why and what to do."""
    from .inspection import diagnose, diagnosis_lines  # noqa: PLC0415

    facts = diagnose()
    click.echo(json.dumps(facts) if as_json else "\n".join(diagnosis_lines(facts)))


if __name__ == "__main__":
    main()
