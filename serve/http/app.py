"""The application: routes, the page, health, metrics, and an explanation for whatever goes wrong."""

import logging
import secrets
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from functools import cache
from pathlib import Path
from typing import Any

import anyio
import anyio.to_thread
from fastapi import FastAPI, Request
from fastapi.openapi.utils import get_openapi
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect
from starlette.responses import FileResponse, JSONResponse, Response

from ... import __version__
from ...machine.errors import I2LError
from ..errors import InternalFailure, ServiceNotReady
from ..service import Service
from ..settings import is_loopback
from .guard import Guard
from .openapi import SCHEMAS, answers
from .problems import MEDIA_TYPE, plain_problem, problem_response
from .routes import routes

log = logging.getLogger(__name__)
PAGE = Path(__file__).parent.parent / "page"
PAGE_FILES = {
    "/": ("index.html", "text/html"),
    "/page.css": ("page.css", "text/css"),
    "/page.js": ("page.js", "text/javascript"),
    "/icon.svg": ("icon.svg", "image/svg+xml"),
}
CLOCK_SECONDS = 0.5
SENDING_THREADS = 4
"""Read files for answers: from the page cache, as they were just written."""
CLIENT_CLOSED = 499
"""What nginx logs for a client that hung up; nobody reads it."""


def make_app(service: Service, *, host: str, token: str | None, insecure: bool) -> FastAPI:
    """The application of a service that listens on ``host``."""

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        anyio.to_thread.current_default_thread_limiter().total_tokens = SENDING_THREADS
        async with anyio.create_task_group() as group:
            group.start_soon(keep_time, service)
            yield
            group.cancel_scope.cancel()

    app = FastAPI(
        title="i2l", version=__version__, docs_url=None, redoc_url=None, lifespan=lifespan,
        description="Pictures become LoRA files for the Z-Image diffusion model.",
    )  # fmt: skip
    app.include_router(routes(service))
    add_own_routes(app, service)
    add_page(app)
    add_explanations(app)
    describe(app, needs_token=token is not None)
    app.add_middleware(
        Guard,
        token=token,
        loopback_names_only=token is None and not insecure and is_loopback(host),
        send_seconds=service.limits.header_seconds,
    )
    return app


async def keep_time(service: Service) -> None:
    """End what takes too long, forget what is old."""
    while True:
        await anyio.sleep(CLOCK_SECONDS)
        service.book.expire()


def add_own_routes(app: FastAPI, service: Service) -> None:
    """How the service itself is."""

    @app.get("/healthz", responses=answers(ok={"text/plain": {"example": "ok"}}), response_class=Response,
             summary="The process answers")  # fmt: skip
    async def healthz() -> Response:
        return Response("ok", media_type="text/plain")

    @app.get("/readyz", responses=answers(ok={"application/json": {}}), summary="The engines are open, and where")
    async def readyz() -> Response:
        health = service.health
        if not health.ready or service.book.stopping:
            return problem_response(ServiceNotReady("stopping" if health.ready else health.reason))
        return JSONResponse(
            {"ready": True, "backend": health.backend, "reason": health.reason, "fallen_back": health.fallen_back}
        )

    @app.get("/metrics", responses=answers(ok={"text/plain": {}}), response_class=Response,
             summary="For Prometheus")  # fmt: skip
    async def metrics() -> Response:
        return Response(service.metrics_text(), media_type="text/plain; version=0.0.4")


def add_page(app: FastAPI) -> None:
    """The page for people: files of this package, nothing else."""
    for address, (name, media_type) in PAGE_FILES.items():

        @app.get(address, include_in_schema=False)
        async def page(name: str = name, media_type: str = media_type) -> Response:
            return FileResponse(PAGE / name, media_type=media_type)


def add_explanations(app: FastAPI) -> None:
    """Every failure becomes a problem document."""

    @app.exception_handler(I2LError)
    async def explained(_: Request, error: I2LError) -> Response:
        return problem_response(error)

    @app.exception_handler(HTTPException)
    async def of_http(_: Request, error: HTTPException) -> Response:
        return JSONResponse(
            plain_problem(error.status_code, str(error.detail)), error.status_code, error.headers, MEDIA_TYPE
        )

    @app.exception_handler(ClientDisconnect)
    async def gone(_: Request, __: ClientDisconnect) -> Response:
        return Response(status_code=CLIENT_CLOSED)

    @app.exception_handler(Exception)
    async def unexplained(_: Request, error: Exception) -> Response:
        reference = secrets.token_hex(4)
        log.error("%s: %r", reference, error)
        return problem_response(InternalFailure(reference))


def describe(app: FastAPI, *, needs_token: bool) -> None:
    """OpenAPI, with the schemas that the routes point at."""

    @cache
    def described() -> dict[str, Any]:
        page = get_openapi(title=app.title, version=app.version, description=app.description, routes=app.routes)
        components = page.setdefault("components", {})
        components["schemas"] = components.get("schemas", {}) | SCHEMAS
        if needs_token:
            components["securitySchemes"] = {"token": {"type": "http", "scheme": "bearer"}}
            page["security"] = [{"token": []}]
        return page

    app.openapi = described  # type: ignore[method-assign]
