"""``i2l build-engines``."""

from collections.abc import Sequence
from pathlib import Path

import click

from ..engines.gpus import GENERATIONS
from ..errors import format_bytes, format_path
from ..progress import show_progress
from ..specs import DIFFUSION_MODELS, DiffusionModel
from .options import debug_option, engines_option, models_option, needs_extra


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
              help="Generation of GPUs to make plans for, such as 89 for RTX 40; several are possible.")  # fmt: skip
@click.option("--force", is_flag=True, help="Build even if nothing changed.")
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
) -> None:
    """Build engines from the checkpoints, once per machine.

    The engines directory is made, or renewed if checkpoints or options changed; it then replaces the old one at once.
    """
    if sms and backend != "tensorrt":
        raise click.UsageError("--sm is for --backend tensorrt")
    with needs_extra("export", "i2l build-engines"):
        from ..export.build import build_engines as build  # noqa: PLC0415
        from ..export.parallel import keep_freed_memory  # noqa: PLC0415

    keep_freed_memory()
    targets = plan_targets(sms) if backend == "tensorrt" else []
    if targets and precision == "auto":
        from ..export.plans import plan_precision  # noqa: PLC0415

        precision, reason = plan_precision(targets)
        click.echo(f"precision {precision} ({reason})")
    with show_progress("bytes") as report:
        result = build(
            models,
            engines,
            precision=precision,
            blocks_per_chunk=blocks_per_chunk,
            adapter=adapter,
            force=force,
            report=report,
        )
    manifest = result.manifest
    size = format_bytes(sum(facts.nbytes for facts in manifest.files.values()))
    if result.rebuilt:
        click.echo(
            f"built {format_path(engines)}: {size}, precision {manifest.precision} ({manifest.precision_reason})"
        )
    else:
        click.echo(f"nothing to do: {format_path(engines)} is up to date ({size}, precision {manifest.precision})")
    if targets:
        build_plans(engines, targets)
    if backend == "cuda":
        build_graphs(engines)


def build_graphs(engines: Path) -> None:
    """Make the graphs of the cuda backend and say what they are."""
    from ..export.cuda_graphs import build_cuda_graphs  # noqa: PLC0415

    with show_progress("steps") as report:
        count = build_cuda_graphs(engines, report=report)
    click.echo(f"{count} graphs for the cuda backend, which was never run on a GPU: ask for it with --backend cuda")


def plan_targets(sms: Sequence[str]) -> list[int]:
    """The compute capabilities to build for; the card at hand if none is named."""
    from ..engines.tensorrt import current_sm, find_flavour  # noqa: PLC0415

    find_flavour()  # before any work: is there a TensorRT at all?
    return list(dict.fromkeys(current_sm() if sm == "current" else int(sm) for sm in sms or ["current"]))


def build_plans(engines: Path, sms: Sequence[int]) -> None:
    """Make the plans and say what they are."""
    from ..engines.plans import BATCHES  # noqa: PLC0415
    from ..export.plans import build_plans as build  # noqa: PLC0415

    with show_progress("steps") as report:
        result = build(engines, sms, report=report)
    for sm, plans in result.plans.items():
        size = format_bytes(sum(facts.nbytes for facts in plans.values()))
        memory = format_bytes(max(facts.activation_bytes for facts in plans.values()))
        click.echo(
            f"sm{sm} ({GENERATIONS.get(sm, 'this GPU')}): {len(plans)} plans by {result.flavour}, {size}, at most "
            f"{memory} of activations for {BATCHES[-1]} images; not run on a GPU by this command"
        )
    if not result.built:
        click.echo("nothing to do: all plans are up to date")
