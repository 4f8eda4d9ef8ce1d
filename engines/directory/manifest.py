"""The manifest: what an engines directory holds, written last, so a directory with a manifest is complete.

    engines/
      manifest.json
      build-<id>/                      everything below is named by the manifest and belongs to one build
        graphs/dinov3.block.onnx       one per kind of step, weights as inputs
        dinov3/weights.safetensors     the pack
        dinov3/dinov3.block.07.onnx    the same graph with external weights in the pack, for other tools

For GPUs of several generations there may be another one inside (generations.py).

Its first line holds the hash of the others, so that a flipped bit of it is found before it is believed.

It comes from outside, and whoever writes a hostile one writes the hash too: so names are single folders and files below
the build folder, tensors lie in their chunks and chunks in their pack, or it is refused.

A new build makes its own folder, replaces the manifest in one move and only then removes the old folder: a build that
dies leaves the previous engines usable.
"""

import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from ...machine.files import read_small
from ...machine.wording import printable
from ...specs import FAMILIES, Family, Spec, spec_from_dict, spec_to_dict
from ..errors import EnginesMissing, ManifestInvalid
from .dtypes import ELEMENT_TYPES
from .hashing import FileFacts
from .tensorfile import PAD_PREFIX, TensorInfo

FORMAT = 4
"""Raised whenever an older i2l could misread a newer manifest, or the other way round."""
MANIFEST = "manifest.json"
PROOFS = "proofs.json"
"""Beside it: what cards have shown with these engines (runtime/proof/records.py)."""
IMAGES_MEET = "i2l.images_meet"
"""Metadata of a graph: ``no`` where what a picture gives does not depend on its batch, to the bit. Such graphs take a
batch at once; others, of floats or made by an older i2l, take one picture at a time: a LoRA is that of its picture."""

INTERMEDIATES = "i2l.intermediate_bytes"
"""Metadata of a plugin provider's graph: ``fixed,per picture``, bytes of memory that it computes in."""
NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,199}")
BUILD = re.compile(r"build-[A-Za-z0-9_-]{1,64}")
SHA256 = re.compile(r"[0-9a-f]{64}")
DEPTH = 3
"""Folders and file of the longest path in a build folder: ``cpu/graphs/siglip2.block.onnx``."""


@dataclass(frozen=True)
class Step:
    """One run of a graph with one set of weights."""

    name: str
    """Such as ``dinov3.block.07``; the pack's tensors are named ``<name>.<graph input>``."""
    graph: str


@dataclass(frozen=True)
class Chunk:
    """A contiguous region of a pack that moves as one copy."""

    offset: int
    nbytes: int
    steps: tuple[Step, ...]


@dataclass(frozen=True)
class Model:
    """One of the three models."""

    spec: Spec
    pack: str
    """Path of the pack in the build folder."""
    chunks: tuple[Chunk, ...]
    """In the order of running; together they are the whole data of the pack."""
    tensors: Mapping[str, TensorInfo]
    checkpoint: Mapping[str, Any]
    """What the model was built from: shape hash, dtype, bytes, time of modification."""


@dataclass(frozen=True)
class Manifest:
    """The facts of an engines directory."""

    build: str
    """Name of the build folder."""
    build_key: str
    """Hash of everything the build depends on: equal key, nothing to do."""
    precision: str
    precision_reason: str
    blocks_per_chunk: int
    versions: Mapping[str, str]
    created: str
    """UTC, ISO 8601."""
    models: Mapping[Family, Model]
    graphs: Mapping[str, str]
    """``graph name -> path`` in the build folder."""
    files: Mapping[str, FileFacts]
    """Every file of the build folder."""


def read_manifest(directory: Path, *, planned: bool = False) -> Manifest:
    """The manifest of an engines directory, checked against its own hash and against itself.

    Args:
        directory: the engines directory.
        planned: its packs are not there yet.

    Raises:
        EnginesMissing: there is none.
        ManifestInvalid: it was written by another version, is damaged, or is not a manifest.
    """
    path = directory / MANIFEST
    try:
        text = read_small(path)
    except (FileNotFoundError, NotADirectoryError) as error:
        raise EnginesMissing(directory) from error
    except OSError as error:
        raise ManifestInvalid(path, str(error.strerror)) from error
    try:
        return _parsed(path, text, planned=planned)
    except (KeyError, IndexError, TypeError, AttributeError, RecursionError, OverflowError) as error:
        raise ManifestInvalid(path, f"it does not parse: {printable(str(error))[:200]}") from error


