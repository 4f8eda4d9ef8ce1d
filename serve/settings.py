"""What a service may take, what it does when asked by strangers, and where it may listen."""

import ipaddress
from dataclasses import dataclass
from pathlib import Path

from ..runtime.passes import IMAGES_PER_PASS
from .errors import AddressOpen

MIN_TOKEN_LETTERS = 16
"""A shorter token can be guessed by trying."""


@dataclass(frozen=True)
class ServeLimits:
    """Bounds on what one client, and all of them together, can cost."""

    body_bytes: int = 64 << 20
    """Of one request."""
    pixels: int = 100_000_000
    """Of one picture, by its header."""
    pictures: int = 16
    """Of one request."""
    requests: int = 64
    """That are received, wait or run at once."""
    request_seconds: float = 600.0
    """From the first byte of the body until the LoRA file is there."""
    header_seconds: float = 20.0
    """For a request's head, and for each piece of a body or an answer."""
    connections: int = 512
    """Open at once, idle ones included."""
    keep_seconds: float = 3600.0
    """How long a finished job and its file are kept for whoever asked for its address."""
    stop_seconds: float = 60.0
    """For what was accepted, once the service is told to stop."""


@dataclass(frozen=True)
class Sharing:
    """Which requests share a pass over the weights."""

    window_seconds: float = 0.0
    """How long the first waits for company; none, as an idle service should answer at once."""
    pictures: int = IMAGES_PER_PASS
    """At most, unless one request alone has more."""


def is_loopback(host: str) -> bool:
    """Does only this machine reach the address?"""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return False


def require_guarded(host: str, *, has_token: bool, insecure: bool) -> None:
    """Raise :class:`AddressOpen` if other machines would reach a service that asks for no token."""
    if not (is_loopback(host) or has_token or insecure):
        raise AddressOpen(host)


def read_token(path: Path) -> str:
    """The token in a file, without the line's end.

    Raises:
        OSError: the file cannot be read.
        ValueError: it is short, or not one line of printable ASCII, which is all that a header can carry.
    """
    token = path.read_text(encoding="utf-8").strip()
    if len(token) < MIN_TOKEN_LETTERS or not token.isascii() or not token.isprintable() or " " in token:
        raise ValueError(f"it must hold one token of {MIN_TOKEN_LETTERS} or more letters without spaces")
    return token
