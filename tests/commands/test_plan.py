"""Sizes as typed, predictions against cases that can be worked out by hand, and the command."""

import json
import re
from fractions import Fraction
from itertools import pairwise
from pathlib import Path

import pytest
from click.testing import CliRunner
from hypothesis import given
from hypothesis import strategies as st

from conftest import MakeEngines
from i2l.cli import main
from i2l.engines.device.predict import Card, graph_memory, overlapped, predict
from i2l.engines.device.residency import Residency, estimated_memory, plan_residency
from i2l.engines.directory.manifest import Model
from i2l.export.packs.planning import planned_model
from i2l.machine import memory
from i2l.machine.sizes import LARGEST, parse_budget, parse_size
from i2l.machine.wording import GIB, format_bytes
from i2l.specs import PRESETS, Family

# --- sizes -------------------------------------------------------------------------------------------------------

FACTORS = {"": 1, "B": 1} | {
    f"{unit}{ending}": (1000 if ending == "B" else 1024) ** power
    for power, unit in enumerate("KMGT", 1)
    for ending in ("", "iB", "i", "B")
}
cased = st.sampled_from([str.upper, str.lower, str])


@given(st.integers(1, 10**6), st.integers(0, 999), st.sampled_from(sorted(FACTORS)), st.sampled_from(["", " "]), cased)
def test_sizes(whole: int, thousandths: int, unit: str, space: str, case: object) -> None:
    exact = (whole + Fraction(thousandths, 1000)) * FACTORS[unit]
    text = f" {whole}.{thousandths:03}{space}{case(unit)}"  # type: ignore[operator]
    if exact > LARGEST:
        return
    assert abs(parse_size(text) - exact) <= Fraction(1, 2) + exact / 2**50  # rounded once, through a float


@pytest.mark.parametrize(
    "text", ["", "GiB", "8 iB", "-1GiB", "0", "1e3", "8GiBs", "8 8", "nan", "2EiB", "1_000", "٣", "0.1", "99999999TiB"]
)
def test_no_sizes(text: str) -> None:
    with pytest.raises(ValueError, match=r"is no size|is not between"):
        parse_size(text)


def test_auto() -> None:
    assert [parse_budget(text) for text in ("auto", " AUTO ", "8GiB", "2 GB")] == [None, None, 8 * GIB, 2 * 10**9]


# --- the model ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("work", "slots", "seconds"),
    [
        ([(3, 1)] * 4, 2, 13),  # copies back to back, the last computation sticks out
        ([(1, 3)] * 4, 2, 13),  # computations back to back after the first copy
        ([(3, 1)] * 4, 1, 16),  # one slot: nothing overlaps
        ([(0, 2)] * 4, 0, 8),  # all resident
        ([(0, 2), (2, 1), (2, 1)], 2, 5),  # the first copy hides behind a resident chunk
        ([(0, 9), (2, 1), (2, 1), (2, 1)], 2, 13),  # two come meanwhile; the third waits for a slot
        ([], 0, 0),
    ],
)
def test_overlap_by_hand(work: list[tuple[float, float]], slots: int, seconds: float) -> None:
    assert overlapped(work, slots) == seconds


seconds_ = st.floats(0.001, 10)


@given(st.lists(st.tuples(seconds_ | st.just(0.0), seconds_), max_size=30), st.integers(1, 4))
def test_overlap_is_between_its_bounds_and_slots_help(work: list[tuple[float, float]], slots: int) -> None:
    copies, computes = sum(c for c, _ in work), sum(c for _, c in work)
    found = overlapped(work, slots)
    assert max(copies, computes) <= found * (1 + 1e-9)
    assert found <= (copies + computes) * (1 + 1e-9)
    assert overlapped(work, slots + 1) <= found * (1 + 1e-9)


@pytest.fixture(scope="module")
def full() -> dict[Family, Model]:
    return {spec.family: planned_model(spec, "fp8") for spec in PRESETS["full"]}


def full_plan(full: dict[Family, Model], gib: float, images: int = 1) -> Residency:
    graphs = {name: memory for m in full.values() for name, memory in estimated_memory(m.spec, images).items()}
    return plan_residency({family: model.chunks for family, model in full.items()}, graphs, int(gib * GIB))


def test_full_size_by_hand(full: dict[Family, Model]) -> None:
    """8.9 GiB at 25 GB/s are 0.38 s; 2 x 6.7e9 x 201 + 2 x 1.1e9 x 576 operations at 1e14 are 0.04 s."""
    card = Card(pcie_gbps=25, tflops=100, vram_gbps=1e9)
    streamed = predict(full, full_plan(full, 2), card, 1)
    assert streamed.copy_seconds == pytest.approx(streamed.streamed_bytes / 25e9)
    assert streamed.copy_seconds <= streamed.seconds <= 1.02 * streamed.copy_seconds
    resident = predict(full, full_plan(full, 24), card, 1)
    assert resident.streamed_bytes == 0
    assert resident.seconds == pytest.approx((2 * 6.71e9 * 201 + 2 * 1.13e9 * 576) / 1e14, rel=0.05)


def test_more_of_anything_is_not_slower(full: dict[Family, Model]) -> None:
    by_budget = [predict(full, full_plan(full, gib), Card(25, 100), 1).seconds for gib in (2, 4, 6, 8, 10)]
    by_link = [predict(full, full_plan(full, 4), Card(link, 100), 1).seconds for link in (6, 12, 25, 50)]
    assert all(a > b for a, b in pairwise(by_budget))
    assert all(a > b for a, b in pairwise(by_link))
    four, one = (predict(full, full_plan(full, 4, 4), Card(25, 100), images).seconds for images in (4, 1))
    assert four < 1.2 * one


