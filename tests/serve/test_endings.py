"""How a service ends, and what is left of its jobs: killed, told to stop, on a full disk, with a card that fails."""

import random
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import httpx
import pytest
from safetensors.numpy import load_file

from conftest import MakeEngines, picture
from i2l.errors import DeviceFailed, DiskFull, OutOfDeviceMemory
from i2l.machine.progress import Report
from i2l.runtime.pipeline import Pipeline
from i2l.serve.http.app import make_app
from i2l.serve.jobbook import ServedJob
from i2l.serve.service import Service
from i2l.serve.settings import ServeLimits, Sharing
from i2l.serve.spool import keep_squares
from served import SLOW, Served, assert_problem, form

KILLS = 20


@pytest.fixture(scope="module")
def directory(engines: MakeEngines) -> Path:
    return engines("tiny", "int8")


# --- killed ------------------------------------------------------------------------------------------------------


def kill_at(served: Served, seconds: float) -> dict[str, str]:
    """Send jobs until the service is killed; the accepted ones, and what the next service says became of them."""
    accepted: list[str] = []

    def send() -> None:
        with httpx.Client(base_url=served.client.base_url, timeout=30) as client:
            for seed in range(1000):
                try:
                    response = client.post("/v1/loras", headers={"Prefer": "respond-async"}, **form(seed % 5))
                except httpx.HTTPError:
                    return
                if response.status_code == 202:
                    accepted.append(response.json()["id"])

    senders = [threading.Thread(target=send) for _ in range(2)]
    for sender in senders:
        sender.start()
    time.sleep(seconds)
    served.process.kill()
    served.process.wait()
    for sender in senders:
        sender.join()
    served.client.close()
    served.start()
    return {job_id: served.job(job_id)["state"] for job_id in accepted}


def assert_whole(jobs: Path) -> None:
    """No half file: every LoRA loads, nothing of a picture and no temporary file is left of jobs that have ended."""
    for path in jobs.glob("*/*"):
        if path.suffix == ".safetensors":
            assert load_file(path)
        assert not path.name.startswith((".", "picture-", "square-")), path


def check_kills(directory: Path, folder: Path, kills: int) -> dict[str, int]:
    generator = random.Random(0)
    found: dict[str, int] = {}
    with Served(directory, folder, "--max-requests", 8) as served:
        for _ in range(kills):
            states = kill_at(served, generator.uniform(0.05, 1.5))
            assert set(states.values()) <= {"done", "lost"}, states
            for state in states.values():
                found[state] = found.get(state, 0) + 1
            assert_whole(served.jobs)
        for state, action in (("done", 200), ("lost", 410)):
            for job_id in [job_id for job_id, now in states.items() if now == state]:
                assert served.client.get(f"/v1/jobs/{job_id}/lora").status_code == action
    return found


def test_after_a_kill_accepted_jobs_are_done_or_lost(directory: Path, tmp_path: Path) -> None:
    assert sum(check_kills(directory, tmp_path, 3).values()) > 0


@pytest.mark.soak
def test_after_twenty_kills_accepted_jobs_are_done_or_lost(directory: Path, tmp_path: Path) -> None:
    found = check_kills(directory, tmp_path, KILLS)
    print(f"{KILLS} kills: {found}")  # noqa: T201 - for docs/service.md
    assert found["done"] > 0
    assert found["lost"] > 0


# --- told to stop ------------------------------------------------------------------------------------------------


