"""The routes: each a few lines between a request and the book of jobs."""

import asyncio
import tempfile
from collections.abc import AsyncIterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import anyio
import anyio.to_thread
from fastapi import APIRouter, Request
from starlette.requests import ClientDisconnect
from starlette.responses import FileResponse, JSONResponse, Response, StreamingResponse
from starlette.types import Receive, Scope, Send

from ...machine.errors import I2LError, PackageMissing
from ..errors import JobUnfinished, RequestTimedOut, ServiceNotReady
from ..jobbook import JobBook, ServedJob
from ..service import Service
from ..uploads import read_pictures
from ..wishes import read_wish
from .forms import receive_form
from .openapi import BINARY, JOB_CONTENT, POST_BODY, answers
from .reports import event, report, server_timing

TICK_SECONDS = 0.2
"""Between two looks at a job's progress."""
SILENCE_SECONDS = 15.0
"""A stream of events says something so often, as what lies between cuts silent connections."""


class LoraResponse(FileResponse):
    """A job's LoRA, after which the job is forgotten."""

    def __init__(self, path: Path, book: JobBook, job: ServedJob, headers: dict[str, str]) -> None:
        super().__init__(path, headers=headers, media_type="application/octet-stream", filename=path.name)
        self._book, self._job = book, job

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            self._book.forget(self._job)


class InTurn:
    """Work in a thread, one at a time: a picture or a plot takes up to a gigabyte."""

    def __init__(self) -> None:
        self._limiter: anyio.CapacityLimiter | None = None

    async def __call__(self, work: Any, *arguments: Any) -> Any:
        if self._limiter is None:  # it belongs to the event loop, which runs only now
            self._limiter = anyio.CapacityLimiter(1)
        return await anyio.to_thread.run_sync(work, *arguments, limiter=self._limiter)


async def receive(service: Service, in_turn: InTurn, request: Request) -> ServedJob:
    """A request becomes an accepted job, or nothing of it is left."""
    book, limits = service.book, service.limits
    if not service.health.ready and not book.stopping:
        raise ServiceNotReady(service.health.reason)
    job = book.begin()
    try:
        with anyio.fail_after(limits.request_seconds):
            headers = request.headers
            form = await receive_form(
                headers.get("content-type", ""), headers.get("content-length"), chunks(request), job.folder, limits
            )
            job.pictures = len(form.uploads)
            job.wish = read_wish(form.fields, job.pictures)
            job.marks = await in_turn(read_pictures, job.folder, form.uploads, limits.pixels)
            book.accept(job)
    except TimeoutError as error:
        raise RequestTimedOut(limits.request_seconds) from error
    finally:
        if not job.queued:
            book.end(job, "failed")
            book.forget(job)
    service.metrics.accepted.inc()
    return job


def routes(service: Service) -> APIRouter:
    """All of ``/v1``."""
    router = APIRouter(prefix="/v1")
    in_turn = InTurn()
    router.include_router(making(service, in_turn))
    router.include_router(looking(service, in_turn))
    return router


def making(service: Service, in_turn: InTurn) -> APIRouter:
    """What takes pictures."""
    router, book = APIRouter(), service.book

    @router.post(
        "/loras",
        responses=answers(ok={"application/octet-stream": BINARY}, accepted=JOB_CONTENT),
        response_class=Response,
        openapi_extra=POST_BODY,
        summary="One or more pictures become a LoRA file",
    )
    async def make_lora(request: Request) -> Response:
        try:
            job = await receive(service, in_turn, request)
        except (I2LError, ClientDisconnect) as error:
            service.metrics.requests.labels("vanished" if isinstance(error, ClientDisconnect) else "refused").inc()
            raise
        if "respond-async" in preferences(request):
            headers = {"Location": f"/v1/jobs/{job.id}", "Preference-Applied": "respond-async"}
            return JSONResponse(report(job), 202, headers)
        await ended(book, job, request)
        if job.state == "done":
            headers = {"Server-Timing": server_timing(job), "I2l-Job": job.id}
            return LoraResponse(service.spool.lora(job.id, job.wish.name), book, job, headers)
        book.forget(job)
        raise job.error or ClientDisconnect

    return router


