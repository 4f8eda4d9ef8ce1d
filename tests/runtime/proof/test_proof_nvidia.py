"""Proofs of the cuda and tensorrt backends, over a played card: what they come to, and what ``auto`` does then."""

import re
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
from played_tensorrt import own_graphs, write_plans
from test_proof import CPU, auto, decider, kept

from conftest import MakeEngines
from i2l.engines.backends import BACKENDS
from i2l.runtime.proof import proving
from i2l.runtime.proof.sentences import record_lines
from played_nvidia import CARD, VARIABLE, Part, find_played

OUTCOMES = {
    "": "",
    "a little off": "",
    "off": r"(siglip2|dinov3|adapter)\.\w+ [\d.e+]+ % off.*\(tolerance [\d.]+ %\)",
    "crashes": r"it crashed \(SIGABRT\)",
    "hangs": r"no answer for 2 s, \d+ s in all: it was ended",
}


@pytest.fixture
def directory(engines: MakeEngines, tmp_path: Path) -> Path:
    copied = Path(shutil.copytree(engines("tiny", "fp32"), tmp_path / "engines"))
    write_plans(copied, own_graphs(copied))
    return copied


@pytest.fixture(params=["cuda", "tensorrt"])
def backend(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """The one card of this machine, beside a CPU that is slow."""
    monkeypatch.setattr(proving.Prover, "cpu_time", lambda _: CPU)
    before = dict(BACKENDS)
    BACKENDS.clear()
    BACKENDS.update({"cpu": before["cpu"], request.param: "played_nvidia"})
    yield str(request.param)
    BACKENDS.clear()
    BACKENDS.update(before)  # in their order


@pytest.mark.parametrize("fault", OUTCOMES)
def test_a_proof_comes_to_what_the_card_does(
    directory: Path, backend: str, monkeypatch: pytest.MonkeyPatch, fault: str
) -> None:
    monkeypatch.setenv(VARIABLE, Part(backend, fault).text())
    deciding = decider(directory, silence_seconds=2 if fault == "hangs" else 60)
    subject = deciding.subject(find_played())
    assert subject
    record = deciding.prove(subject)
    assert re.match(OUTCOMES[fault], record.failure), record.failure
    assert bool(record.best) == (not OUTCOMES[fault]), record.failure
    if record.best:
        assert len(record.best.errors) == 8
        assert (max(record.best.errors.values()) > 0.002) == (fault == "a little off")
        assert record.best.peak_bytes
        assert record.best.budget_bytes
        assert record.best.upload_bytes_per_second
        assert record.best.overlap is not None
        assert record.best.copying_share
        assert record.best.streaming_share
        assert any("ran beside" in line and "of pinned memory's" in line for line in record_lines(record))
        assert kept(directory) == [record]


def test_another_driver_proves_itself_anew(directory: Path, backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(VARIABLE, Part(backend).text())
    assert auto(directory).name == backend
    monkeypatch.setattr(proving, "run_task", None)  # would fail: it is not proven twice
    assert auto(directory).name == backend
    monkeypatch.undo()
    monkeypatch.setattr(proving.Prover, "cpu_time", lambda _: CPU)
    monkeypatch.setenv(VARIABLE, Part(backend, "crashes", driver="2.0").text())
    assert f"{backend}: {CARD} failed its proof: it crashed" in auto(directory).reason
    assert [record.subject.card.driver for record in kept(directory)] == ["2.0"]
