"""What every request passes before anything looks at it, and what every answer carries.

A browser that shows another site's page will happily send a form to ``127.0.0.1``, and a name that somebody else's
name server points there makes even its answers readable to that page. So a request that names a foreign origin is
refused, and a service without a token, which only this machine should reach, answers to this machine's names only.
"""

import hmac
from collections.abc import Mapping, MutableMapping
from typing import Any
from urllib.parse import urlsplit

import anyio
from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from ..errors import OriginForeign, ServeError, TokenWrong
from ..settings import is_loopback
from .problems import problem_response

PUBLIC = frozenset({"/", "/page.css", "/page.js", "/icon.svg", "/healthz", "/readyz", "/openapi.json"})
"""What needs no token: nothing here says anything about anybody's pictures."""
CONTENT_POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' blob:; connect-src 'self'; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)
HEADERS: Mapping[str, str] = {
    "Content-Security-Policy": CONTENT_POLICY,
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cache-Control": "no-store",
}
ABORT = "i2l.abort"
"""Where the protocol puts what ends a connection at once (:mod:`.protocol`)."""


class Guard:
    """An ASGI middleware.

    Args:
        app: behind it.
        token: that requests must bear; None: none.
        loopback_names_only: refuse a Host that is no name of this machine's loopback.
        send_seconds: for a piece of an answer to be taken by the client.
    """

    def __init__(self, app: ASGIApp, *, token: str | None, loopback_names_only: bool, send_seconds: float) -> None:
        self._app = app
        self._token = token
        self._loopback_names_only = loopback_names_only
        self._send_seconds = send_seconds

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return

        async def guarded(message: Message) -> None:
            if message["type"] == "http.response.start":
                add_headers(message)
            try:
                with anyio.fail_after(self._send_seconds):
                    await send(message)
            except TimeoutError:  # what is written already would wait for the client for ever
                scope.get(ABORT, lambda: None)()

        try:
            self.require(scope)
        except ServeError as error:
            await problem_response(error)(scope, receive, guarded)
            return
        await self._app(scope, receive, guarded)

    def require(self, scope: Scope) -> None:
        """Raise what speaks against a request."""
        headers = Headers(scope=scope)
        host = headers.get("host", "")
        if self._loopback_names_only and not is_loopback(host_name(host)):
            raise OriginForeign("Host", host)
        origin = headers.get("origin")
        if origin is not None and origin_host(origin) != host.lower():
            raise OriginForeign("Origin", origin)
        if headers.get("sec-fetch-site") == "cross-site":
            raise OriginForeign("Sec-Fetch-Site", "cross-site")
        if self._token is not None and scope["path"] not in PUBLIC:
            require_token(headers.get("authorization", ""), self._token)


def require_token(authorization: str, token: str) -> None:
    """Raise :class:`TokenWrong` unless the header bears the token; takes as long for each wrong one."""
    scheme, _, given = authorization.partition(" ")
    same = hmac.compare_digest(given.strip().encode("utf-8", "replace"), token.encode())
    if scheme.lower() != "bearer" or not same:
        raise TokenWrong


def host_name(host: str) -> str:
    """The name in a Host header, without its port; empty if it is none."""
    try:
        return urlsplit(f"//{host}").hostname or ""
    except ValueError:
        return ""


def origin_host(origin: str) -> str:
    """The host and port of an Origin, as a Host header has them."""
    try:
        return urlsplit(origin).netloc.lower()
    except ValueError:
        return ""


def add_headers(message: MutableMapping[str, Any]) -> None:
    """Put the headers on an answer that has not set them itself."""
    headers = MutableHeaders(scope=message)
    for name, value in HEADERS.items():
        headers.setdefault(name, value)
