"""A card that is played, right and wrong in every way, through the real process of a proof."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from conftest import MakeEngines
from i2l.engines.backends import BACKENDS
from i2l.engines.base import Limits
from i2l.engines.directory.manifest import PROOFS, read_manifest
from i2l.runtime.proof import proving
from i2l.runtime.proof.child import TimeLimits
from i2l.runtime.proof.deciding import Decider
from i2l.runtime.proof.judging import FormOutcome
from i2l.runtime.proof.records import Record
from played_card import NAME, VARIABLE, Part, find_played

CPU = FormOutcome(None, ms_per_image=1e6)
"""Slower than anything that is played."""


@pytest.fixture
def directory(engines: MakeEngines, tmp_path: Path) -> Path:
    return Path(shutil.copytree(engines("tiny", "fp32"), tmp_path / "engines"))


@pytest.fixture(autouse=True)
def card(monkeypatch: pytest.MonkeyPatch) -> None:
    """The one card of this machine, beside a CPU that is slow."""
    for name in set(BACKENDS) - {"cpu"}:
        monkeypatch.delitem(BACKENDS, name)
    monkeypatch.setitem(BACKENDS, NAME, "played_card")
    monkeypatch.setattr(proving.Prover, "cpu_time", lambda _: CPU)


def play(monkeypatch: pytest.MonkeyPatch, **part: Any) -> None:
    monkeypatch.setenv(VARIABLE, Part(**part).text())


def proven(directory: Path, fallback: Path, limits: Limits | None = None, **seconds: float) -> Record:
    limits = limits or Limits(4, threads=1)
    decider = Decider(directory, read_manifest(directory), limits, fallback, TimeLimits(**seconds))
    subject = decider.subject(find_played())
    assert subject
    return decider.prove(subject)


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


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_is_found_and_named(
    directory: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fault: str
) -> None:
    play(monkeypatch, fault=fault)
    record = proven(directory, tmp_path / "cache")
    assert record.best is None
    assert not record.refused
    assert record.failure
    pytest.importorskip("re")
    import re

    assert re.search(FAULTS[fault], record.failure), record.failure
    assert json.loads((directory / PROOFS).read_text())["records"][0]["forms"][0]["failure"] == record.failure
