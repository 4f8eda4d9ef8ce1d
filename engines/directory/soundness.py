"""A manifest comes from outside: what it names must lie in its directory, and its numbers must fit one another.

The hash in a manifest finds damage. Whoever writes a hostile one writes the hash too, so nothing here trusts it: names
are single folders and files below the build folder, tensors lie in their chunks and chunks in their pack.
"""

import re
from collections.abc import Mapping, Sequence
from pathlib import PurePosixPath
from typing import TYPE_CHECKING

from .dtypes import ELEMENT_TYPES
from .tensorfile import PAD_PREFIX, TensorInfo

if TYPE_CHECKING:
    from .manifest import Chunk, Manifest, Model

NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,199}")
BUILD = re.compile(r"build-[A-Za-z0-9_-]{1,64}")
SHA256 = re.compile(r"[0-9a-f]{64}")
DEPTH = 3
"""Folders and file of the longest path in a build folder: ``cpu/graphs/siglip2.block.onnx``."""


def require_sound(manifest: "Manifest", *, planned: bool) -> None:
    """Check what a manifest says against itself.

    Args:
        manifest: as it was read.
        planned: its packs are not there yet.

    Raises:
        ValueError: what is wrong with it.
    """
    _require(BUILD.fullmatch(manifest.build), f"its build is called {manifest.build!r}")
    _require(NAME.fullmatch(manifest.precision), f"its precision is {manifest.precision!r}")
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
        nbytes = None if planned else manifest.files[model.pack].nbytes
        _require(PurePosixPath(model.pack).parts[:-1] == (family,), f"the pack of {family} is {model.pack!r}")
        _require(NAME.fullmatch(PurePosixPath(model.pack).name), f"the pack of {family} is {model.pack!r}")
        _require_regions(family, model, nbytes)
        used = {step.graph for chunk in model.chunks for step in chunk.steps}
        _require(used <= manifest.graphs.keys(), f"{family} runs graphs that are not there: {sorted(used)[:3]}")


def _require_regions(family: str, model: "Model", pack_bytes: int | None) -> None:
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


def _home(name: str, homes: "Mapping[str, Chunk]") -> "Chunk | None":
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
