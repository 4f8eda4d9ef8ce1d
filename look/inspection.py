"""What is this? Checkpoints, engines directories, LoRA files, described."""

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from ..engines.directory.generations import fp8_engines
from ..engines.directory.integrity import check_files
from ..engines.directory.manifest import MANIFEST, read_manifest
from ..engines.tensorrt.plans import PlanFacts, planned_generations
from ..export.checkpoints.errors import CheckpointError, CheckpointForeign, CheckpointUnreadable
from ..export.checkpoints.finding import checkpoint_paths, recognise_whole
from ..export.checkpoints.recognise import describe, recognise
from ..export.checkpoints.shards import join_shards
from ..lora.errors import LoraUnreadable
from ..lora.reading import describe_lora
from ..machine.wording import format_bytes, printable
from ..runtime.pictures.files.formats import looks_like_picture
from ..specs import spec_to_dict
from .errors import NothingToInspect


def inspect_path(path: Path) -> dict[str, Any]:
    """The facts of whatever lies at ``path``; ``kind`` says what it is.

    Raises:
        CheckpointError: a checkpoint that is truncated or nearly right.
        EnginesError: a damaged engines directory.
        NothingToInspect: anything else.
    """
    if not path.exists():
        raise NothingToInspect(path, "not there")
    if (path / MANIFEST).is_file():
        return _engines_facts(path)
    if path.is_dir():
        return _folder_facts(path)
    if facts := _lora_facts(path):
        return facts
    try:
        return {"kind": "checkpoint", "models": [describe(recognise(path))]}
    except CheckpointForeign as error:
        raise NothingToInspect(path) from error
    except CheckpointUnreadable as error:
        if looks_like_picture(path):
            raise NothingToInspect(path, "a picture") from error
        raise


def text_lines(facts: Mapping[str, Any]) -> Iterator[str]:
    """The same for people: one fact a line, models as paragraphs."""
    for name, value in facts.items():
        if name in {"models", "engines", "loras"}:
            for model in value:
                yield ""
                yield from text_lines({key: item for key, item in model.items() if item is not None})
        elif isinstance(value, Mapping):
            if value:
                yield f"{name}:"
            yield from (
                f"  {printable(key)}: {printable(item) if isinstance(item, str) else json.dumps(item)}"
                for key, item in value.items()
            )
        elif isinstance(value, list):
            if value:
                yield f"{name}:"
            yield from (f"  {printable(str(item))}" for item in value)
        else:
            yield f"{name}: {format_bytes(value) if name == 'nbytes' else printable(str(value))}"


def _engines_facts(directory: Path) -> dict[str, Any]:
    manifest = read_manifest(directory)
    check_files(directory, manifest)
    models = [
        {
            **spec_to_dict(model.spec),
            "chunks": len(model.chunks),
            "pack": f"{manifest.build}/{model.pack}",
            "nbytes": manifest.files[model.pack].nbytes,
            "checkpoint": dict(model.checkpoint),
        }
        for model in manifest.models.values()
    ]
    return {
        "kind": "engines",
        "path": str(directory),
        "precision": manifest.precision,
        "precision_reason": manifest.precision_reason,
        "blocks_per_chunk": manifest.blocks_per_chunk,
        "created": manifest.created,
        "versions": dict(manifest.versions),
        "graphs": {name: f"{manifest.build}/{path}" for name, path in manifest.graphs.items()},
        "plans": {
            f"sm{sm}": _plans_facts(plans) for sm, plans in planned_generations(directory, manifest.precision).items()
        },
        "nbytes": sum(facts.nbytes for facts in manifest.files.values()),
        "models": models,
        "engines": [_engines_facts(inner)] if (inner := fp8_engines(directory)) else [],
    }


def _plans_facts(plans: Mapping[str, PlanFacts]) -> str:
    flavours = {f"{facts.key.flavour} {facts.key.version}" for facts in plans.values()}
    size = format_bytes(sum(facts.nbytes for facts in plans.values()))
    return f"{len(plans)} plans by {' and '.join(sorted(flavours))}, {size}"


def _folder_facts(path: Path) -> dict[str, Any]:
    models, loras, others, problems = [], [], [], []
    for shards in join_shards(checkpoint_paths(path)):
        try:
            models.append(describe(recognise_whole(shards)))
        except CheckpointForeign as error:
            if error.family:
                problems.append(str(error))
            elif facts := _lora_facts(shards[0]):
                loras.append({name: value for name, value in facts.items() if name != "metadata"})
            else:
                others.append(str(shards[0].relative_to(path)))
        except CheckpointError as error:
            problems.append(str(error))
    if not models and not problems and not loras:
        raise NothingToInspect(path)
    found = {"models": models, "loras": loras, "others": others, "problems": problems}
    return {"kind": "checkpoints" if models else "loras" if loras else "nothing whole", "path": str(path), **found}


def _lora_facts(path: Path) -> dict[str, Any] | None:
    try:
        return {"kind": "lora", **describe_lora(path)}
    except LoraUnreadable:
        return None
