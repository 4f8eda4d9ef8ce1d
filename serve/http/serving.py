"""uvicorn around the application: it listens, stops on SIGTERM or Ctrl-C, and says what it does."""

import asyncio
import logging
import socket
import time
from types import FrameType

import uvicorn

from ...machine.errors import I2LError
from ..errors import AddressTaken
from ..service import Service
from .app import make_app
from .protocol import protocol_for

log = logging.getLogger(__name__)
LOOK_SECONDS = 0.05


class Server(uvicorn.Server):
    """A server whose first signal stops it gracefully and whose second one at once; it then ends with code 0."""

    def __init__(self, config: uvicorn.Config, service: Service) -> None:
        super().__init__(config)
        self._service = service
        self.stopped_at = 0.0

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:  # noqa: ARG002 - uvicorn's signature
        if self.should_exit:
            self.force_exit = True
            return
        self.stop()

    def stop(self) -> None:
        """Take no more work; called in a signal's handler or in another thread."""
        self.stopped_at = self.stopped_at or time.monotonic()
        self.should_exit = True


def serve(service: Service, *, host: str, port: int, token: str | None, insecure: bool) -> None:
    """Listen until told to stop.

    Raises:
        AddressTaken: it cannot listen there.
        I2LError: the engines cannot be opened, or no longer be used.
    """
    listening = listen(host, port)
    config = uvicorn.Config(
        make_app(service, host=host, token=token, insecure=insecure),
        http=protocol_for(service.limits),
        ws="none",
        lifespan="on",
        log_config=None,
        access_log=False,
        server_header=False,
        proxy_headers=False,
        backlog=service.limits.connections,
        timeout_graceful_shutdown=max(1, round(service.limits.stop_seconds)),
    )
    logging.getLogger("uvicorn.error").setLevel(logging.ERROR)
    server = Server(config, service)
    service.on_end = server.stop
    place = f"[{host}]" if ":" in host else host
    log.info("http://%s:%d/: opening the engines", place, listening.getsockname()[1])
    service.start()
    try:
        asyncio.run(run(server, service, listening))
    finally:
        listening.close()
    failure: I2LError | None = service.worker.failure
    if failure is not None:
        raise failure


async def run(server: Server, service: Service, listening: socket.socket) -> None:
    """Serve, and once told to stop give what was accepted its time."""
    watching = asyncio.ensure_future(announce(server, service))
    await server.serve(sockets=[listening])
    watching.cancel()
    left = (server.stopped_at or time.monotonic()) + service.limits.stop_seconds
    if server.force_exit:
        left = 0.0
    await asyncio.to_thread(service.stop, left)


async def announce(server: Server, service: Service) -> None:
    """Say when the engines are open, and when the service begins to stop: from then on it refuses new work.

    A signal's handler may only set a flag: whoever holds the book's lock could be the thread that it interrupts.
    """
    said_ready = False
    while not server.should_exit:
        if service.health.ready and not said_ready:
            said_ready = True
            log.info("ready: %s (%s)", service.health.backend, service.health.reason)
        await asyncio.sleep(LOOK_SECONDS)
    service.book.stop()
    log.info("stopping: what was accepted has %g s", service.limits.stop_seconds)


def listen(host: str, port: int) -> socket.socket:
    """A socket that listens; raises :class:`AddressTaken`."""
    try:
        family, *_, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)[0]
        listening = socket.socket(family, socket.SOCK_STREAM)
        try:
            listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            listening.bind(address)
        except OSError:
            listening.close()
            raise
    except OSError as error:
        raise AddressTaken(host, port, error.strerror or str(error)) from error
    listening.set_inheritable(False)
    return listening
