"""What is chosen, what is seen of an error, and what is read back: pure."""

import math
import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from conftest import MakeEngines
from i2l.engines.base import BackendStatus, CardFacts
from i2l.engines.directory.manifest import Chunk, Step, read_manifest
from i2l.runtime.proof.activations import MASSIVE, seeded_activation
from i2l.runtime.proof.choice import Candidate, choose
from i2l.runtime.proof.judging import (
    FormOutcome,
    difference,
    difference_failure,
    error_failure,
    memory_failure,
    stretch,
    worst_error,
)
from i2l.runtime.proof.records import Record, Subject, card_of, records_from_json, records_to_json
from i2l.runtime.proof.sentences import anonymous, report_text, verdict
from i2l.specs import PRESETS

TINY = PRESETS["tiny"]
TEXT = st.text('ab \\"é\n', max_size=8)
MS = st.floats(0.01, 1e6)
OUTCOMES = st.builds(
    FormOutcome,
    form=st.none() | TEXT,
    failure=st.sampled_from(["", "wrong"]),
    refusal=st.sampled_from(["", "not built"]),
    lasting=st.booleans(),
    alone=st.booleans(),
    errors=st.dictionaries(TEXT, st.floats(0, 1e9), max_size=2),
    peak_bytes=st.none() | st.integers(0, 1 << 40),
    ms_per_image=MS,
)
CARDS = st.builds(CardFacts, TEXT, TEXT, st.dictionaries(TEXT, TEXT, max_size=2), st.booleans())
RECORDS = st.builds(
    Record,
    subject=st.builds(Subject, st.sampled_from(["a", "b", "c"]), CARDS, TEXT, TEXT),
    forms=st.lists(OUTCOMES, min_size=1, max_size=3).map(tuple),
    cpu_ms_per_image=st.none() | MS,
    cpu_estimated=st.booleans(),
    seconds=st.floats(0, 100),
    made=TEXT,
)


def candidate(name: str, record: Record | None, *, works: bool) -> Candidate:
    record = record and replace(record, subject=replace(record.subject, backend=name))
    card = record.subject.card if record else CardFacts("unknown")
    return Candidate(BackendStatus(name, works=works, reason="a reason", cards=(card,)), card, record)


@given(st.dictionaries(st.sampled_from(["a", "b", "c"]), st.tuples(st.none() | RECORDS, st.booleans())))
def test_the_fastest_proven_backend_is_taken_if_it_beats_the_cpu(
    found: dict[str, tuple[Record | None, bool]],
) -> None:
    chosen = choose(candidate(name, record, works=works) for name, (record, works) in found.items())
    right = {}
    for name, (record, works) in found.items():
        if record and works and not record.subject.card.software:
            times = [outcome.ms_per_image or 0 for outcome in record.forms if outcome.passed]
            if times and min(times) < (record.cpu_ms_per_image or math.inf):
                right[name] = min(times)
    assert (chosen.name == "cpu") == (not right)
    if right:
        assert right[chosen.name] == min(right.values())
        record = found[chosen.name][0]
        assert record
        assert (chosen.form, right[chosen.name]) in [(o.form, o.ms_per_image) for o in record.forms if o.passed]
    for name in found:
        if name != chosen.name:
            assert f"{name}: " in chosen.reason


@given(st.lists(RECORDS, max_size=3))
def test_records_are_read_back_as_they_were(written: list[Record]) -> None:
    assert records_from_json(records_to_json(written)) == written


def test_another_version_of_the_proof_is_no_record() -> None:
    assert records_from_json('{"format": 999, "records": [{"unknown": 1}]}') == []


@pytest.mark.parametrize(
    ("device", "name"), [(None, "Arc"), ("0", "Arc"), ("1", "GeForce"), ("geforce", "GeForce"), ("2", ""), ("x", "")]
)
def test_a_card_is_named_by_its_number_or_a_part_of_its_name(device: str | None, name: str) -> None:
    card = card_of([CardFacts("Arc"), CardFacts("GeForce")], device)
    assert (card.name if card else "") == name


