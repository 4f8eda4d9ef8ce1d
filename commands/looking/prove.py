"""``i2l prove``."""

import json
from dataclasses import asdict
from pathlib import Path

import click

from ...machine.progress import show_progress
from ...machine.wording import format_path
from ..options import (
    backend_option,
    debug_option,
    device_option,
    engines_option,
    json_option,
    require_gpu_for_budget,
    threads_option,
    vram_budget_option,
    vram_margin_option,
)


@click.command()
@engines_option
@backend_option
@threads_option
@vram_budget_option
@vram_margin_option
@device_option
@click.option(
    "--report", "report_path", metavar="FILE|-", type=click.Path(dir_okay=False, allow_dash=True),
    help="Also write a text for an issue: card, driver, versions and figures, neither paths nor names.",
)  # fmt: skip
@json_option
@debug_option
def prove(
    engines: Path,
    backend: str,
    threads: int | None,
    vram_budget_bytes: int | None,
    vram_margin_bytes: int,
    device: str | None,
    report_path: str | None,
    *,
    as_json: bool,
) -> None:
    """Let a card show that it is right, and how fast.

    Each kind of step with real weights against float32 on the CPU; twice, in a batch and with the smallest slots the
    same to the bit; memory within the budget; times of the card and of the CPU. Seconds on a card that is one. The
    outcome is kept beside the engines, and --backend auto goes by it. Exit code 1 if a card is not proven.
    """
    if backend == "cpu":
        raise click.UsageError("the CPU is what cards are held against: name another --backend, or none")
    if as_json and report_path == "-":
        raise click.UsageError("--json and --report - would both print to standard output: give --report a file")
    require_gpu_for_budget(backend, vram_budget_bytes)
    from ...engines.base import Limits, VramBudget  # noqa: PLC0415
    from ...engines.directory.integrity import check_files  # noqa: PLC0415
    from ...engines.directory.manifest import read_manifest  # noqa: PLC0415
    from ...machine.files import require_writable  # noqa: PLC0415
    from ...machine.outputs import output_path, require_output  # noqa: PLC0415
    from ...runtime.opening import decider  # noqa: PLC0415
    from ...runtime.passes import IMAGES_PER_PASS  # noqa: PLC0415
    from ...runtime.proof.deciding import to_prove  # noqa: PLC0415
    from ...runtime.proof.sentences import REPORT, record_lines, report_text  # noqa: PLC0415

    report_file = None if report_path in (None, "-") else Path(str(report_path)).expanduser()
    if report_file:  # before minutes of work
        require_writable(report_file)
        require_output(report_file, REPORT)

    manifest = read_manifest(engines)
    check_files(engines, manifest)
    statuses, reasons = to_prove(backend, device)
    with show_progress("steps", quiet=as_json) as report:
        vram = VramBudget(vram_budget_bytes, vram_margin_bytes)
        limits = Limits(IMAGES_PER_PASS, threads=threads, vram=vram, device=device, report=report)
        deciding = decider(engines, manifest, limits)
        subjects = [(status, deciding.subject(status)) for status in statuses]
        records = [deciding.prove(subject) for _, subject in subjects if subject]
    reasons = [*reasons, *(f"{status.name}: it finds no such card" for status, subject in subjects if not subject)]
    if as_json:
        click.echo(json.dumps({"proofs": [asdict(record) for record in records], "others": reasons}))
    else:
        lines = [line for record in records for line in record_lines(record)]
        click.echo("\n".join([*lines, *reasons]))
    if report_file:
        with output_path(report_file, REPORT) as temporary:
            temporary.write_text(report_text(records, manifest), encoding="utf-8")
        click.echo(f"{format_path(report_file)}: look it over before you pass it on", err=True)
    elif report_path:
        click.echo(report_text(records, manifest), nl=False)
    if any(record.best is None for record in records) or (backend != "auto" and not records):
        raise click.exceptions.Exit(1)
