"""A card that is played, right and wrong in every way, through the real process of a proof."""

import errno
import json
import logging
import os
import re
import shutil
import subprocess
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner

from conftest import MakeEngines, picture
from i2l.cli import main
from i2l.engines.backends import BACKENDS
from i2l.engines.base import Limits, Offer
from i2l.engines.directory.manifest import PROOFS, read_manifest
from i2l.machine import files
from i2l.runtime.opening import OpenEngines
from i2l.runtime.pipeline import Pipeline
from i2l.runtime.proof import child, proving, records
from i2l.runtime.proof.child import TimeLimits
from i2l.runtime.proof.choice import Chosen
from i2l.runtime.proof.deciding import Decider
from i2l.runtime.proof.judging import FormOutcome
from i2l.runtime.proof.records import Record
from i2l.runtime.proof.sentences import verdict
from played_card import NAME, VARIABLE, Part, find_played, open_played

CPU = FormOutcome(None, ms_per_image=1e6)
"""Slower than anything that is played."""
REAL_CPU_TIME = proving.Prover.cpu_time
FORMS = ("safe", "fast")
FAULTS = {
    "off": r"dinov3\.block [\d.e+]+ % off \(tolerance 0\.1 %\)",
    "nan": r"siglip2\.head gives no number",
    "batches": r"in a batch of 4: another result, [\d.e-]+ % apart",
    "restless": r"a second time: another result, [\d.e-]+ % apart",
    "stale": r"with the smallest slots: another result",
    "greedy": r"it took 1024\.00 GiB of the card, 1\.00 GiB were allowed",
    "crashes": r"it crashed \(SIGABRT\): cannot load /.*/driver\.so",
    "fails": r"played card: lost",
    "raises": r"it ended with exit code 1: RuntimeError: what no room explains",
}


@pytest.fixture
def directory(engines: MakeEngines, tmp_path: Path) -> Path:
    return Path(shutil.copytree(engines("tiny", "fp32"), tmp_path / "engines"))


