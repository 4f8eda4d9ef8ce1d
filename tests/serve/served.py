"""A service in a process of its own, started by a test, and what clients send it."""

import io
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import httpx
import psutil

from conftest import picture

START_SECONDS = 60
PROBLEM = "application/problem+json"


def png(seed: int = 0, side: int = 48) -> bytes:
    """A small picture."""
    data = io.BytesIO()
    picture(side, side, seed).save(data, "PNG")
    return data.getvalue()


def form(*seeds: int, **fields: Any) -> dict[str, Any]:
    """What httpx sends for these pictures and fields."""
    return {"files": [("pictures", (f"{seed}.png", png(seed), "image/png")) for seed in seeds], "data": fields}


class Served:
    """``i2l serve`` on a free port; use it as a context manager.

    Args:
        engines: opened.
        folder: for its jobs and its log.
        options: of the command.
        code: run in place of the command, with the same arguments.
    """

    def __init__(self, engines: Path, folder: Path, *options: object, code: str = "") -> None:
        self.jobs = folder / "jobs"
        self.log = folder / "serve.log"
        begin = ["-c", code] if code else ["-m", "i2l.cli"]
        self.command = [
            sys.executable, *begin, "serve", "--engines", str(engines), "--port", "0", "--jobs-dir", str(self.jobs),
            "--threads", "1", *map(str, options),
        ]  # fmt: skip

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.client.close()
        self.process.kill()
        self.process.wait()

    def start(self, *, ready: bool = True) -> None:
        """Start it, again if it has ended, and wait until it answers."""
        with self.log.open("w") as log:
            self.process = subprocess.Popen(self.command, stdout=log, stderr=log)
        deadline = time.monotonic() + START_SECONDS
        while not (found := re.search(r"http://127\.0\.0\.1:(\d+)/", self.log.read_text())):
            assert self.process.poll() is None, self.log.read_text()
            assert time.monotonic() < deadline
            time.sleep(0.05)
        self.port = int(found[1])
        self.client = httpx.Client(base_url=f"http://127.0.0.1:{self.port}", timeout=60)
        while ready and not self.is_ready():
            assert self.process.poll() is None, self.log.read_text()
            assert time.monotonic() < deadline
            time.sleep(0.05)

    def is_ready(self) -> bool:
        try:
            return self.client.get("/readyz").status_code == 200
        except httpx.ConnectError:
            return False

    def stop(self, sig: signal.Signals = signal.SIGTERM) -> int:
        """Tell it to stop and wait; the exit code."""
        self.process.send_signal(sig)
        return self.process.wait(60)

    def post(self, *seeds: int, headers: Mapping[str, str] = {}, **fields: Any) -> httpx.Response:
        return self.client.post("/v1/loras", headers=headers, **form(*seeds, **fields))

    def begin(self, *seeds: int, **fields: Any) -> dict[str, Any]:
        """An accepted job's report."""
        response = self.post(*seeds, headers={"Prefer": "respond-async"}, **fields)
        assert response.status_code == 202, response.text
        return dict(response.json())

    def job(self, job_id: str) -> dict[str, Any]:
        response = self.client.get(f"/v1/jobs/{job_id}")
        assert response.status_code == 200, response.text
        return dict(response.json())

    def abandon(self, *seeds: int) -> None:
        """A client that hangs up once its request is accepted."""
        request = self.client.build_request("POST", "/v1/loras", **form(*seeds))
        lines = [b"POST /v1/loras HTTP/1.1", *(b"%b: %b" % header for header in request.headers.raw), b"", b""]
        accepted = self.metrics()["i2l_accepted_total"] + 1
        with socket.create_connection(("127.0.0.1", self.port)) as connection:
            connection.sendall(b"\r\n".join(lines) + request.read())
            self.until(lambda: self.metrics()["i2l_accepted_total"] == accepted)

    @contextmanager
    def held(self) -> Iterator[None]:
        """Meanwhile no step ends, if it runs :data:`SLOW`."""
        hold = self.jobs.with_name("hold")
        hold.touch()
        yield
        hold.unlink()

    def until(self, holds: Callable[[], bool]) -> None:
        """Wait until something is so."""
        deadline = time.monotonic() + 60
        while not holds():
            assert time.monotonic() < deadline, (self.log.read_text(), self.metrics())
            time.sleep(0.02)

    def wait(self, job_id: str, states: Sequence[str] = ("done", "failed", "cancelled", "lost")) -> dict[str, Any]:
        """A job's report once it is in one of these states."""
        self.until(lambda: self.job(job_id)["state"] in states)
        return self.job(job_id)

    def metrics(self, token: str = "") -> dict[str, float]:
        """``name{labels} -> value``."""
        headers = {"Authorization": f"Bearer {token}"} if token else {}
        text = self.client.get("/metrics", headers=headers).text
        pairs = (line.rsplit(" ", 1) for line in text.splitlines() if not line.startswith("#"))
        return {name: float(value) for name, value in pairs}

    def outcomes(self) -> dict[str, int]:
        """How many requests ended how."""
        pattern = re.compile(r'i2l_requests_total\{outcome="(\w+)"\}')
        return {found[1]: int(value) for name, value in self.metrics().items() if (found := pattern.match(name))}

    @property
    def memory(self) -> psutil.Process:
        return psutil.Process(self.process.pid)


def assert_problem(response: httpx.Response, status: int, *fragments: str) -> None:
    """A problem document with these words in its sentence."""
    assert response.status_code == status, response.text
    assert response.headers["content-type"] == PROBLEM
    problem = response.json()
    assert problem["status"] == status
    assert {"type", "title", "status", "detail"} <= problem.keys()
    assert [fragment for fragment in fragments if fragment not in problem["detail"]] == []


SLOW = """
import sys, time
from pathlib import Path
from i2l.cli import main
from i2l.runtime.passes import Passes
real, hold = Passes._stream, Path(sys.argv[sys.argv.index("--jobs-dir") + 1]).with_name("hold")
def slow(self, *arguments):
    for item in real(self, *arguments):
        time.sleep(0.05)
        while hold.exists():
            time.sleep(0.01)
        yield item
Passes._stream = slow
main(sys.argv[1:])
"""
"""The command with steps that take their time, and wait during :meth:`Served.held`."""
