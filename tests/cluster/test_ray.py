"""``i2l batch --ray`` on a real Ray: the files of one process, whoever dies, and sentences for what is missing."""

import json
import os
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from conftest import MakeEngines, picture
from i2l.cluster.batch_worker import BatchWorker, Made, Opened, WorkerSettings
from i2l.errors import WorkersLost
from i2l.runtime.jobs import BatchProgress, BatchResult, plan_jobs
from i2l.runtime.making import Form, run_jobs
from i2l.runtime.opening import PipelineOptions
from i2l.runtime.pipeline import open_engines

pytestmark = pytest.mark.ray
PICTURES = 10


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The address of a Ray with room for two workers, and with two cards that are only said to be there."""
    folder = Path("/tmp", f"i2l-ray-{secrets.token_hex(4)}")  # a socket's path has 107 characters at most
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RAY_AUTH_TOKEN", secrets.token_hex(32))
        patch.setenv("RAY_AUTH_MODE", "token")
        log = tmp_path_factory.mktemp("ray") / "log"
        command = [
            Path(sys.executable).with_name("ray"), "start", "--head", "--block", "--port", str(port), "--num-cpus", "2",
            "--num-gpus", "2", "--include-dashboard", "false", "--disable-usage-stats", "--temp-dir", folder,
        ]  # fmt: skip
        with log.open("w") as output:
            head = subprocess.Popen([str(part) for part in command], stdout=output, stderr=output)
        deadline = time.monotonic() + 60
        while "Ray runtime started" not in log.read_text():
            assert head.poll() is None, log.read_text()
            assert time.monotonic() < deadline
            time.sleep(0.1)
        yield f"127.0.0.1:{port}"
        head.terminate()
        head.wait(30)
        shutil.rmtree(folder)


@pytest.fixture(scope="module")
def directory(engines: MakeEngines) -> Path:
    return engines("tiny", "int8")


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("pictures")
    for index in range(PICTURES):
        picture(80, 60 + index, index).save(folder / f"{index}.png")
    return folder


@pytest.fixture(scope="module")
def wanted(directory: Path, pictures: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """What one process writes."""
    output = tmp_path_factory.mktemp("one")
    with open_engines(directory, backend="cpu", threads=1) as pipeline:
        assert run_jobs(pipeline, plan_jobs(pictures, output, "image").jobs).failed == []
    return files(output)


def files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def command(pictures: Path, directory: Path, output: Path, *more: object) -> list[str]:
    arguments = ["batch", pictures, "--engines", directory, "--output-dir", output, "--no-cache", *more]
    return [sys.executable, "-m", "i2l.cli", *map(str, arguments)]


def batch(*arguments: Any) -> subprocess.CompletedProcess[str]:
    own = {name: value for name, value in os.environ.items() if name != "RAY_AUTH_MODE"}  # the command's to find out
    return subprocess.run(command(*arguments), env=own, capture_output=True, text=True, check=False, timeout=120)


@pytest.fixture
def on_ray(
    cluster: str, directory: Path, pictures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Callable[..., BatchResult]:
    """``on_ray(worker) -> BatchResult`` of all pictures, by workers of a class of the test's own."""
    from ray import cloudpickle

    from i2l.cluster import crew, driving

    cloudpickle.register_pickle_by_value(sys.modules[__name__])

    def run(worker: type[BatchWorker]) -> BatchResult:
        monkeypatch.setattr(crew, "BatchWorker", worker)
        options = PipelineOptions(
            backend="cpu", threads=1, ram_budget_bytes=None, vram_budget_bytes=None, vram_margin_bytes=0, prove=False
        )
        settings = WorkerSettings(directory, options, use_cache=False)
        jobs = plan_jobs(pictures, tmp_path, "image").jobs
        result = BatchResult()
        driving.run_on_ray(cluster, settings, jobs, Form(), BatchProgress(), result)
        return result

    return run


# --- as one process ----------------------------------------------------------------------------------------------


def test_two_workers_write_what_one_process_writes(
    cluster: str, directory: Path, pictures: Path, wanted: dict[str, bytes], tmp_path: Path
) -> None:
    """With a picture that nobody can read, which fails alone; started again, all is finished."""
    folder = shutil.copytree(pictures, tmp_path / "in")
    (folder / "x.png").write_bytes(b"no picture")
    options = ("--threads", 1, "--backend", "cpu", "--json", "--ray", cluster)
    ran = batch(folder, directory, tmp_path / "out", *options)
    assert ran.returncode == 1, ran.stderr
    facts = json.loads(ran.stdout)
    assert files(tmp_path / "out") == wanted
    assert [failure["output"] for failure in facts["failed"]] == [str(tmp_path / "out" / "x.safetensors")]
    assert [share["worker"] for share in facts["workers"]] == [1, 2]
    assert sum(share["loras"] for share in facts["workers"]) == PICTURES
    assert "2 workers on 1 machine: one worker for each CPU" in ran.stderr
    again = json.loads(batch(folder, directory, tmp_path / "out", *options).stdout)
    assert (len(again["finished_before"]), again["written"]) == (PICTURES, [])