@pytest.fixture(autouse=True)
def card(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The one card of this machine, beside a CPU that is slow."""
    monkeypatch.setattr(proving.Prover, "cpu_time", lambda _: CPU)
    before = dict(BACKENDS)
    BACKENDS.clear()
    BACKENDS.update({"cpu": before["cpu"], NAME: "played_card"})
    yield
    BACKENDS.clear()
    BACKENDS.update(before)  # in their order


def play(monkeypatch: pytest.MonkeyPatch, **part: Any) -> None:
    monkeypatch.setenv(VARIABLE, Part(**part).text())


def decider(directory: Path, limits: Limits | None = None, **seconds: float) -> Decider:
    limits = limits or Limits(4, threads=1)
    return Decider(directory, read_manifest(directory), limits, directory.parent / "cache", TimeLimits(**seconds))


def prove(directory: Path, limits: Limits | None = None, **seconds: float) -> Record:
    deciding = decider(directory, limits, **seconds)
    subject = deciding.subject(find_played())
    assert subject
    return deciding.prove(subject)


def auto(directory: Path) -> Chosen:
    return decider(directory).decide("auto", prove=True)


def kept(directory: Path) -> list[Record]:
    return records.records_from_json((directory / PROOFS).read_text(encoding="utf-8"))


def processes(monkeypatch: pytest.MonkeyPatch) -> list[subprocess.Popen[str]]:
    """What is started from now on."""
    started: list[subprocess.Popen[str]] = []
    real = subprocess.Popen

    def start(*arguments: Any, **options: Any) -> subprocess.Popen[str]:
        started.append(real(*arguments, **options))
        return started[-1]

    monkeypatch.setattr(subprocess, "Popen", start)
    return started


def test_a_card_that_is_right_is_taken_and_proven_once(
    directory: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    said: list[tuple[str, int, int]] = []
    with Pipeline(directory, backend="cpu", threads=1) as pipeline:
        wanted = pipeline.lora_from_images([picture(90, 70)])
    with caplog.at_level(logging.INFO, "i2l"), Pipeline(directory, report=lambda *told: said.append(told)) as pipeline:
        assert pipeline.backend_name == NAME
        assert re.fullmatch(r"auto: proven on Played Card, \d+ ms an image, the CPU 1000000", pipeline.backend_reason)
        found = pipeline.lora_from_images([picture(90, 70)])
    for module, factors in wanted.factors.items():
        for x, y in zip(found.factors[module], factors, strict=True):
            np.testing.assert_array_equal(x, y)
    assert "played on Played Card was not proven with these engines: it proves itself now" in caplog.text
    stages = {(done, total) for stage, done, total in said if stage == "proving played"}
    assert max(stages) == (16, 16)
    (record,) = kept(directory)
    outcome = record.best
    assert outcome is not None
    assert len(outcome.errors) == 8
    assert 0 < max(outcome.errors.values()) < 1e-5 < outcome.tolerance
    assert outcome.peak_bytes is not None
    assert outcome.budget_bytes is not None
    assert 0 < outcome.peak_bytes <= outcome.budget_bytes
    assert outcome.told_bytes is None  # it is no card that a driver knows
    assert outcome.upload_bytes_per_second
    assert outcome.busy_upload_bytes_per_second
    assert outcome.ms_per_image
    monkeypatch.setattr(proving, "run_task", None)  # would fail
    with Pipeline(directory) as pipeline:
        assert pipeline.backend_name == NAME


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_is_found_and_named(directory: Path, monkeypatch: pytest.MonkeyPatch, fault: str) -> None:
    play(monkeypatch, fault=fault)
    chosen = auto(directory)
    assert chosen.name == "cpu"
    (record,) = kept(directory)
    assert re.search(FAULTS[fault], record.failure), record.failure
    assert f"played: Played Card failed its proof: {record.failure}" in chosen.reason


def test_a_card_that_takes_the_least_by_itself_is_given_more_once(
    directory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    play(monkeypatch, fault="roomy", modest=True)
    assert re.match("with chunks that stay: another result", prove(directory).failure)
    play(monkeypatch, modest=True)
    assert prove(directory).best


def test_pictures_go_alone_where_company_changes_a_bit(directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A LoRA is that of its picture, to the bit: a library that takes other kernels for larger batches loses them."""
    play(monkeypatch, fault="company")
    pictures = [picture(90, 70), picture(64, 64, seed=1)]
    with Pipeline(directory) as pipeline:
        assert pipeline.backend_name == NAME
        together = pipeline.embed(pictures)
        factors = pipeline.factors(together)
        np.testing.assert_array_equal(together[1:], pipeline.embed(pictures[1:]))
        for module, (a, b) in pipeline.factors(together[1:]).items():
            np.testing.assert_array_equal(factors[module][0][1:], a)
            np.testing.assert_array_equal(factors[module][1][1:], b)
    assert "right, one picture at a time, " in verdict(kept(directory)[0])


def test_a_card_that_hangs_is_left_alone(directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    play(monkeypatch, fault="hangs")
    started = processes(monkeypatch)
    record = prove(directory, silence_seconds=3)
    assert re.fullmatch(r"no answer for 3 s, \d+ s in all: it was ended", record.failure)
    assert [process.poll() is not None for process in started] == [True]


def test_a_card_slower_than_the_cpu_is_not_taken(directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    play(monkeypatch, fault="slow")
    monkeypatch.setattr(proving.Prover, "cpu_time", REAL_CPU_TIME)
    monkeypatch.setattr("i2l.runtime.proof.trial.STRETCH", 2)
    chosen = auto(directory)
    assert chosen.name == "cpu"
    assert re.search(r"Played Card is right, but takes \d+ ms an image, the CPU \d+", chosen.reason)


@pytest.mark.parametrize("changed", [{"driver": "2.0"}, {"library": "2.0"}])
def test_another_driver_or_library_proves_itself_anew(
    directory: Path, monkeypatch: pytest.MonkeyPatch, changed: dict[str, str]
) -> None:
    assert auto(directory).name == NAME
    play(monkeypatch, fault="off", **changed)
    assert auto(directory).name == "cpu"
    (record,) = kept(directory)  # in place of the other
    assert {record.subject.card.driver, record.subject.card.libraries["playing"]} == {"1.0", "2.0"}


BROKEN = ["{", "[]", f'{{"format": {records.FORMAT}, "records": [{{}}]}}', '{"format": 0, "records": []}', "\udcff"]


@pytest.mark.parametrize("text", BROKEN)
def test_a_record_that_does_not_parse_is_made_anew(
    directory: Path, caplog: pytest.LogCaptureFixture, text: str
) -> None:
    (directory / PROOFS).write_bytes(text.encode(errors="surrogateescape"))
    with caplog.at_level(logging.WARNING, "i2l"):
        assert auto(directory).name == NAME
    assert ("cannot be used (it does not parse)" in caplog.text) == ('"format": 0' not in text)
    assert len(kept(directory)) == 1


def test_engines_that_cannot_be_written_have_their_record_in_the_cache(
    directory: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    real = files.create_temporary

    def create(path: Path) -> None:
        if path.parent == directory:
            raise OSError(errno.EROFS, os.strerror(errno.EROFS), str(path))
        real(path)

    monkeypatch.setattr(files, "create_temporary", create)
    with caplog.at_level(logging.INFO, "i2l"):
        assert auto(directory).name == NAME
    assert not (directory / PROOFS).exists()
    assert f"the proof is kept in {directory.parent / 'cache'}" in caplog.text
    monkeypatch.setattr(proving, "run_task", None)
    assert auto(directory).name == NAME


@pytest.mark.parametrize(
    ("fault", "form", "words"), [("", "fast", ""), ("off", "safe", "dinov3.block"), ("crashes", "safe", "SIGABRT")]
)
def test_the_fastest_form_that_is_right_is_taken(
    directory: Path, monkeypatch: pytest.MonkeyPatch, fault: str, form: str, words: str
) -> None:
    """Right forms that do not have the fault are slower."""
    play(monkeypatch, fault=fault, only="fast", forms=FORMS)
    monkeypatch.setattr("played_card.OFFER", Offer(find_played, open_played, FORMS))
    assert auto(directory).form == form
    (record,) = kept(directory)
    assert [outcome.form for outcome in record.forms] == list(FORMS)
    assert words in record.forms[1].failure
    with Pipeline(directory) as pipeline:
        assert pipeline.backend_name == NAME
        assert pipeline._open._limits.form == form
    assert decider(directory).decide(NAME, prove=True).form == form


def test_a_renderer_in_software_is_only_taken_by_name(directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    play(monkeypatch, software=True)
    monkeypatch.setattr(proving, "run_task", None)
    assert "Played Card is a renderer in software: only by name" in auto(directory).reason
    with Pipeline(directory, backend=NAME) as pipeline:
        assert pipeline.backend_name == NAME


def test_what_is_asked_for_runs_and_its_proof_is_spoken_of(
    directory: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING, "i2l"), Pipeline(directory, backend=NAME) as pipeline:
        assert (pipeline.backend_name, pipeline.backend_reason) == (NAME, "asked for")
    assert f"played on Played Card is not proven with these engines: i2l prove --engines {directory}" in caplog.text
    play(monkeypatch, fault="off")
    prove(directory)
    caplog.clear()
    with caplog.at_level(logging.WARNING, "i2l"):
        assert decider(directory).decide(NAME, prove=True).name == NAME
    assert "played on Played Card failed its proof (dinov3.block" in caplog.text


def test_no_prove_waits(directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(proving, "run_task", None)
    with Pipeline(directory, prove=False) as pipeline:
        assert pipeline.backend_name == "cpu"
        assert "played: Played Card is not proven: i2l prove does it" in pipeline.backend_reason


def test_engines_that_were_not_built_for_it_say_nothing_of_the_card(
    directory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    play(monkeypatch, fault="unbuilt")
    assert "played: Played Card could not be proven: " in auto(directory).reason
    monkeypatch.setattr(proving, "run_task", None)  # known, until something is built
    assert "could not be proven" in auto(directory).reason


def test_a_full_card_is_tried_again(directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    play(monkeypatch, fault="full")
    assert "could not be proven: fake device has no room" in auto(directory).reason
    assert not (directory / PROOFS).exists()


@pytest.mark.parametrize("stop", [KeyboardInterrupt, RuntimeError])
def test_an_interrupt_ends_the_proof_and_leaves_nothing(
    directory: Path, monkeypatch: pytest.MonkeyPatch, stop: type[BaseException]
) -> None:
    """Ctrl-C, or ComfyUI's exception out of the report, while the card hangs."""
    play(monkeypatch, fault="hangs")
    started = processes(monkeypatch)
    before = sorted(path.name for path in directory.iterdir())

    def report(stage: str, done: int, total: int) -> None:  # noqa: ARG001
        if done == 1:  # it was opened
            raise stop(stage)

    with pytest.raises(stop):
        OpenEngines(directory, backend="auto", limits=Limits(4, report=report))
    assert [process.poll() is not None for process in started] == [True]
    assert sorted(path.name for path in directory.iterdir()) == before
    play(monkeypatch)
    assert auto(directory).name == NAME


def test_a_child_that_never_began_is_told_of(directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(child, "BOOT", "raise SystemExit(3)")
    assert prove(directory).failure == "it ended with exit code 3: without a word"


def test_the_command_tells_and_reports(directory: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("USER", "somebody")
    play(monkeypatch, fault="crashes")
    arguments = ["prove", "--engines", str(directory)]
    result = CliRunner().invoke(main, [*arguments, "--report", str(tmp_path / "report.txt")])
    assert result.exit_code == 1, result.output
    assert "played on Played Card, driver 1.0: failed its proof: it crashed (SIGABRT)" in result.output
    text = (tmp_path / "report.txt").read_text()
    assert "failed its proof: it crashed (SIGABRT): cannot load PATH" in text
    assert not re.search(rf"driver\.so|somebody|{re.escape(str(directory))}|{re.escape(str(Path.home()))}/", text)
    play(monkeypatch)
    result = CliRunner().invoke(main, [*arguments, "--report", "-"])
    assert result.exit_code == 0, result.output
    assert re.search(r"uploads [\d.]+ GB/s alone, [\d.]+ GB/s while computing", result.output.partition("report")[2])
    assert "libraries: playing 1.0" in result.output
    result = CliRunner().invoke(main, [*arguments, "--json"])
    (facts,) = json.loads(result.stdout)["proofs"]
    assert facts == json.loads(json.dumps(asdict(kept(directory)[0])))
    text = CliRunner().invoke(main, ["doctor", "--engines", str(directory)]).output
    assert re.search(r"  played on Played Card, driver 1\.0: right, \d+ ms an image, the CPU 1000000 ms", text)
    result = CliRunner().invoke(main, [*arguments, "--device", "Radeon"])
    assert (result.exit_code, result.output) == (0, "played: it finds no such card\n")
    assert CliRunner().invoke(main, [*arguments, "--backend", "cpu"]).exit_code == 2
    result = CliRunner().invoke(main, [*arguments, "--json", "--report", "-"])  # standard output is for one of them
    assert (result.exit_code, result.stdout) == (2, "")