def _parsed(path: Path, text: bytes, *, planned: bool) -> Manifest:
    try:
        values = json.loads(text)
    except ValueError as error:
        raise ManifestInvalid(path, f"it does not parse: {error}") from error
    if values.get("format") != FORMAT:
        raise ManifestInvalid(path, f"its format is {values.get('format')}, this i2l reads {FORMAT}")
    if values["sha256"] != hashlib.sha256(text.partition(b"\n")[2]).hexdigest():
        raise ManifestInvalid(path, "its content is not what was written")
    try:
        manifest = _manifest_from_dict(values)
        require_sound(manifest, planned=planned)
    except ValueError as error:
        raise ManifestInvalid(path, f"it does not parse: {printable(str(error))[:200]}") from error
    return manifest


def content_id(manifest: Manifest, families: Sequence[Family]) -> str:
    """Identifies what the given models compute: a hash of their packs' and graphs' contents and the precision.

    Unlike the build key it does not change when the same checkpoints are built again, or elsewhere.
    """
    models = [manifest.models[family] for family in families]
    graphs = {step.graph for model in models for chunk in model.chunks for step in chunk.steps}
    paths = [*(model.pack for model in models), *(manifest.graphs[graph] for graph in sorted(graphs))]
    facts = [manifest.precision, *((path, manifest.files[path].sha256) for path in paths)]
    return hashlib.sha256(json.dumps(facts).encode()).hexdigest()


def inputs_of(step: Step, model: Model) -> dict[str, TensorInfo]:
    """``graph input -> tensor`` of a step's weights."""
    prefix = f"{step.name}."
    return {name.removeprefix(prefix): info for name, info in model.tensors.items() if name.startswith(prefix)}


def graphs_of(model: Model) -> set[str]:
    """The graphs that a model's steps run."""
    return {step.graph for chunk in model.chunks for step in chunk.steps}


def spec_hash(spec: Spec) -> str:
    """A hash of an architecture."""
    return hashlib.sha256(json.dumps(spec_to_dict(spec), sort_keys=True).encode()).hexdigest()


def manifest_to_json(manifest: Manifest) -> str:
    """The text of ``manifest.json``; tensors as ``[dtype, shape, offset]`` rows, as there are thousands."""
    values = asdict(manifest)
    for family, model in manifest.models.items():
        values["models"][family]["spec"] = spec_to_dict(model.spec)
        tensors = {name: [info.dtype, info.shape, info.offset] for name, info in model.tensors.items()}
        values["models"][family]["tensors"] = tensors
    body = json.dumps(values, indent=None, separators=(",", ":"))[1:]
    return f'{{"format":{FORMAT},"sha256":"{hashlib.sha256(body.encode()).hexdigest()}",\n{body}'


def _manifest_from_dict(values: dict[str, Any]) -> Manifest:
    values = {name: value for name, value in values.items() if name not in {"format", "sha256"}}
    if set(values["models"]) != set(FAMILIES):
        raise ValueError(f"it has the models {sorted(values['models'])}")
    models = {family: _model_from_dict(values["models"][family]) for family in FAMILIES}
    files = {name: FileFacts(**facts) for name, facts in values["files"].items()}
    return Manifest(**{**values, "models": models, "files": files})


def _model_from_dict(values: dict[str, Any]) -> Model:
    chunks = tuple(
        Chunk(chunk["offset"], chunk["nbytes"], tuple(Step(**step) for step in chunk["steps"]))
        for chunk in values["chunks"]
    )
    tensors = {name: TensorInfo(row[0], tuple(row[1]), row[2]) for name, row in values["tensors"].items()}
    return Model(**{**values, "spec": spec_from_dict(values["spec"]), "chunks": chunks, "tensors": tensors})


