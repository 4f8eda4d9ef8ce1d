"""``i2l plan``."""

import json
import os
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from ...machine.wording import format_bytes
from ..options import ENGINES_VARIABLE, PATH, SIZE, debug_option, json_option
from ..telling import tell

if TYPE_CHECKING:
    from ...engines.device.residency import Residency
    from ...engines.directory.manifest import Model
    from ...specs import Family

PCIE_GBPS = (12.0, 25.0, 50.0)
"""From pinned memory over 16 lanes of PCIe 3, 4 and 5, about."""


@click.command()
@click.option("--engines", type=PATH, metavar="DIR", help="The engines directory; or else:")
@click.option("--preset", type=click.Choice(["tiny", "small", "full"]), help="Sizes alone, nothing built.")
@click.option("--precision", type=click.Choice(["fp8", "int8", "bf16"]), default="fp8", show_default=True,
              help="Of the preset.")  # fmt: skip
@click.option("--vram-budget", "budgets", type=SIZE, metavar="SIZE", multiple=True, required=True,
              help="Such as 4GiB. Several give a table.")  # fmt: skip
@click.option("--pcie-gbps", "links", type=click.FloatRange(min=0, min_open=True), metavar="NUMBER", multiple=True,
              default=[25.0], show_default=True, help="GB/s from pinned memory. Several give a table.")  # fmt: skip
@click.option("--tflops", type=click.FloatRange(min=0, min_open=True), metavar="NUMBER", default=100.0,
              show_default=True, help="Rate that the products reach.")  # fmt: skip
@click.option("--images", type=click.IntRange(min=1), metavar="N", default=1, show_default=True, help="In one call.")
@json_option
@debug_option
def plan(
    engines: Path | None,
    preset: str | None,
    precision: str,
    budgets: Sequence[int],
    links: Sequence[float],
    tflops: float,
    images: int,
    *,
    as_json: bool,
) -> None:
    """Predict, without a GPU, VRAM and time per image.

    For each budget: what stays in VRAM, what is copied, and how long an image takes; what would be pinned of this
    machine's memory, and how much of the link to the card that fills.
    """
    if engines is None and preset is None and (value := os.environ.get(ENGINES_VARIABLE)):
        engines = Path(value)
        tell(f"--engines {value} (${ENGINES_VARIABLE})", err=True)
    if (engines is None) == (preset is None):
        raise click.UsageError(f"give either --engines or --preset; or set ${ENGINES_VARIABLE}")
    found = models_of_engines(engines) if engines else {precision: models_of_preset(str(preset), precision)}
    tables = {
        name: [{"precision": name} | row for size in budgets for row in predicted(models, size, links, tflops, images)]
        for name, models in found.items()
    }
    if as_json:
        every = [row for rows in tables.values() for row in rows]
        click.echo(json.dumps(every[0] if len(every) == 1 else every))
        return
    for name, rows in tables.items():
        if len(tables) > 1:
            click.echo(f"{name} engines:")
        click.echo("\n".join(details(rows[0]) if len(rows) == 1 else table(rows, links)))


def models_of_engines(engines: Path) -> "dict[str, dict[Family, Model]]":
    """``precision -> models``: what the manifest says, and that of the FP8 engines inside, if there are any."""
    from ...engines.directory.generations import fp8_engines  # noqa: PLC0415
    from ...engines.directory.manifest import read_manifest  # noqa: PLC0415

    manifests = [read_manifest(folder) for folder in (engines, fp8_engines(engines)) if folder]
    return {manifest.precision: dict(manifest.models) for manifest in manifests}


def models_of_preset(preset: str, precision: str) -> "dict[Family, Model]":
    """What a build would make; needs no checkpoint."""
    from ...export.packs.planning import planned_model  # noqa: PLC0415
    from ...specs import PRESETS  # noqa: PLC0415

    return {spec.family: planned_model(spec, precision) for spec in PRESETS[preset]}


def predicted(
    models: "dict[Family, Model]", budget: int, links: Sequence[float], tflops: float, images: int
) -> list[dict[str, Any]]:
    """The facts of one budget, one row per link."""
    from ...engines.device.pinned.host_cache import values_pinned  # noqa: PLC0415
    from ...engines.device.predict import LARGEST_BATCH, Card, graph_memory, predict  # noqa: PLC0415
    from ...engines.device.residency import plan_residency  # noqa: PLC0415

    graphs = graph_memory(models, min(images, LARGEST_BATCH))
    residency = plan_residency({family: model.chunks for family, model in models.items()}, graphs, budget)
    rows, host = [], pinned(models, residency, values_pinned(models["adapter"], graphs))
    for link in links:
        prediction = predict(models, residency, Card(link, tflops), images)
        rows.append(
            {
                "predicted": True,
                "budget_bytes": budget,
                "pcie_gbps": link,
                "tflops": tflops,
                **asdict(prediction),
                "seconds_per_image": prediction.seconds_per_image,
                "parts": residency.parts,
                "resident_chunks": {family: len(indices) for family, indices in residency.resident.items()},
                "chunks": {family: len(model.chunks) for family, model in models.items()},
                "host": host,
            }
        )
    return rows