def test_sigterm_finishes_what_was_accepted_and_refuses_the_rest(directory: Path, tmp_path: Path) -> None:
    with Served(directory, tmp_path, "--no-cache", "--pass-pictures", 1, code=SLOW) as served:
        answers: list[Any] = []
        waiting = [threading.Thread(target=lambda seed=seed: answers.append(served.post(seed))) for seed in range(3)]
        with httpx.Client(base_url=served.client.base_url) as late, served.held():
            for thread in waiting:
                thread.start()
            begun = served.begin(7)
            served.until(lambda: served.metrics()["i2l_accepted_total"] == 4)
            late.get("/healthz")
            served.process.send_signal(signal.SIGTERM)
            with suppress(httpx.HTTPError):  # it listens no more
                served.until(lambda: late.get("/readyz").status_code == 503)
                assert_problem(late.post("/v1/loras", **form(9)), 503, "the service is stopping")
        for thread in waiting:
            thread.join()
        assert served.process.wait(60) == 0
        assert [answer.status_code for answer in answers] == [200] * 3
        served.client.close()
        served.start()
        assert served.job(begun["id"])["state"] == "done"


def test_what_is_not_done_in_time_is_lost_and_said_to_be(directory: Path, tmp_path: Path) -> None:
    options = ("--no-cache", "--pass-pictures", 1, "--stop-limit", 1)
    with Served(directory, tmp_path, *options, code=SLOW) as served:
        answers: list[httpx.Response] = []
        sync = threading.Thread(target=lambda: answers.append(served.post(9)))
        with served.held():
            begun = [served.begin(seed)["id"] for seed in range(2)]
            sync.start()
            served.until(lambda: served.metrics()["i2l_accepted_total"] == 3)
            assert served.stop() == 0
        sync.join()
        served.client.close()
        served.start()
        assert [served.job(job_id)["state"] for job_id in begun] == ["lost"] * 2
        assert "ended before this job was done" in served.job(begun[0])["problem"]["detail"]
        assert_problem(served.client.get(f"/v1/jobs/{begun[0]}/lora"), 410, "send the pictures again")


# --- a full disk -------------------------------------------------------------------------------------------------


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 24 MiB."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=24m", "none", disk], capture_output=True, check=False)
    if mounted.returncode:
        pytest.skip(f"needs a file system of its own: {mounted.stderr.decode().strip()}")
    yield disk
    subprocess.run(["umount", "-l", disk], check=True)


def test_a_full_disk_is_a_problem_and_passes(directory: Path, small_disk: Path) -> None:
    with Served(directory, small_disk, "--no-cache") as served:
        begun = served.begin(1)
        served.wait(begun["id"])
        (small_disk / "filler").write_bytes(bytes(22 << 20))
        for _ in range(3):
            assert_problem(served.post(1, 2), 507, "no room on the disk", "free some space")
        assert served.client.get("/readyz").status_code == 200
        assert {path.name for path in served.jobs.iterdir()} == {begun["id"], "lock"}
        (small_disk / "filler").unlink()
        assert served.post(1).status_code == 200


# --- inside the worker, with stubs -------------------------------------------------------------------------------


@pytest.fixture
def service(directory: Path, tmp_path: Path) -> Iterator[Callable[..., Service]]:
    """``service(stub, backend) -> Service`` whose first pipeline is changed by ``stub``."""
    made: list[Service] = []

    def make(stub: Callable[[Pipeline], None], backend: str = "auto") -> Service:
        def opened(name: str, report: Report) -> Pipeline:
            pipeline = Pipeline(directory, backend="cpu", threads=1, report=report)
            if name != "cpu":
                stub(pipeline)
            return pipeline

        limits = ServeLimits(request_seconds=60)
        made.append(Service(tmp_path / "jobs", opened, backend=backend, limits=limits, sharing=Sharing()))
        made[-1].start()
        return made[-1]

    yield make
    for each in made:
        each.stop(time.monotonic())


def job_of(service: Service, seed: int) -> ServedJob:
    job = service.book.begin()
    from i2l.runtime.pictures.pixels import square_image

    keep_squares(job.folder, [square_image(picture(64, 64, seed))])
    job.pictures = 1
    service.book.accept(job)
    return job


def ended(service: Service, job: ServedJob) -> ServedJob:
    event = threading.Event()
    service.book.listen(job, event.set)
    assert event.wait(60)
    return job