def test_each_card_gets_a_worker(
    cluster: str, directory: Path, pictures: Path, wanted: dict[str, bytes], tmp_path: Path
) -> None:
    """Two cards as Ray counts them; behind them is the CPU, which ``auto`` falls back on and says so."""
    ran = batch(pictures, directory, tmp_path, "--threads", 1, "--ray", cluster)
    assert ran.returncode == 0, ran.stderr
    assert "2 workers on 1 machine: one worker for each GPU" in ran.stderr
    ready = sorted(line.split(" is ready: ")[1] for line in ran.stderr.splitlines() if " is ready: " in line)
    assert [line.split(" (")[0] for line in ready] == ["cpu, GPU 0", "cpu, GPU 1"]
    assert files(tmp_path) == wanted


# --- workers that die --------------------------------------------------------------------------------------------


class Slow(BatchWorker):
    """Says that it is at work before it is."""

    def make(self, orders: Any) -> Made:
        (self._settings.engines.parent / "at-work").write_text(str(os.getpid()))
        time.sleep(1)
        return super().make(orders)


def test_a_killed_worker_loses_nothing(
    on_ray: Callable[..., BatchResult],
    directory: Path,
    wanted: dict[str, bytes],
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    note = directory.parent / "at-work"

    def kill() -> None:
        deadline = time.monotonic() + 60
        while not (note.exists() and note.read_text()) and time.monotonic() < deadline:
            time.sleep(0.05)
        psutil.Process(int(note.read_text())).kill()

    killer = threading.Thread(target=kill)
    killer.start()
    result = on_ray(Slow)
    killer.join()
    assert result.failed == []
    assert files(tmp_path) == wanted
    assert sorted(path.name for path in result.written) == sorted(wanted)  # each once
    assert "died: its pictures are done again" in caplog.text


class Poisoned(BatchWorker):
    def make(self, orders: Any) -> Made:
        if any(order.name == "3.safetensors" for order in orders):
            psutil.Process().kill()
        return super().make(orders)


def test_a_picture_that_kills_workers_fails_alone(
    on_ray: Callable[..., BatchResult], wanted: dict[str, bytes], tmp_path: Path
) -> None:
    result = on_ray(Poisoned)
    ((output, error),) = result.failed
    assert output.name == "3.safetensors"
    assert "2 workers died while they were at 3.png alone" in error
    assert files(tmp_path) == {name: data for name, data in wanted.items() if name != "3.safetensors"}


class Dying(BatchWorker):
    def open(self) -> Opened:
        psutil.Process().kill()
        raise AssertionError


def test_workers_that_die_at_once_are_not_started_for_ever(on_ray: Callable[..., BatchResult]) -> None:
    with pytest.raises(WorkersLost, match="it died 3 times in a row"):
        on_ray(Dying)


# --- what is missing ---------------------------------------------------------------------------------------------


class Elsewhere(BatchWorker):
    """The first of two finds no engines."""

    def open(self) -> Opened:
        with (self._settings.engines.parent / "opened").open("a") as opened:
            first = not opened.tell()
            opened.write("x")
        if first:
            object.__setattr__(self._settings, "engines", Path("/srv/engines"))
        return super().open()


def test_a_worker_without_engines_says_so_and_the_other_does_its_work(
    on_ray: Callable[..., BatchResult], wanted: dict[str, bytes], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    assert on_ray(Elsewhere).failed == []
    assert files(tmp_path) == wanted
    (said,) = [record.message for record in caplog.records if "is left out" in record.message]
    assert "/srv/engines has no manifest.json" in said


def test_engines_that_nobody_has_end_it_with_a_sentence(cluster: str, pictures: Path, tmp_path: Path) -> None:
    ran = batch(pictures, tmp_path / "none", tmp_path / "out", "--threads", 1, "--ray", cluster)
    assert ran.returncode == 1
    assert "error: no worker is left (" in ran.stderr
    assert ran.stderr.splitlines()[-1].count("has no manifest.json") == 1
    assert list((tmp_path / "out").iterdir()) == []


@pytest.mark.parametrize(
    ("address", "fragment"),
    [("127.0.0.1:1", "Connection refused"), ("somewhere", "is HOST:PORT"), ("ray://127.0.0.1:1", "is HOST:PORT")],
)
def test_a_ray_that_is_not_there(pictures: Path, directory: Path, tmp_path: Path, address: str, fragment: str) -> None:
    ran = batch(pictures, directory, tmp_path, "--ray", address)
    assert ran.returncode == 1
    assert ran.stderr.splitlines()[-1].startswith(f"error: Ray at {address} cannot be reached (")
    assert fragment in ran.stderr


# --- started here, and stopped -----------------------------------------------------------------------------------


def test_ctrl_c_ends_the_ray_that_was_started_and_leaves_whole_files(
    directory: Path, pictures: Path, wanted: dict[str, bytes], tmp_path: Path
) -> None:
    arguments = command(pictures, directory, tmp_path, "--threads", 1, "--ray")
    run = subprocess.Popen(arguments, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    deadline = time.monotonic() + 90
    while not list(tmp_path.glob("*.safetensors")):
        assert run.poll() is None, run.communicate()[0]
        assert time.monotonic() < deadline
        time.sleep(0.02)
    below = psutil.Process(run.pid).children(recursive=True)
    assert any("raylet" in process.name() for process in below)
    run.send_signal(signal.SIGINT)
    output = run.communicate(timeout=60)[0]
    assert run.returncode == 130, output
    assert "Traceback" not in output
    found = files(tmp_path)
    assert all(found[name] == wanted[name] for name in found)
    assert psutil.wait_procs(below, timeout=30)[1] == []