def pinned(models: "dict[Family, Model]", residency: "Residency", values_bytes: int) -> dict[str, Any]:
    """What CUDA's backends would pin of this machine's memory, and the share of links that is expected with it."""
    from ...engines.device.pinned.host_cache import FILL_GBPS, link_share, plan_host_cache  # noqa: PLC0415
    from ...machine.memory import available_bytes  # noqa: PLC0415

    chunks, resident = {family: model.chunks for family, model in models.items()}, residency.resident
    available = available_bytes()
    plan = plan_host_cache(chunks, resident, available, values_bytes=values_bytes)
    share = partial(link_share, chunks, resident, fill_gbps=FILL_GBPS)
    return {
        "available_bytes": available,
        "cache_bytes": plan.cache_bytes,
        "ring_bytes": plan.ring_bytes,
        "values_bytes": plan.values_bytes,
        "cached_chunks": {family: sum(place[0] == family for place in plan.kept) for family in chunks},
        "fill_gbps": FILL_GBPS,
        "link_share": {f"{link:g}": share(plan.kept, link_gbps=link) for link in PCIE_GBPS},
        "link_share_first_pass": {f"{link:g}": share((), link_gbps=link) for link in PCIE_GBPS},
    }


def details(row: dict[str, Any]) -> Iterator[str]:
    """One prediction for people."""
    stays = (f"{family} {row['resident_chunks'][family]} of {count}" for family, count in row["chunks"].items())
    yield f"predicted for {row['pcie_gbps']:g} GB/s and {row['tflops']:g} TFLOP/s, not measured"
    yield (
        f"peak VRAM {format_bytes(row['peak_bytes'])} of {format_bytes(row['budget_bytes'])}: "
        + ", ".join(f"{part} {format_bytes(nbytes)}" for part, nbytes in row["parts"].items())
    )
    yield f"chunks that stay: {', '.join(stays)}"
    yield f"copied per pass: {format_bytes(row['streamed_bytes'])}; once before: {row['load_seconds']:.2f} s of loading"
    if not row["streamed_bytes"]:
        left = format_bytes(row["budget_bytes"] - row["peak_bytes"])
        yield f"left for CUDA graphs, one for each model and number of images: {left} (their size shows on the card)"
    yield from pinned_lines(row["host"], streamed=bool(row["streamed_bytes"]))
    yield (
        f"images {row['images']}, passes {row['passes']}: {row['seconds']:.3f} s, "
        f"{1000 * row['seconds_per_image']:.0f} ms per image "
        f"(copies {row['copy_seconds']:.3f} s, computing {row['compute_seconds']:.3f} s, overlapped)"
    )


def pinned_lines(host: dict[str, Any], *, streamed: bool) -> Iterator[str]:
    """What is pinned and what it is for, for people; the cache and the link matter where chunks are streamed."""
    known = host["available_bytes"]
    of = f"{format_bytes(known)} are available here" if known is not None else "what is available here is unknown"
    ring, values, cache = (format_bytes(host[f"{part}_bytes"]) for part in ("ring", "values", "cache"))
    always = f"RAM pinned by cuda and tensorrt: ring {ring}, inputs and results {values}"
    if not streamed:
        yield always
        return
    yield f"{always}, cache from the second pass on {cache} ({of}; with the cache half of it at most)"
    for when, key in (("with the cache filled", "link_share"), ("before", "link_share_first_pass")):
        shares = (f"{100 * share:.0f} % of {link}" for link, share in host[key].items())
        yield f"link used {when}, GB/s: {', '.join(shares)}"
    yield f"(for packs in the page cache and a ring filled at {host['fill_gbps']:g} GB/s, as by one core of a server)"


def table(rows: Sequence[dict[str, Any]], links: Sequence[float]) -> list[str]:
    """A row per budget, a column per link, in Markdown."""
    columns = ["VRAM budget", "peak", "stays", "copied per pass", *(f"ms per image at {link:g} GB/s" for link in links)]
    lines = [" | ".join(columns), " | ".join("---" for _ in columns)]
    for start in range(0, len(rows), len(links)):
        group = rows[start : start + len(links)]
        facts = (group[0][key] for key in ("budget_bytes", "peak_bytes"))
        cells = [*map(format_bytes, facts), format_bytes(group[0]["parts"]["resident"])]
        cells.append(format_bytes(group[0]["streamed_bytes"]))
        lines.append(" | ".join([*cells, *(f"{1000 * row['seconds_per_image']:.0f}" for row in group)]))
    return [f"| {line} |" for line in lines]