def looking(service: Service, in_turn: InTurn) -> APIRouter:
    """What follows, fetches and cancels jobs."""
    router, book = APIRouter(), service.book

    @router.get("/jobs/{job_id}", responses=answers(ok=JOB_CONTENT), summary="What a job does")
    async def get_job(job_id: str) -> JSONResponse:
        return JSONResponse(report(book.get(job_id)))

    @router.delete(
        "/jobs/{job_id}", responses=answers(ok=JOB_CONTENT), summary="Cancel a job; forget one that has ended"
    )
    async def delete_job(job_id: str) -> JSONResponse:
        job = book.get(job_id)
        if job.is_open:
            book.cancel(job)
        else:
            book.forget(job)
        return JSONResponse(report(job))

    @router.get(
        "/jobs/{job_id}/lora",
        responses=answers(ok={"application/octet-stream": BINARY}),
        response_class=Response,
        summary="The LoRA of a job that is done",
    )
    async def get_lora(job_id: str) -> Response:
        job = done(book.get(job_id))
        path = service.spool.lora(job.id, job.wish.name)
        return FileResponse(path, media_type="application/octet-stream", filename=path.name)

    @router.get(
        "/jobs/{job_id}/plot",
        responses=answers(ok={"image/png": BINARY}),
        response_class=Response,
        summary="Where the LoRA of a job acts, as i2l plot draws it",
    )
    async def get_plot(job_id: str) -> Response:
        job = done(book.get(job_id))
        return Response(await in_turn(plot, service.spool.lora(job.id, job.wish.name)), media_type="image/png")

    @router.get(
        "/events/{job_id}",
        responses=answers(ok={"text/event-stream": {"schema": {"type": "string"}}}),
        response_class=Response,
        summary="A job's progress as server-sent events",
    )
    async def get_events(job_id: str) -> StreamingResponse:
        return StreamingResponse(events(book.get(job_id)), media_type="text/event-stream")

    return router


async def chunks(request: Request) -> AsyncIterator[bytes]:
    """The body in pieces, the empty last one left out."""
    async for chunk in request.stream():
        if chunk:
            yield chunk


def preferences(request: Request) -> set[str]:
    """The names in the header Prefer (RFC 7240)."""
    values = ",".join(request.headers.getlist("prefer")).split(",")
    return {value.partition(";")[0].partition("=")[0].strip().lower() for value in values}


def done(job: ServedJob) -> ServedJob:
    """A job that has a LoRA; raises its own error, or :class:`JobUnfinished`."""
    if job.state != "done":
        raise job.error or JobUnfinished(job.state)
    return job


async def ended(book: JobBook, job: ServedJob, request: Request) -> None:
    """Wait until a job has ended; it is cancelled when the client hangs up."""
    loop, happened = asyncio.get_running_loop(), asyncio.Event()

    def tell() -> None:
        with suppress(RuntimeError):  # the loop is closed: nobody waits any more
            loop.call_soon_threadsafe(happened.set)

    async def watch() -> None:
        while (await request.receive())["type"] != "http.disconnect":
            pass
        book.cancel(job)

    book.listen(job, tell)
    try:
        async with anyio.create_task_group() as group:
            group.start_soon(watch)
            await happened.wait()
            group.cancel_scope.cancel()
    finally:
        book.cancel(job)  # does nothing but where this task was cancelled


async def events(job: ServedJob) -> AsyncIterator[bytes]:
    """A job's report whenever it changed, until it has ended."""
    last: dict[str, Any] = {}
    silent = 0.0
    while True:
        open_now = job.is_open
        facts = report(job)
        if facts != last:
            yield event("progress" if open_now else "end", facts)
            last, silent = facts, 0.0
        if not open_now:
            return
        if silent >= SILENCE_SECONDS:
            yield b": waiting\n\n"
            silent = 0.0
        await anyio.sleep(TICK_SECONDS)
        silent += TICK_SECONDS


def plot(lora: Path) -> bytes:
    """A LoRA's heat map as PNG."""
    try:
        from ...look.plotting import plot_loras  # noqa: PLC0415 - an extra, and half a second
    except ModuleNotFoundError as error:
        raise PackageMissing(error.name or "matplotlib", "drawing a LoRA", "plot") from error
    from ...lora.other_kinds import read_changes  # noqa: PLC0415

    with tempfile.TemporaryDirectory() as folder:
        output = Path(folder) / "plot.png"
        plot_loras([read_changes(lora)], output)
        return output.read_bytes()