def require_sound(manifest: Manifest, *, planned: bool) -> None:
    """Check what a manifest says against itself.

    Args:
        manifest: as it was read.
        planned: its packs are not there yet.

    Raises:
        ValueError: what is wrong with it.
    """
    _require(BUILD.fullmatch(manifest.build), f"its build is called {manifest.build!r}")
    _require(NAME.fullmatch(manifest.precision), f"its precision is {manifest.precision!r}")
    texts = (manifest.build_key, manifest.precision_reason, manifest.created, *dict(manifest.versions).values())
    _require(all(isinstance(text, str) for text in texts), "one of its texts is none")
    _require(_is_count(manifest.blocks_per_chunk), f"it has {manifest.blocks_per_chunk!r} blocks per chunk")
    for name, facts in manifest.files.items():
        parts = PurePosixPath(name).parts
        _require("/".join(parts) == name and 0 < len(parts) <= DEPTH, f"it names the file {name!r}")
        _require(all(NAME.fullmatch(part) for part in parts), f"it names the file {name!r}")
        _require(_is_count(facts.nbytes) and SHA256.fullmatch(facts.sha256), f"the facts of {name} are no facts")
        _require(isinstance(facts.regions, str), f"the regions of {name} are no text")
    for graph, path in manifest.graphs.items():
        _require(NAME.fullmatch(graph) and path in manifest.files, f"the graph {graph!r} is no file of it")
    for family, model in manifest.models.items():
        _require(model.spec.family == family, f"the spec of {family} is that of {model.spec.family}")
        sources = [model.checkpoint["shape_hash"], *dict(model.checkpoint).values()]
        _require(all(isinstance(fact, str | int) for fact in sources), f"the checkpoint of {family} is {sources}")
        nbytes = None if planned else manifest.files[model.pack].nbytes
        _require(PurePosixPath(model.pack).parts[:-1] == (family,), f"the pack of {family} is {model.pack!r}")
        _require(NAME.fullmatch(PurePosixPath(model.pack).name), f"the pack of {family} is {model.pack!r}")
        _require_regions(family, model, nbytes)
        used = {step.graph for chunk in model.chunks for step in chunk.steps}
        _require(used <= manifest.graphs.keys(), f"{family} runs graphs that are not there: {sorted(used)[:3]}")


def _require_regions(family: str, model: Model, pack_bytes: int | None) -> None:
    """Chunks follow one another in the pack, and each step's tensors lie in its chunk."""
    homes: dict[str, Chunk] = {}
    end = 0
    for chunk in model.chunks:
        _require(_is_count(chunk.offset) and _is_count(chunk.nbytes), f"a chunk of {family} has no place")
        _require(chunk.offset >= end and chunk.nbytes > 0 and chunk.steps, f"chunks of {family} overlap or are empty")
        end = chunk.offset + chunk.nbytes
        for step in chunk.steps:
            _require(NAME.fullmatch(step.name) and step.name not in homes, f"the step {step.name!r} of {family}")
            homes[step.name] = chunk
    _require(homes, f"{family} has no steps")
    _require(pack_bytes is None or end <= pack_bytes, f"the chunks of {family} end behind its pack")
    for name, info in model.tensors.items():
        _require(_is_tensor(info), f"the tensor {name} of {family} has no form")
        if name.startswith(PAD_PREFIX):
            continue
        home = _home(name, homes)
        inside = home and home.offset <= info.offset and info.offset + info.nbytes <= home.offset + home.nbytes
        _require(inside, f"the tensor {name} of {family} lies outside its chunk")


def _home(name: str, homes: Mapping[str, Chunk]) -> Chunk | None:
    """The chunk of the step whose tensor this is: the step's name is what stands before some dot."""
    parts = name.split(".")
    return next((home for n in range(len(parts) - 1, 0, -1) if (home := homes.get(".".join(parts[:n])))), None)


def _is_tensor(info: TensorInfo) -> bool:
    known = info.dtype in ELEMENT_TYPES and _is_count(info.offset)
    return known and isinstance(info.shape, Sequence) and all(map(_is_count, info.shape))


def _is_count(value: object) -> bool:
    return type(value) is int and 0 <= value < 1 << 62


def _require(condition: object, reason: str) -> None:
    if not condition:
        raise ValueError(reason)
