"""Which of several CUDA cards: the one that was asked for, or the one with the most free memory when first asked.

Numbers are CUDA's, among the cards that it shows to this process (CUDA_VISIBLE_DEVICES; a MIG slice of a card is one).
"""

import logging
from collections.abc import Mapping, Sequence
from functools import cache

from ...machine.wording import format_bytes
from ..base import CardFacts
from ..errors import BackendUnavailable, DeviceFailed, OutOfDeviceMemory
from .driver import nvidia_cards

log = logging.getLogger(__name__)


def chosen_card(backend: str, device: str | None) -> int:
    """The number of the card.

    Args:
        backend: what it is for, for errors.
        device: a number, or a part of a name; None takes the one with the most free memory.

    Raises:
        BackendUnavailable: there is no such card.
    """
    names = [card.name for card in nvidia_cards({})]
    if device is None:
        return most_free(backend) if len(names) > 1 else 0
    index = card_number(names, device)
    if index is None:
        reason = f"there is no card {device} ({', '.join(names) or 'none'} found)"
        raise BackendUnavailable(backend, reason, "i2l doctor lists them")
    return index


def card_number(names: Sequence[str], device: str) -> int | None:
    """The number that a number or a part of a name stands for."""
    if device.isdecimal():
        return int(device) if int(device) < len(names) else None
    return next((number for number, name in enumerate(names) if device.casefold() in name.casefold()), None)


def card_facts(backend: str, libraries: Mapping[str, str], device: str | None) -> CardFacts | None:
    """What a proof on that card would be of; None where there is no such one."""
    cards = nvidia_cards(libraries)
    if device is None:
        return cards[chosen_card(backend, None)] if cards else None
    index = card_number([card.name for card in cards], device)
    return None if index is None else cards[index]


@cache
def most_free(backend: str) -> int:
    """The card with the most free memory, asked once and said; needs a context on each for a moment."""
    from .calls import DriverCalls  # noqa: PLC0415 - the leaf that needs cuda-bindings

    free: dict[int, int] = {}
    names = [card.name for card in nvidia_cards({})]
    for index in range(len(names)):
        try:
            call = DriverCalls(index, backend)
            try:
                free[index], _ = map(int, call("cuMemGetInfo"))
            finally:
                call.close()
        except (BackendUnavailable, DeviceFailed, OutOfDeviceMemory) as error:  # full, or in use by one program alone
            log.info("card %d, %s, is passed over: %s", index, names[index], error)
    best = max(free, key=lambda index: free[index], default=0)
    log.info("of %d cards number %d, %s, has the most free memory (%s): --device takes another one",
             len(names), best, names[best], format_bytes(free.get(best, 0)))  # fmt: skip
    return best
