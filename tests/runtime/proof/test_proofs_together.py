"""Two proofs at once: the second waits, and takes what the first found."""

import subprocess
from pathlib import Path
from threading import Event, Thread

import pytest
from test_proof import card, directory, play, processes, prove

from i2l.engines.base import Limits
from i2l.machine.locks import exclusive
from i2l.runtime.proof import proving
from i2l.runtime.proof.records import LOCK, Record

__all__ = ["card", "directory"]


def test_the_second_of_two_waits_and_takes_the_firsts_record(directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    started: list[subprocess.Popen[str]] = processes(monkeypatch)
    records: list[Record] = []
    other = Thread(target=lambda: records.append(prove(directory)))
    other.start()
    records.append(prove(directory))
    other.join()
    assert records[0] == records[1]
    assert len(started) == 1
    prove(directory)  # whoever asks again, later, gets a new one
    assert len(started) == 2


def test_who_waits_for_a_proof_can_be_interrupted(directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(proving, "run_task", None)
    said: list[str] = []
    begun, done = Event(), Event()

    def report(stage: str, done: int, total: int) -> None:  # noqa: ARG001
        said.append(stage)
        raise KeyboardInterrupt

    def held() -> None:
        with exclusive(directory.parent / "cache" / LOCK, waiting=lambda: None):
            begun.set()
            done.wait(60)

    (directory.parent / "cache").mkdir()
    other = Thread(target=held)
    other.start()
    assert begun.wait(60)
    with pytest.raises(KeyboardInterrupt):
        prove(directory, Limits(4, report=report))
    done.set()
    other.join()
    assert said == ["waiting for another proof"]


def test_a_proof_without_a_place_for_its_lock_is_made_all_the_same(
    directory: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    (directory.parent / "cache").write_text("a file")
    play(monkeypatch)
    assert prove(directory).best
    assert "another proof at the same time would spoil its times" in caplog.text