def fail_in_the_middle(pipeline: Pipeline) -> None:
    """A card that ends after the first encoder of the second pass."""
    passes = 0
    real = pipeline._passes._encode

    def encode(family: Any, *arguments: Any) -> Any:
        nonlocal passes
        passes += family == "dinov3"
        if passes == 2:
            raise DeviceFailed("GPU 0", "an illegal memory access was encountered")
        return real(family, *arguments)

    pipeline._passes._encode = encode  # type: ignore[method-assign, assignment]
    pipeline._open.name = "cuda"


async def ask(service: Service, address: str) -> httpx.Response:
    app = make_app(service, host="127.0.0.1", token=None, insecure=False)
    async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://localhost") as client:
        return await client.get(address)


def test_the_cpu_takes_over_from_a_card_that_fails_and_it_is_said(service: Callable[..., Service]) -> None:
    import asyncio

    served = service(fail_in_the_middle)
    assert ended(served, job_of(served, 1)).state == "done"
    assert served.health.backend == "cuda"
    second = ended(served, job_of(served, 2))
    assert (second.state, second.error) == ("done", None)
    ready = asyncio.run(ask(served, "/readyz")).json()
    assert (ready["backend"], ready["fallen_back"]) == ("cpu", True)
    assert "illegal memory access" in ready["reason"]
    text = asyncio.run(ask(served, "/metrics")).text
    assert "i2l_fallen_back 1.0" in text
    assert 'i2l_ready{backend="cpu"} 1.0' in text


def test_a_named_card_that_fails_ends_the_service(service: Callable[..., Service]) -> None:
    import asyncio

    served = service(fail_in_the_middle, "cuda")
    ended(served, job_of(served, 1))
    second = ended(served, job_of(served, 2))
    assert second.state == "failed"
    assert isinstance(second.error, DeviceFailed)
    served.worker.join(10)
    assert isinstance(served.worker.failure, DeviceFailed)
    assert_problem(asyncio.run(ask(served, "/readyz")), 503, "illegal memory access")


@pytest.mark.parametrize(
    ("error", "shown"),
    [
        (DiskFull(Path("/x"), None, 0), "no room on the disk"),
        (OutOfDeviceMemory("GPU 0", 1, 0), "has no room"),
        (ZeroDivisionError("bug"), "something went wrong that should not"),
    ],
)
def test_a_pass_that_fails_is_told_to_its_requests_alone(
    service: Callable[..., Service], error: Exception, shown: str
) -> None:
    def stub(pipeline: Pipeline) -> None:
        real, calls = pipeline.factors, iter([error])

        def factors(embeddings: Any) -> Any:
            for each in calls:
                raise each
            return real(embeddings)

        pipeline.factors = factors  # type: ignore[method-assign]

    served = service(stub)
    first = ended(served, job_of(served, 1))
    assert first.state == "failed"
    assert shown in str(first.error)
    assert ended(served, job_of(served, 2)).state == "done"


def test_a_dropped_pass_leaves_the_pipeline_as_it_was(service: Callable[..., Service]) -> None:
    """Cancelled between any two steps; the next pass is right."""
    steps: list[int] = []

    def stub(pipeline: Pipeline) -> None:
        real = pipeline._passes._report

        def report(stage: str, done: int, total: int) -> None:
            steps.append(done)
            if len(steps) in cancel_at:
                for job in served.book.open_jobs():
                    served.book.cancel(job)
            real(stage, done, total)

        pipeline._passes._report = report

    cancel_at: set[int] = set()
    served = service(stub)
    whole = ended(served, job_of(served, 1))
    wanted = served.spool.lora(whole.id, "lora").read_bytes()
    for step in range(2, len(steps), max(1, len(steps) // 6)):
        cancel_at = {len(steps) + step}
        assert ended(served, job_of(served, 1)).state == "cancelled"
        again = ended(served, job_of(served, 1))
        assert served.spool.lora(again.id, "lora").read_bytes() == wanted
