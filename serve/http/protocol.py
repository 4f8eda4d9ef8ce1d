"""uvicorn's HTTP/1.1, for strangers: a head must come within seconds, a malformed one gets a problem document.

uvicorn waits for a request's head for ever once the first byte is there, and so for a body that nobody reads any more.
One timer for each connection bounds both: it runs whenever no request is being answered.
"""

import asyncio
import json
from typing import Any, cast

import h11
from uvicorn.protocols.http.h11_impl import H11Protocol

from ..settings import ServeLimits
from .guard import ABORT, HEADERS
from .problems import MEDIA_TYPE, plain_problem


class BoundedProtocol(H11Protocol):
    """One connection. ``limits`` is set on a subclass, as uvicorn makes the instances (:func:`protocol_for`)."""

    limits = ServeLimits()
    _head_timer: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        if len(self.connections) > self.limits.connections:
            self._refuse(503, "there are too many connections: try again later")
            return
        self._await_head()

    def data_received(self, data: bytes) -> None:
        if not self.transport.is_closing():
            super().data_received(data)

    def handle_events(self) -> None:
        before = self.cycle
        super().handle_events()
        if self.cycle is not before:  # a request has begun
            self._stop_timer()
            cast("dict[str, Any]", self.scope)[ABORT] = self.transport.abort

    def connection_lost(self, exc: Exception | None) -> None:
        self._stop_timer()
        super().connection_lost(exc)

    def on_response_complete(self) -> None:
        before = self.cycle
        super().on_response_complete()
        if self.cycle is before:  # also where it is closing: what is not sent yet may never be taken
            self._await_head()

    def send_400_response(self, msg: str) -> None:
        """What uvicorn says to a head that it cannot read."""
        self._refuse(400, f"{msg.rstrip('.')}: send HTTP/1.1 with a head of less than 64 KiB")

    def handle_websocket_upgrade(self, event: h11.Request) -> None:  # noqa: ARG002 - uvicorn's signature
        self._refuse(400, "this service has no web sockets: use plain requests")

    def _refuse(self, status: int, detail: str) -> None:
        self._stop_timer()
        body = json.dumps(plain_problem(status, detail)).encode()
        lines = {
            "Content-Type": MEDIA_TYPE,
            "Content-Length": str(len(body)),
            "Connection": "close",
            **HEADERS,
        }
        head = "".join(f"{name}: {value}\r\n" for name, value in lines.items())
        title = plain_problem(status, "")["title"]
        self.transport.write(f"HTTP/1.1 {status} {title}\r\n{head}\r\n".encode() + body)
        self.transport.close()

    def _await_head(self) -> None:
        self._stop_timer()
        self._head_timer = self.loop.call_later(self.limits.header_seconds, self.transport.abort)

    def _stop_timer(self) -> None:
        if self._head_timer is not None:
            self._head_timer.cancel()
            self._head_timer = None


def protocol_for(limits: ServeLimits) -> type[asyncio.Protocol]:
    """The protocol class with these limits."""
    return type("LimitedProtocol", (BoundedProtocol,), {"limits": limits})
