"""``i2l build-engines``."""

from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING

import click

from ..engines.directory.architectures import FLOAT8_FROM, GENERATIONS
from ..machine.progress import show_progress
from ..machine.wording import format_bytes, format_path
from ..specs import DIFFUSION_MODELS, DiffusionModel, Family
from .options import debug_option, engines_option, models_option, needs_extra
from .telling import is_quiet, quiet_option, tell

if TYPE_CHECKING:
    from ..export.build import BuildResult
    from ..export.checkpoints.recognise import Checkpoint
    from ..export.parts import Part


@click.command()
@models_option
@engines_option
@click.option("--precision", type=click.Choice(["auto", "int8", "fp8", "bf16", "fp32"]), default="auto",
              show_default=True, help="How the weights are stored; auto says what it took and why.")  # fmt: skip
@click.option("--adapter", type=click.Choice(DIFFUSION_MODELS), show_default="the one that is there",
              help="What the LoRAs are for, if adapters for several diffusion models are under --models.")  # fmt: skip
@click.option("--blocks-per-chunk", type=click.IntRange(min=1), metavar="N", default=1, show_default=True,
              help="Transformer blocks that move as one copy.")  # fmt: skip
@click.option("--backend", type=click.Choice(["cpu", "cuda", "tensorrt"]), default="cpu", show_default=True,
              help="tensorrt: also plans for GPUs. cuda: also its graphs.")  # fmt: skip
@click.option("--sm", "sms", type=click.Choice(["current", *map(str, GENERATIONS)]), multiple=True,
              help="Generation of GPUs to make plans for, such as 89 for RTX 40; several are possible. Each gets the "
              "precision that it computes best with.")  # fmt: skip
@click.option("--force", is_flag=True, help="Build even if nothing changed.")
@click.option("--dry-run", is_flag=True, help="Only say what would be built, how long it takes and how much disk.")
@quiet_option
@debug_option
def build_engines(
    models: Path,
    engines: Path,
    precision: str,
    adapter: DiffusionModel | None,
    blocks_per_chunk: int,
    *,
    backend: str,
    sms: Sequence[str],
    force: bool,
    dry_run: bool,
) -> None:
    """Build engines from the checkpoints, once per machine.

    The engines directory is made, or renewed if checkpoints or options changed; it then replaces the old one at once.
    """
    if sms and backend != "tensorrt":
        raise click.UsageError("--sm is for --backend tensorrt")
    with needs_extra("export", "i2l build-engines"):
        from ..export.backends.build_lock import only_build  # noqa: PLC0415
        from ..export.parts import build_parts, checked_builds, plan_parts  # noqa: PLC0415
        from ..export.precisions.parallel import keep_freed_memory  # noqa: PLC0415

    keep_freed_memory()
    parts = plan_parts(precision, plan_targets(sms) if backend == "tensorrt" else ())
    for part in parts:
        if part.reason:
            tell(f"precision {part.precision} for {', '.join(f'sm{sm}' for sm in part.sms)} ({part.reason})")
    if dry_run:
        forecast(models, engines, parts, blocks_per_chunk=blocks_per_chunk, adapter=adapter, force=force)
        return
    found: Path | Mapping[Family, Checkpoint] = models
    if backend != "cpu":  # before the lock makes the directory
        found, _ = checked_builds(
            models, engines, parts, blocks_per_chunk=blocks_per_chunk, adapter=adapter, force=force
        )
    with nullcontext() if backend == "cpu" else only_build(engines):  # up-to-date packs need no lock
        with show_progress("bytes", quiet=is_quiet()) as report:
            results = build_parts(
                found, engines, parts, blocks_per_chunk=blocks_per_chunk, adapter=adapter, force=force, report=report
            )
        for part, result in zip(parts, results, strict=True):
            tell_packs(engines / part.folder, result)
        if len(parts) == 1:
            tell_other_packs(engines, remove=backend == "tensorrt")
        for part in parts:
            if part.sms:
                build_plans(engines / part.folder, part.sms)
        if backend == "cuda":
            build_graphs(engines)
        if backend != "cpu":
            from ..engines.directory.manifest import PROOFS  # noqa: PLC0415

            (engines / PROOFS).unlink(missing_ok=True)  # what a card lacked may be there now


