"""What became of the colour profiles of Apply's pictures, for the LoRA's metadata.

An IMAGE is numbers alone, and joining or resizing pictures makes new ones. So the prompt is asked: up from Apply along
the links that carry pictures, every way ends in a node that made some. Our Load Picture says what it does; any other
source, such as ComfyUI's Load Image, has dropped the profile if there was one.
"""

from collections.abc import Callable, Iterator, Mapping
from typing import Any, Protocol, TypeAlias

from nodes import NODE_CLASS_MAPPINGS

from ...runtime.pictures.sources import ICC_KEY, colours_mark

LOAD_PICTURE = "ZImageI2L_LoadPicture"
IGNORED, CONVERTED = (colours_mark(ignore_icc=ignored)[ICC_KEY] for ignored in (True, False))
MIXED = f"{CONVERTED} in some pictures, {IGNORED} in others"
UNKNOWN = "unknown, as another node decided"
"""``ignore_icc`` was no value but a link."""
ANY_TYPE = ("*", "COMFY_")
"""How the names of types begin that may be pictures: of Reroute, of switches."""

Node: TypeAlias = Mapping[str, Any]
TypeOf: TypeAlias = Callable[[str, int], str]
"""``(class_type, output) -> type`` of a node's socket."""


class Prompt(Protocol):
    """Of ComfyUI's ``DynamicPrompt``: also has the nodes that nodes put there."""

    def get_node(self, node_id: str) -> Node: ...


def profiles_mark(prompt: Prompt | None, node_id: str) -> dict[str, str]:
    """The metadata entry for what reaches ``images`` of a node; as ``i2l run`` has it if all pictures are alike."""
    fates = set() if prompt is None else set(profile_fates(prompt, node_id, "images", output_type))
    return {ICC_KEY: IGNORED if not fates else fates.pop() if len(fates) == 1 else MIXED}


def profile_fates(prompt: Prompt, node_id: str, socket: str, type_of: TypeOf) -> Iterator[str]:
    """What each source of pictures above a socket does with profiles; a source that is met twice says it once."""
    waiting, seen = [prompt.get_node(node_id)["inputs"].get(socket)], set()
    while waiting:
        link = waiting.pop()
        if not is_link(link) or link[0] in seen:
            continue
        seen.add(link[0])
        node = prompt.get_node(link[0])
        if node["class_type"] == LOAD_PICTURE:
            yield handling(node["inputs"].get("ignore_icc", False))
            continue
        above = [value for value in node["inputs"].values() if is_link(value)]
        above = [link for link in above if may_be_pictures(type_of(prompt.get_node(link[0])["class_type"], link[1]))]
        if not above:
            yield IGNORED
        waiting += above


def handling(ignore_icc: object) -> str:
    """What Load Picture does with this value of its widget."""
    if isinstance(ignore_icc, bool):
        return IGNORED if ignore_icc else CONVERTED
    return UNKNOWN


def is_link(value: object) -> bool:
    """``[node, output]``, where a prompt has no value."""
    return isinstance(value, list) and len(value) == 2 and isinstance(value[0], str) and isinstance(value[1], int)


def may_be_pictures(kind: str) -> bool:
    """Can an output of this type carry an IMAGE?"""
    return "IMAGE" in kind.split(",") or kind.startswith(ANY_TYPE)


def output_type(class_type: str, output: int) -> str:
    """The type of an output of a node that ComfyUI knows."""
    return str(NODE_CLASS_MAPPINGS[class_type].RETURN_TYPES[output])