def test_one_wrong_token_beside_a_massive_one_is_seen() -> None:
    """1 % of a token's change is 1e-5 of the whole block's output, and half of that of the worst channel."""
    spec = TINY.dinov3
    activation = seeded_activation(spec, "dinov3.block", 1)
    change = np.random.default_rng(0).standard_normal(activation.shape, np.float32)
    wanted = {"hidden_out": activation + change}
    found = {"hidden_out": wanted["hidden_out"].copy()}
    found["hidden_out"][0, -1] += 0.01 * change[0, -1]
    error = worst_error(spec, activation, found, wanted)
    assert 0.009 < error < 0.011
    assert np.linalg.norm(found["hidden_out"] - wanted["hidden_out"]) < 1e-4 * np.linalg.norm(wanted["hidden_out"])
    assert error_failure({"dinov3.block": error}, 1e-3) == "dinov3.block 1 % off (tolerance 0.1 %)"
    assert not error_failure({"dinov3.block": error}, 0.02)
    found["hidden_out"][0, 0, 0] = np.nan
    assert "gives no number" in error_failure({"g": worst_error(spec, activation, found, wanted)}, 0.5)


def test_activations_are_massive_for_some_pictures_and_the_same_in_every_batch() -> None:
    one, four = (seeded_activation(TINY.dinov3, "dinov3.block", images) for images in (1, 4))
    np.testing.assert_array_equal(one[0], four[0])
    assert [bool(np.abs(picture).max() > MASSIVE) for picture in four] == [True, False, True, False]
    assert seeded_activation(TINY.adapter, "adapter.attention", 2).shape == (2, TINY.adapter.embedding)


def test_not_the_same_and_too_much_are_said() -> None:
    x = np.ones((2, 2), np.float32)
    assert difference([x], [x.copy()]) == 0
    assert difference([x * 0], [x * -0.0]) > 0  # not even the sign of a zero
    assert difference([x, x], [x, x + np.float32(1e-6)]) == pytest.approx(9.5e-7, rel=0.01)
    assert difference([x], [np.full_like(x, np.nan)]) > 1
    assert not difference_failure("again", 0.0)
    assert difference_failure("again", 9.5e-7) == "again: another result, 9.5e-05 % apart"
    assert not memory_failure(None, 1)
    assert not memory_failure(1 << 30, 1 << 30)
    assert memory_failure(2 << 30, 1 << 30) == "it took 2.00 GiB of the card, 1.00 GiB were allowed"


@pytest.mark.parametrize(("count", "kept"), [(3, [0, 1, 2]), (7, [0, 1, 2, 3, 4, 5, 6]), (9, [0, 1, 2, 3, 4, 5, 8])])
def test_a_stretch_has_the_first_chunks_and_the_last(count: int, kept: list[int]) -> None:
    chunks = tuple(Chunk(index, 1, (Step(str(index), "g"),)) for index in range(count))
    assert [chunk.offset for chunk in stretch(chunks, 7)] == kept


@pytest.mark.parametrize(
    "private",
    ["/home/jane/models", "~/engines", r"C:\Users\Jane Doe\i2l", r"\\server\share", "./here/x.onnx", "D:/i2l"],
)
def test_a_report_has_no_paths(private: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("platform.node", lambda: "janes-pc")
    text = anonymous(f"cannot open '{private}' on janes-pc, uploads 11.90 GB/s alone, 3.00 GB/s while computing")
    assert not any(word in text for word in ("jane", "Jane", "Doe", "models", "engines", "i2l", "server", "here"))
    assert text.endswith("uploads 11.90 GB/s alone, 3.00 GB/s while computing")


def test_a_verdict_says_what_was_estimated() -> None:
    right = FormOutcome("mha", ms_per_image=45.2, estimated=False)
    record = Record(Subject("webgpu", CardFacts("Arc"), "b", "1"), (right,), 11000.0, True, 8.0, "")
    assert verdict(record) == "right (mha), 45 ms an image, the CPU about 11000 ms"
    assert verdict(replace(record, forms=(replace(right, failure="off"),))) == "failed its proof: mha: off"


def test_whatever_a_record_quotes_its_report_names_nobody(
    engines: MakeEngines, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("USER", "jane")
    monkeypatch.setattr("platform.node", lambda: "janes-pc")
    private = f"open '{Path.home()}/models/jane/x.onnx' for jane on janes-pc: C:\\Users\\jane\\i2l"
    card = CardFacts("Radeon RX 6700/6750 XT", f"1.0 {private}", {private: private})
    wrong = FormOutcome(private, failure=private, errors={private: 1.0}, told_bytes=1, told_by=private)
    other = FormOutcome(None, refusal=private, peak_bytes=1, budget_bytes=1, told_bytes=1, told_by=private)
    manifest = read_manifest(engines("tiny", "fp32"))
    for forms in ((wrong, other), (other,)):
        record = Record(Subject(private, card, private, private), forms, 1.0, False, 1.0, private)
        text = report_text([record], manifest)
        assert "Radeon RX 6700/6750 XT" in text
        assert not re.search(rf"jane|models|x\.onnx|Users|i2l\.|{re.escape(str(Path.home()))}", text), text