@pytest.mark.parametrize("gib", [4, 6, 8])
def test_the_chosen_set_beats_keeping_the_first_chunks(full: dict[Family, Model], gib: int) -> None:
    """Eight images: enough computing for the choice to matter."""
    plan = full_plan(full, gib, 8)
    counts, left = {}, plan.resident_bytes
    for family, model in full.items():
        counts[family] = 0
        for chunk in model.chunks:
            if chunk.nbytes <= left:
                left -= chunk.nbytes
                counts[family] += 1
    naive = Residency(**{**vars(plan), "resident": {family: tuple(range(n)) for family, n in counts.items()}})
    card = Card(25, 100)
    assert predict(full, plan, card, 8).seconds <= predict(full, naive, card, 8).seconds


def test_nine_images_are_two_passes(full: dict[Family, Model]) -> None:
    plan, card = full_plan(full, 4, 8), Card(25, 100)
    eight, one, nine = (predict(full, plan, card, images) for images in (8, 1, 9))
    assert nine.passes == 2
    assert nine.seconds == pytest.approx(eight.seconds + one.seconds)


# --- the command -------------------------------------------------------------------------------------------------


def run(*arguments: str) -> str:
    result = CliRunner().invoke(main, ["plan", *arguments])
    assert result.exit_code == 0, result.output
    return result.output


def test_one_plan(engines: MakeEngines) -> None:
    facts = json.loads(run("--engines", str(engines("tiny", "fp8")), "--vram-budget", "4GiB", "--json"))
    assert facts["predicted"] is True
    assert facts["peak_bytes"] == sum(facts["parts"].values()) <= 4 * GIB
    assert facts["resident_chunks"] == facts["chunks"] == {"siglip2": 4, "dinov3": 5, "adapter": 4}
    text = run("--engines", str(engines("tiny", "fp8")), "--vram-budget", "4GiB")
    assert "predicted for 25 GB/s and 100 TFLOP/s, not measured" in text


def test_what_is_pinned_of_this_machine_and_what_it_is_for(monkeypatch: pytest.MonkeyPatch) -> None:
    arguments = ("--preset", "full", "--vram-budget", "2GiB")
    monkeypatch.setattr(memory, "available_bytes", lambda: 8 * GIB)
    host = json.loads(run(*arguments, "--json"))["host"]
    assert 3.5 * GIB < host["cache_bytes"] <= 4 * GIB - host["ring_bytes"] - host["values_bytes"]
    assert 40 << 20 < host["values_bytes"] < 80 << 20  # the factors of an image are 40 MB
    for link, share in host["link_share"].items():
        assert host["link_share_first_pass"][link] <= share <= 1
    assert host["link_share_first_pass"]["50"] == pytest.approx(host["fill_gbps"] / 50, rel=0.01)
    text = run(*arguments)
    values = format_bytes(host["values_bytes"])
    assert f"ring 128.0 MiB, inputs and results {values}, cache from the second pass on 3.8" in text
    assert "(8.00 GiB are available here; with the cache half of it at most)" in text
    assert "CUDA graphs" not in text
    assert f"before, GB/s: {100 * host['link_share_first_pass']['12']:.0f} % of 12, " in text
    monkeypatch.setattr(memory, "available_bytes", lambda: None)
    unknown = "cache from the second pass on 0 B (what is available here is unknown; with the cache half of it at most)"
    assert unknown in run(*arguments)


def test_where_all_weights_stay_graphs_take_what_is_left(full: dict[Family, Model]) -> None:
    """No cache is planned there, and no link is in use; what results pass through is pinned all the same."""
    text = run("--preset", "full", "--vram-budget", "24GiB")
    plan = plan_residency({f: model.chunks for f, model in full.items()}, graph_memory(full, 1), 24 * GIB)
    left = format_bytes(24 * GIB - plan.peak_bytes)
    assert f"\nleft for CUDA graphs, one for each model and number of images: {left} (" in text
    (pinned,) = (line for line in text.splitlines() if "pinned" in line)
    assert re.fullmatch(r"RAM pinned by cuda and tensorrt: ring 128.0 MiB, inputs and results \d+\.\d MiB", pinned)
    assert "link used" not in text


def test_a_table(tmp_path: Path) -> None:
    budgets = [f"--vram-budget={gib}GiB" for gib in (6, 10, 14)]
    lines = run("--preset", "full", *budgets, "--pcie-gbps", "12", "--pcie-gbps", "25").splitlines()
    assert len(lines) == 5
    assert {line.count("|") for line in lines} == {7}
    assert lines[-1].startswith("| 14.00 GiB |")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        (["--preset", "full", "--vram-budget", "0.5GiB"], 1, "error: the VRAM budget is 512.0 MiB, but"),
        (["--preset", "full", "--vram-budget", "auto"], 2, "give a size"),
        (["--preset", "full", "--vram-budget", "lots"], 2, "is no size"),
        (["--vram-budget", "4GiB"], 2, "either --engines or --preset"),
        (["--engines", "nowhere", "--vram-budget", "4GiB"], 1, "error: nowhere has no manifest.json"),
    ],
)
def test_what_cannot_be_planned(arguments: list[str], code: int, words: str) -> None:
    result = CliRunner().invoke(main, ["plan", *arguments])
    assert result.exit_code == code
    assert words in result.output
