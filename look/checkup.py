"""May an engines directory be used on this machine? What a run would find out, before it.

The checks are those of the runtime itself, so what passes here runs: the files' hashes, the int8 form that a CPU needs
of fp8 packs, and every plan against the key that the runtime would ask for.
"""

import time
from collections.abc import Iterator, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from ..engines.backends import detect_backends
from ..engines.base import Limits
from ..engines.cpu.converted import CPU_FOLDER, bytes_to_convert, cpu_graphs
from ..engines.cpu.fitting import require_runnable
from ..engines.cuda.graph_files import checked_graphs, graphs_folder
from ..engines.directory.architectures import GENERATIONS
from ..engines.directory.generations import FP8_FOLDER, fp8_engines
from ..engines.directory.integrity import check_files
from ..engines.directory.manifest import MANIFEST, Manifest, graphs_of, read_manifest
from ..engines.errors import EnginesError
from ..engines.tensorrt.plans import PLANS, PlanFacts, checked_plan, planned_generations, wanted_key
from ..machine.errors import DiskFull, I2LError
from ..machine.files import free_bytes, require_free
from ..machine.memory import available_bytes
from ..machine.wording import GIB, format_bytes, format_path
from ..runtime.opening import decider
from ..runtime.proof.sentences import card_text, verdict


def check_engines(directory: Path, *, full: bool = False) -> dict[str, Any]:
    """What a directory gives this machine.

    Args:
        directory: the engines directory.
        full: hash every file again, which takes as long as reading them.

    Returns:
        ``path``; ``problem``, why the CPU cannot run it, or None; with ``full`` ``hashed_bytes`` and
        ``hashed_seconds``; and unless it cannot be read: ``precision``, ``packs_bytes``, ``convert_bytes`` that the
        first run on a CPU writes, ``free_disk_bytes``, ``available_memory_bytes``, ``gpus`` with a ``problem`` each,
        ``proofs`` of the cards, and ``leftovers``, which nothing uses.
    """
    facts: dict[str, Any] = {"path": str(directory), "problem": None}
    try:
        manifest = read_manifest(directory)
        start = time.perf_counter()
        hashed = check_files(directory, manifest, again=full)
        inner = fp8_engines(directory)
        if inner and full:
            hashed += check_files(inner, read_manifest(inner), again=True)
        if full:
            facts |= {"hashed_bytes": hashed, "hashed_seconds": round(time.perf_counter() - start, 3)}
        convert_bytes = bytes_to_convert(directory, manifest)
        require_runnable(*cpu_graphs(directory, manifest))
    except EnginesError as error:
        return facts | {"problem": str(error)}
    try:
        require_free(directory, convert_bytes)
    except DiskFull as error:
        facts["problem"] = str(error)
    return facts | {
        "precision": manifest.precision,
        "packs_bytes": sum(manifest.files[model.pack].nbytes for model in manifest.models.values()),
        "convert_bytes": convert_bytes,
        "free_disk_bytes": free_bytes(directory),
        "available_memory_bytes": available_bytes(),
        "proofs": _proofs(directory, manifest),
        "gpus": [*_gpus(directory, manifest), *(_gpus(inner, read_manifest(inner)) if inner else ())],
        "leftovers": [*_leftovers(directory, manifest), *(_leftovers(inner, read_manifest(inner)) if inner else ())],
    }


def check_lines(facts: Mapping[str, Any]) -> Iterator[str]:
    """:func:`check_engines` for people."""
    name = format_path(Path(facts["path"]))
    if "precision" not in facts:
        yield f"engines {name}: no"
        return
    packs = f"{facts['precision']}, packs of {format_bytes(facts['packs_bytes'])}"
    yield f"engines {name}: {'no' if facts['problem'] else 'usable on this CPU'} ({packs})"
    if "hashed_bytes" in facts:
        rate = facts["hashed_bytes"] / GIB / max(facts["hashed_seconds"], 1e-3)
        yield f"  every byte as it was written: {format_bytes(facts['hashed_bytes'])} hashed, {rate:.2f} GiB/s"
    if facts["precision"] == "fp8":
        needs = f"the first run converts them to int8, once: {format_bytes(facts['convert_bytes'])} of disk"
        free = f"{format_bytes(facts['free_disk_bytes'])} free"
        yield f"  fp8 on the CPU: {f'{needs}, {free}' if facts['convert_bytes'] else 'int8 form is there'}"
    if (memory := facts["available_memory_bytes"]) is not None:
        packs_stay = facts["packs_bytes"] <= memory
        stay = "the packs stay in the page cache" if packs_stay else "every pass reads packs from the disk again"
        yield f"  memory: {format_bytes(memory)} available, so {stay}"
    for gpu in facts["gpus"]:
        yield f"  {gpu['for']}, {gpu['precision']}: {gpu['problem'] or gpu['what']}"
    if not facts["gpus"]:
        yield "  GPUs: nothing was built for them"
    yield from (f"  {proof['verdict']}" for proof in facts["proofs"])
    for leftover in facts["leftovers"]:
        yield f"  unused: {leftover}"


