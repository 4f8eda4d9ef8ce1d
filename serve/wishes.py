"""What a client asks for: the texts of a form become numbers and choices, or an error that names the field."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TypeVar, get_args

from ..lora.keys import KeyFormat
from ..lora.lora import Dtype, joining_weights, require_finite
from .errors import RequestInvalid

FIELDS = ("weights", "strength", "rank", "key_format", "dtype", "name")
"""Beside ``pictures``; each once, but for weights."""
MAX_NAME_LETTERS = 80
MAX_RANK = 1024
MAX_NUMBER = 1e6
"""Of a strength or a weight: beyond it the values overflow in every dtype anyway."""
Choice = TypeVar("Choice", bound=str)
NOT_IN_NAMES = frozenset('/\\:*?"<>|')
"""What some file system refuses or reads as a path."""


@dataclass(frozen=True)
class Wish:
    """The LoRA that is to come."""

    name: str = "lora"
    """Of the file, without its suffix; it is also the title in the file's header."""
    strength: float = 1.0
    weights: tuple[float, ...] | None = None
    """One for each picture; None: equal ones."""
    rank: int | None = None
    """At most, as ``--reduce-rank``."""
    dtype: Dtype = "bf16"
    key_format: KeyFormat = "comfyui"


def read_wish(fields: Mapping[str, Sequence[str]], pictures: int) -> Wish:
    """The wish in a form's fields.

    Raises:
        RequestInvalid: a field is unknown, twice there, or not what it should be.
        WeightsMismatch, StrengthInvalid: the weights do not fit the pictures.
    """
    if not pictures:
        raise RequestInvalid("the request has no picture", "send one or more parts called pictures, each a file")
    for field, values in fields.items():
        if field not in FIELDS:
            raise RequestInvalid(f"there is no field {field[:40]!r}", f"use pictures, {', '.join(FIELDS)}")
        if len(values) > 1 and field != "weights":
            raise RequestInvalid(f"the field {field} is there {len(values)} times", "send it once")
    one = {field: values[0] for field, values in fields.items() if field != "weights"}
    weights = tuple(_number("weights", text) for text in fields.get("weights", ())) or None
    joining_weights(weights, pictures, "picture")
    defaults = Wish()
    return Wish(
        name=_name(one.get("name", defaults.name)),
        strength=require_finite("strength", _number("strength", one.get("strength", "1"))),
        weights=weights,
        rank=_rank(one["rank"]) if "rank" in one else None,
        dtype=_choice("dtype", one.get("dtype", defaults.dtype), get_args(Dtype)),
        key_format=_choice("key_format", one.get("key_format", defaults.key_format), get_args(KeyFormat)),
    )


def _number(field: str, text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not abs(value) <= MAX_NUMBER:
        raise RequestInvalid(f"{field} is {text[:40]!r}", f"send a number from -{MAX_NUMBER:g} to {MAX_NUMBER:g}")
    return value


def _rank(text: str) -> int:
    if not (text.isascii() and text.isdigit() and len(text) < 6 and 1 <= int(text) <= MAX_RANK):
        raise RequestInvalid(f"rank is {text[:40]!r}", f"send a whole number from 1 to {MAX_RANK}")
    return int(text)


def _choice(field: str, text: str, choices: tuple[Choice, ...]) -> Choice:
    for choice in choices:
        if choice == text:
            return choice
    raise RequestInvalid(f"{field} is {text[:40]!r}", f"send one of {', '.join(choices)}")


def _name(text: str) -> str:
    usable = (
        0 < len(text) <= MAX_NAME_LETTERS
        and text.isprintable()
        and text == text.strip(" .")
        and not NOT_IN_NAMES & set(text)
        and len(text.encode()) <= 2 * MAX_NAME_LETTERS
    )
    if not usable:
        raise RequestInvalid(
            f"name is {text[:40]!r}",
            f"send a file's name of at most {MAX_NAME_LETTERS} letters, no path, without the suffix",
        )
    return text