def forecast(
    models: Path,
    engines: Path,
    parts: "Sequence[Part]",
    *,
    blocks_per_chunk: int,
    adapter: DiffusionModel | None,
    force: bool,
) -> None:
    """Say what the packs will take; a GPU's plans and graphs come on top and are not predicted."""
    from ..export.checkpoints.finding import find_checkpoints  # noqa: PLC0415
    from ..export.parts import peak_bytes, planned_builds  # noqa: PLC0415
    from ..look.forecast import build_seconds, room, roughly  # noqa: PLC0415
    from ..machine.files import free_bytes  # noqa: PLC0415

    checkpoints = find_checkpoints(models, adapter=adapter)
    for family, checkpoint in checkpoints.items():
        size = format_bytes(sum(path.stat().st_size for path in checkpoint.paths))
        click.echo(f"from {family}: {format_path(checkpoint.path)}, {size}")
    builds = planned_builds(checkpoints, engines, parts, blocks_per_chunk=blocks_per_chunk, force=force)
    for build in builds:
        click.echo(f"to {format_path(engines)}: {format_bytes(build.nbytes)} in {build.precision}")
    if builds:
        seconds = sum(build_seconds(build.nbytes) for build in builds)
        click.echo(f"needs {room(peak_bytes(builds), free_bytes(engines))}; {roughly(seconds)}")
    else:
        click.echo(f"nothing to do: the packs in {format_path(engines)} are up to date")


def tell_packs(engines: Path, result: "BuildResult") -> None:
    """Say what a part of the build is."""
    manifest = result.manifest
    size = format_bytes(sum(facts.nbytes for facts in manifest.files.values()))
    if result.rebuilt:
        tell(f"built {format_path(engines)}: {size}, precision {manifest.precision} ({manifest.precision_reason})")
    else:
        tell(f"nothing to do: {format_path(engines)} is up to date ({size}, precision {manifest.precision})")


def tell_other_packs(engines: Path, *, remove: bool) -> None:
    """Deal with FP8 engines from an earlier build for more generations: those named now are all there shall be."""
    from ..engines.directory.generations import FP8_FOLDER, fp8_engines, remove_fp8_engines  # noqa: PLC0415

    inner = format_path(engines / FP8_FOLDER)
    if remove:
        if nbytes := remove_fp8_engines(engines):
            tell(f"removed {inner}: {format_bytes(nbytes)}, for generations that are not named now")
    elif fp8_engines(engines):
        tell(f"kept {inner} for sm{FLOAT8_FROM} and later; without: name --sm with --backend tensorrt")


def build_graphs(engines: Path) -> None:
    """Make the graphs of the cuda backend and say what they are."""
    from ..export.backends.cuda import build_cuda_graphs  # noqa: PLC0415

    with show_progress("steps", quiet=is_quiet()) as report:
        count = build_cuda_graphs(engines, report=report)
    tell(f"{count} graphs for the cuda backend; i2l prove shows whether the card is right")


def plan_targets(sms: Sequence[str]) -> list[int]:
    """The compute capabilities to build for; the card at hand if none is named."""
    from ..engines.tensorrt.library import current_sm, installed_flavours  # noqa: PLC0415

    installed_flavours()  # before any work: is there a TensorRT at all?
    return list(dict.fromkeys(current_sm() if sm == "current" else int(sm) for sm in sms or ["current"]))


def build_plans(engines: Path, sms: Sequence[int]) -> None:
    """Make the plans and say what they are."""
    from ..engines.tensorrt.plans import BATCHES  # noqa: PLC0415
    from ..export.backends.tensorrt import build_plans as build  # noqa: PLC0415

    with show_progress("steps", quiet=is_quiet()) as report:
        result = build(engines, sms, report=report)
    for sm, plans in result.plans.items():
        size = format_bytes(sum(facts.nbytes for facts in plans.values()))
        memory = format_bytes(max(facts.activation_bytes for facts in plans.values()))
        flavour = result.flavours[sm]
        if flavour.reason:
            tell(f"sm{sm}: {flavour.name} ({flavour.reason})")
        tell(
            f"sm{sm} ({GENERATIONS.get(sm, 'this GPU')}): {len(plans)} plans by {flavour}, {size}, at most "
            f"{memory} of activations for {BATCHES[-1]} images; not run on a GPU by this command"
        )
    if result.kept:
        tell(f"kept plans from before: {', '.join(f'sm{sm}' for sm in result.kept)}")
    if not result.built:
        tell("nothing to do: all plans are up to date")
