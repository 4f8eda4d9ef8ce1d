"""Strangers: odd bodies and headers, slow, vanishing and hostile clients. Each a problem document, never a 500.

The long forms, marked ``soak``, are what docs/service.md has the figures of.
"""

import random
import socket
import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import anyio
import httpx
import pytest
from starlette.responses import Response
from starlette.types import Message, Receive, Scope, Send

from conftest import MakeEngines
from i2l.serve.http.guard import ABORT, Guard
from served import PROBLEM, Served, form, png

ODD_BODIES = 500
CLIENTS = 200
MAX_GROWTH_BYTES = 64 << 20
"""Of the resident memory while strangers do their worst; 500 bodies took 3 MiB here."""
WORDS = (b"\r\n", b"--b", b"--", b"\0", b"pictures", b'"', b";", b"=", b"filename", b"\xff\xfe", b"%00", b"../", b"\n")


IMPATIENT = """
import sys
from i2l.cli import main
from i2l.serve import settings
class Impatient(settings.ServeLimits):
    def __init__(self, **options):
        super().__init__(**options)
        object.__setattr__(self, "header_seconds", 1.5)
settings.ServeLimits = Impatient
main(sys.argv[1:])
"""


@pytest.fixture(scope="module")
def served(engines: MakeEngines, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    options = ("--max-body", "1MiB", "--max-requests", 16)
    with Served(engines("tiny", "int8"), tmp_path_factory.mktemp("strangers"), *options, code=IMPATIENT) as started:
        yield started


def talk(served: Served, data: bytes, seconds: float = 20.0, *, hang_up: bool = False) -> bytes:
    """Send bytes and read until the other side closes."""
    answer = b""
    with socket.create_connection(("127.0.0.1", served.port), timeout=seconds) as connection, suppress(OSError):
        with suppress(OSError):  # it has answered and closed already
            connection.sendall(data)
        while not hang_up and (piece := connection.recv(1 << 16)):
            answer += piece
    return answer


def head(body: bytes, *lines: bytes, method: bytes = b"POST", path: bytes = b"/v1/loras") -> bytes:
    begin = [method + b" " + path + b" HTTP/1.1", b"Host: 127.0.0.1", b"Connection: close"]
    return b"\r\n".join([*begin, b"Content-Length: %d" % len(body), *lines, b"", b""]) + body


def good_body() -> bytes:
    part = b'--b\r\nContent-Disposition: form-data; name="pictures"; filename="a.png"\r\n\r\n' + png(1, 24) + b"\r\n"
    return part + b'--b\r\nContent-Disposition: form-data; name="rank"\r\n\r\n4\r\n--b--\r\n'


def odd_request(generator: random.Random) -> bytes:
    """A request that was good once."""
    body = bytearray(good_body())
    for _ in range(generator.randint(0, 4)):
        at = generator.randrange(len(body))
        match generator.randrange(4):
            case 0:
                body[at : at + generator.randint(0, 60)] = b""
            case 1:
                body[at:at] = generator.choice(WORDS) * generator.choice([1, 1, 1, 400])
            case 2:
                body[at] = generator.randrange(256)
            case _:
                body += body[at:]
    kind = b"multipart/form-data; boundary=b"
    kinds = (b"multipart/form-data", b"multipart/form-data; boundary=", b"application/json", b"text/html; \xff", b"")
    if generator.random() < 0.2:
        kind = generator.choice([*kinds, b"multipart/form-data; boundary=" + b"b" * 99])
    more = generator.choice(
        [b"X: y", b"X: y", b"X: " + b"y" * 70_000, b"Prefer: respond-async", b"Prefer: ;;;,=,", b"Expect: 100-continue",
         b"Authorization: Bearer \xff", b"Transfer-Encoding: chunked", b"Transfer-Encoding: identity",
         b"Range: bytes=9-", b"Content-Length: 7", b"Origin: https://evil.example",
         b"Upgrade: websocket\r\nConnection: upgrade", b"\x01: x", b"X"]
    )  # fmt: skip
    path = generator.choice([b"/v1/loras"] * 8 + [b"/v1/loras/../../etc/passwd", b"/v1/jobs/%00", b"//", b"*", b"\xff"])
    method = generator.choice([b"POST"] * 9 + [b"GET", b"PUT", b"DELETE", b"OPTIONS", b"TRACE", b"POST\0"])
    return head(bytes(body), b"Content-Type: " + kind, more, method=method, path=path)


def check_odd(served: Served, count: int) -> Counter[int]:
    """Send odd requests; the answers by status."""
    generator = random.Random(count)
    assert served.post(1, 2, 3, 4).status_code == 200  # what a pass needs is there from now on
    before = served.memory.memory_info().rss
    found: Counter[int] = Counter()
    for _ in range(count):
        request = odd_request(generator)
        answer = talk(served, request)
        statuses = [int(part[:3]) for part in answer.split(b"HTTP/1.1 ")[1:] if part[:3].isdigit()]
        final = [status for status in statuses if status >= 200]
        assert final, (request[:300], answer[:300])
        for status in final:
            assert status < 500 or status == 503, (request[:3000], answer)
        if final[0] >= 400:
            assert PROBLEM.encode() in answer, (request[:300], answer)
        found[final[0]] += 1
    growth = served.memory.memory_info().rss - before
    assert growth < MAX_GROWTH_BYTES
    assert served.post(1).status_code == 200
    print(f"{count} odd requests: {dict(found)}, {growth / (1 << 20):.1f} MiB more resident")  # noqa: T201
    return found


def test_odd_requests_are_explained(served: Served) -> None:
    found = check_odd(served, 80)
    assert found[422]
    assert found[400]


@pytest.mark.soak
def test_five_hundred_odd_requests_are_explained(served: Served) -> None:
    found = check_odd(served, ODD_BODIES)
    assert {400, 403, 404, 405, 415, 422} <= found.keys()


def test_malformed_http_is_explained(served: Served) -> None:
    for data in (
        b"hello\r\n\r\n",
        b"GET / HTTP/9.9\r\n\r\n",
        b"\x16\x03\x01\x02\0",
        b"GET /\r\n\r\n",
        b"GET / HTTP/1.1\r\n\r\n",
    ):
        answer = talk(served, data)
        assert b" 400 " in answer.split(b"\r\n")[0] or b" 403 " in answer.split(b"\r\n")[0], (data, answer)
        assert PROBLEM.encode() in answer


def test_half_a_body_leaves_nothing(served: Served) -> None:
    """The client hangs up in the middle of a picture."""
    body = good_body()
    request = head(body, b"Content-Type: multipart/form-data; boundary=b")
    before = served.outcomes().get("vanished", 0)
    talk(served, request[:-200], hang_up=True)
    served.until(lambda: served.outcomes().get("vanished", 0) > before)
    assert [path.name for path in served.jobs.iterdir() if path.is_dir() and not (path / "job.json").exists()] == []


def test_slow_clients_are_cut_and_others_served_meanwhile(engines: MakeEngines, tmp_path: Path) -> None:
    """Slowly a head, slowly a body, a body that goes on after its answer; 20 of each."""
    with Served(engines("tiny", "int8"), tmp_path, "--max-requests", 64, code=IMPATIENT) as served:
        assert served.post(1).status_code == 200  # known from now on
        base = served.memory.num_fds()
        connections = []
        body = good_body()
        whole = head(body, b"Content-Type: multipart/form-data; boundary=b")
        endless = head(body, b"Content-Type: text/plain").replace(b"Length: %d" % len(body), b"Length: 9999999")
        for begin in (b"POST /v1/lo", whole[:-200], endless):
            for _ in range(20):
                connection = socket.create_connection(("127.0.0.1", served.port))
                connection.setblocking(False)
                with suppress(BlockingIOError):
                    connection.send(begin)
                connections.append(connection)
        served.until(lambda: served.memory.num_fds() >= base + 40)  # so they were let in, and are cut below

        def cut() -> bool:
            assert served.post(1).status_code == 200
            for connection in connections:
                with suppress(OSError):
                    connection.send(b"x")
            return served.memory.num_fds() <= base + 5

        served.until(cut)
        served.until(lambda: [path.name for path in served.jobs.iterdir()] == ["lock"])  # removed after the last answer
        for connection in connections:
            connection.close()


def test_an_answer_that_is_not_taken_ends_the_connection() -> None:
    """The client reads nothing, so a piece of the answer is never sent."""
    aborted: list[bool] = []

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        await Response(b"x")(scope, receive, send)

    async def stuck(message: Message) -> None:
        if message["type"] == "http.response.body":
            await anyio.sleep_forever()

    async def nothing() -> Message:
        return {"type": "http.disconnect"}

    guard = Guard(app, token=None, loopback_names_only=False, send_seconds=0.05)
    scope = {"type": "http", "path": "/", "method": "GET", "headers": [], ABORT: lambda: aborted.append(True)}
    anyio.run(guard, scope, nothing, stuck)
    assert aborted == [True]


# --- many at once ------------------------------------------------------------------------------------------------


def crowd(served: Served, clients: int) -> Counter[str]:
    """Clients at once: good ones, ones that hang up, broken ones, hostile ones. What the good and broken were told."""
    told: Counter[str] = Counter()
    lock = threading.Lock()

    def one(number: int) -> None:
        try:
            with httpx.Client(base_url=f"http://127.0.0.1:{served.port}", timeout=120) as client:
                match number % 10:
                    case 0:
                        what = f"broken {client.post('/v1/loras', content=bytes(2000)).status_code}"
                    case 1:
                        request = head(good_body(), b"Content-Type: multipart/form-data; boundary=b")
                        with socket.create_connection(("127.0.0.1", served.port)) as connection:
                            connection.sendall(request[: len(request) - (number % 3) * 100])
                            time.sleep(0.01 * (number % 20))
                        what = "hung up"
                    case 2:
                        odd = odd_request(random.Random(number))
                        what = f"odd {'answered' if talk(served, odd, 120) else 'unanswered'}"
                    case _:
                        answer = client.post("/v1/loras", **form(number % 4))
                        what = f"good {answer.status_code}"
                        if answer.status_code == 429:
                            assert int(answer.headers["retry-after"]) > 0
        except (httpx.HTTPError, OSError) as error:
            what = f"error {type(error).__name__}"
        with lock:
            told[what] += 1

    threads = [threading.Thread(target=one, args=(number,)) for number in range(clients)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return told


def check_crowd(served: Served, clients: int) -> None:
    """Every client is told something, every accepted request has ended once."""
    told = crowd(served, clients)
    assert sum(told.values()) == clients
    assert not [what for what in told if what.startswith(("error", "odd unanswered", "good 5", "broken 5"))], told
    assert told["good 200"] > 0

    def all_ended() -> bool:  # an end is counted a moment after the request is open no more
        found = served.metrics()
        ends = (found.get(f'i2l_requests_total{{outcome="{name}"}}', 0) for name in ("done", "failed", "cancelled"))
        return not found["i2l_open_requests"] and sum(ends) == found["i2l_accepted_total"]

    served.until(all_ended)
    outcomes = served.outcomes()
    print(f"{clients} clients at once: {dict(told)}; outcomes: {outcomes}")  # noqa: T201
    folders = [path for path in served.jobs.iterdir() if path.is_dir()]
    assert [path for path in folders if not (path / "job.json").exists()] == []


def test_a_crowd_is_served_or_told_why_not(engines: MakeEngines, tmp_path: Path) -> None:
    with Served(engines("tiny", "int8"), tmp_path, "--max-requests", 12) as served:
        check_crowd(served, 40)


@pytest.mark.soak
def test_two_hundred_at_once(engines: MakeEngines, tmp_path: Path) -> None:
    with Served(engines("tiny", "int8"), tmp_path, "--max-requests", 256) as served:
        check_crowd(served, CLIENTS)
