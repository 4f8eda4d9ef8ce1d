"""Dataclasses that were made of somebody's JSON: is every value of the type that its field says?"""

import math
from collections.abc import Mapping
from types import UnionType
from typing import Any, TypeVar, get_args, get_origin, get_type_hints

T = TypeVar("T")


def typed(facts: T) -> T:
    """The same facts.

    Raises:
        ValueError: a value is of another type, or a number that is none.
    """
    for name, hint in get_type_hints(type(facts)).items():
        if not _fits(getattr(facts, name), hint):
            raise ValueError(f"{name} is {getattr(facts, name)!r}")
    return facts


def _fits(value: object, hint: Any) -> bool:
    if isinstance(hint, UnionType):
        return any(_fits(value, choice) for choice in get_args(hint))
    if get_origin(hint) is Mapping:
        return isinstance(value, dict) and all(_fits(each, get_args(hint)[1]) for each in value.values())
    if get_origin(hint) is tuple:
        return isinstance(value, tuple) and all(_fits(each, get_args(hint)[0]) for each in value)
    if hint is float:
        return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
    return type(value) is hint