def _gpus(engines: Path, manifest: Manifest) -> Iterator[dict[str, Any]]:
    """What is there for GPUs, from one engines directory."""
    for sm, plans in planned_generations(engines, manifest.precision).items():
        named = f"sm{sm} ({GENERATIONS[sm]})" if sm in GENERATIONS else f"sm{sm}"
        size = format_bytes(sum(facts.nbytes for facts in plans.values()))
        makers = sorted({f"{facts.key.flavour} {facts.key.version}" for facts in plans.values()})
        yield {
            "for": named,
            "sm": sm,
            "precision": manifest.precision,
            "what": f"{len(plans)} plans by {' and '.join(makers)}, {size}",
            "problem": _plans_problem(engines, manifest, sm, plans),
        }
    if graphs_folder(engines, manifest.precision).is_dir():
        cuda = {"for": "backend cuda", "sm": None, "precision": manifest.precision, "what": "", "problem": None}
        try:
            cuda["what"] = f"{len(checked_graphs(engines, manifest))} graphs"
        except EnginesError as error:
            cuda["problem"] = str(error)
        yield cuda


def _proofs(engines: Path, manifest: Manifest) -> list[dict[str, Any]]:
    """What the cards that are here now have shown with these engines, and which have not."""
    deciding = decider(engines, manifest, Limits(images=1))
    facts: list[dict[str, Any]] = []
    for status in detect_backends():
        if status.works and (subject := deciding.subject(status)):
            record = deciding.records.of(subject)
            how = f"not proven with these engines: i2l prove --engines {format_path(engines)} --backend {status.name}"
            said = f"{status.name} on {card_text(subject.card)}: {verdict(record) if record else how}"
            facts.append({"backend": status.name, "verdict": said, "record": record and asdict(record)})
    return facts


def _plans_problem(engines: Path, manifest: Manifest, sm: int, plans: Mapping[str, PlanFacts]) -> str | None:
    """Why the runtime would refuse one of a generation's plans, if it would."""
    made_by = next(iter(plans.values())).key
    try:
        check_files(engines, manifest)
        for model in manifest.models.values():
            for graph in sorted(graphs_of(model)):
                wanted = wanted_key(
                    engines, graph, model.spec, manifest.precision, made_by.flavour, made_by.version, sm
                )
                checked_plan(engines, graph, wanted)
    except I2LError as error:
        return str(error)
    return None


def _leftovers(engines: Path, manifest: Manifest) -> Iterator[str]:
    """What a build or a conversion left behind."""
    for folder in sorted(engines.glob("build-*")):
        if folder.is_dir() and folder.name != manifest.build:
            yield f"{format_path(folder)}, of a build that ended early: the next build removes it"
    for folder in sorted((engines / PLANS).glob("sm*-*")):
        if not folder.name.endswith(f"-{manifest.precision}"):
            yield f"{format_path(folder)}, as the packs are {manifest.precision}: remove it to free its room"
    if (engines / FP8_FOLDER / MANIFEST).is_file() and fp8_engines(engines) is None:
        yield f"{format_path(engines / FP8_FOLDER)}, which is not of the same checkpoints: the next build removes it"
    if (engines / CPU_FOLDER / MANIFEST).is_file() and manifest.precision != "fp8":
        yield f"{format_path(engines / CPU_FOLDER)}, as the packs are {manifest.precision}: the next build removes it"
