"""The device's host side on NVIDIA's own Python bindings, over a stand-in for the driver (driver.c) that has no GPU.

Whatever a card may do with the order of work, the LoRA is the CPU's to the bit, and nothing is used before it is there,
overwritten before it was used, or freed before that. Each fault put in on purpose is found.
"""

import importlib.util
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from planted_faults import GRAPH_MUTATIONS, MUTATIONS
from played_tensorrt import own_graphs, write_plans
from scenario import digest

from conftest import MakeEngines, lora_of_one_batch, picture
from i2l.engines.device.residency import RESERVED_BYTES
from i2l.engines.directory.manifest import read_manifest
from i2l.specs import PRESETS

HERE = Path(__file__).parent
ROOMY = 10_000_000
"""Bytes above the least budget with which all weights stay."""
PASSES = [1, 4, 2, 1]
RING_BYTES = 128 << 20
"""Planned; so small a part of it is made here that chunks pass in several pieces:"""
RING_HERE_BYTES = 4 * (16 << 10)
VALUES_BYTES = (4 << 20) + 3 * (256 << 10)
"""What goes in, and blocks for the results of four images."""
ROOM_FOR_ALL = 2 * (RING_BYTES + (16 << 20))
"""Of the host's memory: half of it is the ring, values and all weights."""
MODES: list[dict[str, object]] = [
    {"MODE": "eager"},
    {"MODE": "lazy"},
    *({"MODE": "random", "SEED": s} for s in range(3)),
]
Facts = dict[str, Any]


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The stand-in, compiled."""
    compiler = shutil.which("cc")
    if compiler is None or not sys.platform.startswith("linux"):
        pytest.skip("the stand-in for the driver needs Linux and a C compiler named cc")
    if importlib.util.find_spec("cuda") is None:
        pytest.skip("cuda-bindings is not installed: pip install 'i2l-engines[cuda]'")
    folder = tmp_path_factory.mktemp("driver")
    command = [compiler, "-Wall", "-Wextra", "-Werror", "-shared", "-fPIC", "-O1", "-o", str(folder / "libcuda.so.1")]
    subprocess.run([*command, str(HERE / "driver.c"), "-lpthread"], check=True)
    return folder


@pytest.fixture(scope="module")
def planned(engines: MakeEngines, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Engines in float32 with the CPU's graphs as plans: then a device gives the CPU's LoRA bit for bit."""
    directory = tmp_path_factory.mktemp("planned") / "engines"
    shutil.copytree(engines("tiny", "fp32"), directory)
    write_plans(directory, own_graphs(directory))
    return directory


@pytest.fixture(scope="module")
def wanted(planned: Path) -> dict[int, str]:
    """``images -> the CPU's LoRA``."""
    counts = sorted({*PASSES})
    return {n: digest(lora_of_one_batch(planned, [picture(90, 70, seed=seed) for seed in range(n)])) for n in counts}


def ran(library: Path, planned: Path, cases: list[Facts], *mutation: str) -> list[Facts]:
    """Every case in one process; a mutated one may crash, and then gives less."""
    command = [sys.executable, str(HERE / "scenario.py"), str(planned), json.dumps(cases), *mutation]
    environment = os.environ | {"LD_LIBRARY_PATH": str(library)}
    result = subprocess.run(command, env=environment, capture_output=True, text=True, check=False, timeout=900)
    assert result.returncode == 0 or mutation, result.stderr[-3000:]
    assert "Traceback" not in result.stderr or mutation, result.stderr[-3000:]
    return [json.loads(line) for line in result.stdout.splitlines()]


def test_the_lora_is_the_cpus_however_late_the_card_works(library: Path, planned: Path, wanted: dict[int, str]) -> None:
    """At the least budget, with some chunks resident, and with all; what is copied is pinned, all is given back.

    In other threads than that which opened it, too: CUDA's context is current in each by itself.
    """
    cases: list[Facts] = [
        {"passes": PASSES, "spare_bytes": b, "environment": mode} for b in (0, 60_000, ROOMY) for mode in MODES
    ]
    cases.append(cases[1] | {"threads": True})
    for case, facts in zip(cases, ran(library, planned, cases), strict=True):
        assert facts["loras"] == [wanted[images] for images in PASSES], case
        assert facts["problems"] == facts["live_bytes"] == facts["pinned_bytes"] == facts["pageable_copies"] == 0, case
        assert facts["peak_bytes"] <= facts["vram"]["measured_peak_bytes"] <= facts["budget_bytes"], case


OF_COPIES: dict[str, Facts] = {
    "kept before it came": {"passes": [1, 1, 1], "host_bytes": ROOM_FOR_ALL},
    "copies where kernels are launched": {"late_copies": True},
    "marks behind what failed": {"environment": {"MODE": "lazy", "FAIL_COPY": 9}},
}
"""``mutation -> the case that shows it``."""


@pytest.mark.parametrize("mutation", sorted(MUTATIONS.keys() - OF_COPIES.keys()))
def test_each_fault_is_found(library: Path, planned: Path, wanted: dict[int, str], mutation: str) -> None:
    cases: list[Facts] = [{"passes": [1, 2], "environment": mode} for mode in MODES[1:3]]
    cases.append({"interrupt_at": 5, "environment": MODES[1]})
    found = ran(library, planned, cases, mutation)
    wrong = (facts["loras"] != [wanted[images] for images in (1, 2)] for facts in found[:2])
    assert len(found) < len(cases) or any(wrong) or any(facts["problems"] for facts in found)


def test_a_fault_is_seen_in_two_ways(library: Path, planned: Path, wanted: dict[int, str]) -> None:
    """Each alone: what is done at once has the right values and is a race; what is done late has wrong ones."""
    cases: list[Facts] = [{"passes": [1, 2], "environment": mode} for mode in MODES[:2]]
    at_once, late = ran(library, planned, cases, "no wait for a slot")
    right = [wanted[1], wanted[2]]
    assert at_once["loras"] == right != late["loras"]
    assert at_once["problems"] > 0


@pytest.mark.parametrize("mutation", OF_COPIES)
def test_each_fault_of_copies_is_found(library: Path, planned: Path, wanted: dict[int, str], mutation: str) -> None:
    case = OF_COPIES[mutation]
    (facts,) = ran(library, planned, [case], mutation)
    assert facts.get("held_up") or not {*facts.get("loras", [])} <= {wanted[1]}, facts


def test_an_interrupt_frees_nothing_that_is_in_use(library: Path, planned: Path) -> None:
    """At any step of the encoders and the adapter, when chunks begin to be kept too, and all is given back."""
    cases: list[Facts] = [{"interrupt_at": step, "environment": MODES[1 + step % 4]} for step in range(0, 40, 3)]
    cases += [case | {"passes": [1, 1, 1], "host_bytes": ROOM_FOR_ALL} for case in cases[1::3]]
    for facts in ran(library, planned, cases):
        assert facts["problems"] == facts["live_bytes"] == facts["pinned_bytes"] == 0


AGAIN = [1, 1, 2, 1, 2]
SIX = {"passes": [1] * 6, "spare_bytes": ROOMY}


def test_a_pass_is_one_launch_for_each_model(library: Path, planned: Path, wanted: dict[int, str]) -> None:
    """The first pass brings the weights; behind it each size is recorded once. Interrupted, nothing is in use.

    A card that cannot record, or has no memory for it, or work that calls the host or copies what the host has written,
    pinned or managed: said once.
    """
    cases: list[Facts] = [{"passes": AGAIN, "spare_bytes": ROOMY, "environment": mode} for mode in MODES[1:4]]
    refusals: list[Facts] = [{"NO_GRAPHS": 1}, {"NO_GRAPHS": 2}, {"CALLS_HOST": 1}]
    refusals += [{"COPIES_FROM": allocate} for allocate in ("cuMemHostAlloc", "cuMemAllocManaged")]
    cases += [cases[0] | {"environment": MODES[1] | refusal} for refusal in refusals]
    cases += [{"interrupt_at": step, **cases[step % 3]} for step in range(30, 110, 11)]
    for case, facts in zip(cases, ran(library, planned, cases), strict=True):
        assert facts["problems"] == facts["live_bytes"] == facts["pinned_bytes"] == facts["pageable_copies"] == 0, case
        if "interrupt_at" not in case:
            assert facts["loras"] == [wanted[images] for images in AGAIN], case
            refused = not case["environment"].keys().isdisjoint({"NO_GRAPHS", "CALLS_HOST", "COPIES_FROM"})
            assert (facts["graph_launches"], facts["without_graphs"]) == ((0, 1) if refused else (12, 0)), case


def test_graphs_take_what_the_budget_leaves(library: Path, planned: Path, wanted: dict[int, str]) -> None:
    """What they take counts, that of the first launch too, and counts no more once they are dropped.

    The one that is too large goes at once, and is the last that was tried: said once, with the numbers.
    """
    sizes = (200_000, 1_200_000, 20_000_000)
    cases: list[Facts] = [
        {"passes": AGAIN, "spare_bytes": ROOMY, "environment": MODES[1] | {"GRAPH_BYTES": nbytes}} for nbytes in sizes
    ]
    cases.append({**SIX, "move_after": 3, "environment": MODES[2] | {"GRAPH_BYTES": 1_200_000}})
    found = ran(library, planned, cases)
    for case, facts in zip(cases, found, strict=True):
        graphs, vram = facts["vram"]["graphs_bytes"], facts["vram"]
        assert facts["loras"] == [wanted[images] for images in case["passes"]], case
        assert facts["live_at_last"] == facts["planned_live_bytes"] + graphs, case
        assert vram["planned_peak_bytes"] + graphs <= vram["budget_bytes"], case
        assert facts["problems"] == facts["live_bytes"] == facts["pinned_bytes"] == 0, case
    six, some, none, three = (facts["vram"]["graphs_bytes"] for facts in found)
    assert (six, none, three) == (6 * sizes[0], 0, 3 * sizes[1])
    assert some in {n * sizes[1] for n in range(1, 6)}
    assert [facts["without_graphs"] for facts in found] == [0, 1, 1, 0]
    assert found[2]["peak_bytes"] <= found[2]["vram"]["measured_peak_bytes"]


@pytest.mark.parametrize("mutation", [None, *GRAPH_MUTATIONS])
def test_graphs_go_with_the_memory_that_they_use(
    library: Path, planned: Path, wanted: dict[int, str], mutation: str | None
) -> None:
    """Weights that stay elsewhere are recorded anew; where some pass through, steps are launched one by one."""
    cases: list[Facts] = [
        {**SIX, "environment": MODES[1], "move_after": 3},
        {**SIX, "environment": MODES[2], "shrink_after": 3},
    ]
    found = ran(library, planned, cases, *filter(None, [mutation]))
    right = [
        facts["loras"] == [wanted[1]] * 6
        and facts["problems"] == facts["live_bytes"] == 0
        and (facts["launched_before"], facts["graph_launches"]) == (6, launches)
        for facts, launches in zip(found, (12, 6), strict=False)
    ]
    assert (len(right) == len(cases) and all(right)) == (mutation is None), found


def test_without_pinned_memory_it_is_right_and_slower(library: Path, planned: Path, wanted: dict[int, str]) -> None:
    cases: list[Facts] = [{"environment": mode | {"PINNABLE": 0}} for mode in MODES]
    cases.append({"passes": [1, 1, 1], "spare_bytes": ROOMY, "environment": {"PINNABLE": 0}})
    for case, facts in zip(cases, ran(library, planned, cases), strict=True):
        assert facts["loras"] == [wanted[1]] * len(case.get("passes", [1]))
        assert facts["problems"] == 0
        assert facts["pageable_copies"] == facts["copies"] > 0
        assert facts["without_graphs"] == ("passes" in case)  # results cannot be copied by a graph either


def test_kept_chunks_are_not_filled_again(library: Path, planned: Path, wanted: dict[int, str]) -> None:
    """From the second pass on chunks get memory of their own, whatever came and whenever the card works."""
    passes = [1, 2, 1, 4]
    cases: list[Facts] = [{"passes": passes, "host_bytes": ROOM_FOR_ALL, "environment": mode} for mode in MODES[:4]]
    for case, facts in zip(cases, ran(library, planned, cases), strict=True):
        assert facts["loras"] == [wanted[images] for images in passes], case
        assert facts["problems"] == facts["live_bytes"] == facts["pinned_bytes"] == facts["pageable_copies"] == 0, case
        first, second, third, last = facts["filled_bytes"]
        assert facts["kept"][0] == 0 < facts["kept"][1], case
        assert first >= second == facts["streamed_bytes"] > third > last == 0, case
        assert facts["pinned_peak_bytes"] < ROOM_FOR_ALL // 2, case


def test_less_can_be_kept_than_was_planned(library: Path, planned: Path, wanted: dict[int, str]) -> None:
    """As the system refuses, or as the half of what is available is less: some chunks are filled in every pass.

    Results of more images come when the cache is full: there is room for them.
    """
    refused: Facts = {"environment": {"MODE": "random", "PINNABLE": 6_000_000}, "host_bytes": ROOM_FOR_ALL}
    small: Facts = {"environment": MODES[2], "host_bytes": 2 * (RING_BYTES + VALUES_BYTES + 2_000_000)}
    cases = [case | {"passes": [1, 1, 1, 4]} for case in (refused, small)]
    for case, facts in zip(cases, ran(library, planned, cases), strict=True):
        assert facts["loras"] == [wanted[1]] * 3 + [wanted[4]]
        assert facts["pinned_peak_bytes"] - RING_HERE_BYTES <= case["host_bytes"] // 2 - RING_BYTES
        assert facts["problems"] == facts["pinned_bytes"] == facts["pageable_copies"] == 0
        assert 0 < facts["filled_bytes"][-1] < facts["streamed_bytes"]
        assert facts["kept"][-1] > 0


def test_a_smaller_plan_keeps_other_chunks(library: Path, planned: Path, wanted: dict[int, str]) -> None:
    """What was kept is given back, and what stayed on the card is kept now."""
    host_bytes = 2 * (RING_BYTES + VALUES_BYTES + 9_000_000)  # 5.5 MB of weights; a half of what is pinned then
    case = {"passes": [1] * 8, "shrink_after": 4, "spare_bytes": 60_000, "host_bytes": host_bytes}
    (facts,) = ran(library, planned, [case | {"environment": MODES[1]}])
    assert facts["loras"] == [wanted[1]] * 8
    assert facts["problems"] == facts["live_bytes"] == facts["pinned_bytes"] == 0
    assert facts["kept"][4] == 0 < facts["kept"][3] < facts["kept"][7]
    assert facts["filled_bytes"][3] == facts["filled_bytes"][7] == 0


def test_copies_do_not_hold_up_launches(library: Path, planned: Path, wanted: dict[int, str]) -> None:
    """Nothing else is copied: each chunk, the pixels and the embedding once, though weights come through slots."""
    weights = sum(chunk.nbytes for model in read_manifest(planned).models.values() for chunk in model.chunks)
    siglip2, dinov3, adapter = PRESETS["tiny"]
    values = 4 * (sum(3 * encoder.image_size**2 for encoder in (siglip2, dinov3)) + adapter.embedding)
    for facts in ran(library, planned, [{"late_copies": True, "environment": mode} for mode in MODES[:2]]):
        assert facts["loras"] == [wanted[1]]
        assert facts["held_up"] is False
        assert facts["uploaded_bytes"] == weights + values


def test_a_proof_tells_what_the_lanes_did(library: Path, planned: Path, wanted: dict[int, str]) -> None:
    """Copies hide behind computing, but for one slot, which is filled behind its last reader; they take the link whole.

    By the time that the stand-in reckons, whenever work is really done. Nothing is compared where nothing is pinned.
    """
    cases: list[Facts] = [{"lanes": True, "environment": mode} for mode in MODES[:3]]
    one_slot = cases[1] | {"slots": 1}
    refused: Facts = {"lanes": True, "environment": {"MODE": "lazy", "PINNABLE": 0}}
    outcomes = ran(library, planned, [*cases, one_slot, refused])
    for facts in outcomes:
        assert facts["loras"] == [wanted[1]]
        assert facts["problems"] == facts["live_bytes"] == facts["pinned_bytes"] == 0
        assert facts["peak_bytes"] == facts["planned_live_bytes"]  # nothing is compared with memory beyond the plan
    eager, *others, serial, pageable = (facts["lanes"] for facts in outcomes)
    assert others == [pytest.approx(eager)] * 2
    assert 0.5 < eager["overlap"] <= 1
    assert serial["overlap"] == 0
    assert not eager["mostly_copying"]
    for facts in (eager, serial):
        assert facts["pinned_bytes_per_second"] == pytest.approx(1e9, rel=1e-3)
        assert facts["copying_share"] == pytest.approx(1, rel=1e-3)
    assert eager["streaming_share"] == pytest.approx(1, rel=1e-3)
    assert pageable == {"overlap": eager["overlap"], "mostly_copying": eager["mostly_copying"], "unpinned": True}


def test_memory_that_runs_out_at_any_copy(library: Path, planned: Path, wanted: dict[int, str]) -> None:
    """A smaller plan, or one clear error where the plan was the smallest; never what the slot held before."""
    cases: list[Facts] = [
        {"spare_bytes": spare, "environment": {"MODE": "random", "FAIL_COPY": number}}
        for spare in (0, ROOMY)
        for number in (2, 30)
    ]
    for case, facts in zip(cases, ran(library, planned, cases), strict=True):
        if "error" in facts:
            assert (facts["error"], case["spare_bytes"]) == ("OutOfDeviceMemory", 0), case
        else:
            assert facts["loras"] == [wanted[1]], case
        assert facts["problems"] == facts["live_bytes"] == facts["pinned_bytes"] == 0, case
        assert ("error" in facts) == (case["spare_bytes"] == 0), case


def lora_or_error(facts: Facts, case: Facts, lora: str, errors: set[str]) -> None:
    """The right LoRA, from the CPU if need be; or one error that says what to do, where the card was asked for by name.

    Nothing is left, unless the card is lost and takes nothing back.
    """
    lost = "FAIL_CALL" in case["environment"]
    assert facts["problems"] == facts["streams"] == facts["contexts"] == 0, case
    assert lost or facts["live_bytes"] == facts["pinned_bytes"] == 0, case
    if "error" in facts:
        assert not case.get("auto"), case
        assert facts["error"] in errors, facts
        assert "--backend cpu" in facts["message"] or "--sm" in facts["message"], facts
    else:
        assert {*facts["loras"]} == {lora}, case


def failing_allocations() -> list[Facts]:
    """Each allocation of a run, those of CUDA's context and of streams too; the last runs have no such one."""
    numbers = [{"MODE": "lazy", "FAIL_ALLOC": number} for number in range(1, 8)]
    return [{"auto": a, "spare_bytes": b, "environment": e} for a in (False, True) for b in (0, ROOMY) for e in numbers]


def failing_calls(numbers: Sequence[int]) -> list[Facts]:
    """From a call on the card is lost."""
    return [
        {"auto": auto, "environment": {"MODE": "random", "FAIL_CALL": n}} for auto in (False, True) for n in numbers
    ]


def test_memory_that_runs_out_at_any_allocation(library: Path, planned: Path, wanted: dict[int, str]) -> None:
    """A smaller plan, the CPU, or one clear error where the plan was the smallest."""
    cases = failing_allocations()
    outcomes = ran(library, planned, cases)
    for case, facts in zip(cases, outcomes, strict=True):
        lora_or_error(facts, case, wanted[1], {"OutOfDeviceMemory"})
    assert outcomes[0]["allocations"] < 7 <= max(facts["allocations"] for facts in outcomes)
    smaller = outcomes[7 + 4]
    assert smaller["budget_bytes"] > smaller["vram"]["planned_peak_bytes"]
    assert {facts["backend"] for facts in outcomes[14:]} == {"cpu", "tensorrt"}


LOST = {"DeviceFailed", "BackendUnavailable"}


def test_a_card_that_is_lost_at_any_call(library: Path, planned: Path, wanted: dict[int, str]) -> None:
    """Every call from then on fails, those that give things back too: one clear error or the CPU, and never a LoRA."""
    cases = failing_calls([1, 2, *range(3, 40, 6), *range(40, 400, 53)])
    recorded: Facts = {"passes": [1, 1, 1], "spare_bytes": ROOMY}
    cases += [recorded | {"environment": {"FAIL_CALL": number}} for number in range(260, 500, 23)]
    outcomes = ran(library, planned, cases)
    for case, facts in zip(cases, outcomes, strict=True):
        lora_or_error(facts, case, wanted[1], LOST)
        if "error" in facts:
            assert "CUDA_ERROR_ILLEGAL_ADDRESS" in facts["message"] or "finds no GPU" in facts["message"], case
        elif facts["backend"] != "cpu":  # it was lost while things were given back
            assert facts["calls"] >= case["environment"]["FAIL_CALL"] or facts["problems"] == 0, case
    assert {facts.get("backend") for facts in outcomes} == {None, "cpu"}


@pytest.mark.cuda
def test_a_card_that_is_lost_at_each_call(library: Path, planned: Path, wanted: dict[int, str]) -> None:
    """All of them; minutes."""
    cases = failing_calls(range(1, 400))
    for case, facts in zip(cases, ran(library, planned, cases), strict=True):
        lora_or_error(facts, case, wanted[1], LOST)


THREE = {"BYTES": "100000000,4000000000,4000000000", "OTHERS": "0,3000000000,0"}


def test_one_of_several_cards(library: Path, planned: Path, wanted: dict[int, str]) -> None:
    """Every byte and every piece of work is on that card, or the error names those that there are."""
    rows = [
        (None, None, "stand-in 2"),  # the most free memory, though not the first and no larger than another
        ("1", None, "stand-in 1"),
        ("stand-in 0", None, "stand-in 0"),
        (None, "1", "stand-in 1"),
        ("0", "2,1", "stand-in 2"),
        ("3", None, "BackendUnavailable"),
        ("2", "0,1", "BackendUnavailable"),
    ]
    cases: list[Facts] = [
        {
            "device": device,
            "spare_bytes": 200_000_000,
            "environment": THREE | ({"CUDA_VISIBLE_DEVICES": visible} if visible else {}),
        }
        for device, visible, _ in rows
    ]
    for (device, visible, card), facts in zip(rows, ran(library, planned, cases), strict=True):
        if "error" in facts:
            assert facts["error"] == card
            assert facts["error"] != "BackendUnavailable" or "i2l doctor lists them" in facts["message"]
        else:
            assert facts["card"] == card
            assert facts["loras"] == [wanted[1]]
            assert len(facts["chosen"]) == (device is visible is None)
        assert facts["problems"] == facts["live_bytes"] == 0


def test_a_slice_of_a_card_has_its_own_memory(library: Path, planned: Path, wanted: dict[int, str]) -> None:
    """MIG: CUDA shows a slice as a card; the budget is of what the slice has free, not of the card's.

    And of what CUDA's context has taken already, as that is counted, too.
    """
    seen = {"BYTES": "100000000,7000000000", "CUDA_VISIBLE_DEVICES": "MIG-1"}
    (facts,) = ran(library, planned, [{"margin_bytes": 1000, "environment": seen}])
    assert facts["card"] == "stand-in 1 MIG 1g"
    assert facts["vram"]["budget_bytes"] == 7_000_000_000 // 7 - 1000 + RESERVED_BYTES
    assert facts["loras"] == [wanted[1]]


def test_another_program_takes_memory_at_any_call(library: Path, planned: Path, wanted: dict[int, str]) -> None:
    """Between looking and allocating, too: a smaller plan, or none. Under Windows that fails not, it crawls: so nothing
    is asked for that is not free."""
    least, roomy = (facts["peak_bytes"] for facts in ran(library, planned, [{}, {"spare_bytes": ROOMY}]))
    numbers = [1, 4, 11, 21, 26, *range(27, 30), 36]
    cases: list[Facts] = [
        {
            "auto": number % 2 == 0,
            "spare_bytes": ROOMY,
            "environment": {"BYTES": 1 << 31, "OTHERS": (1 << 31) - free, "OTHERS_FROM": number, "SPILLS": spills},
        }
        for free, spills in (((least + roomy) // 2, 1), (least // 2, 0))
        for number in numbers
    ]
    outcomes = ran(library, planned, cases)
    for case, facts in zip(cases, outcomes, strict=True):
        lora_or_error(facts, case, wanted[1], {"OutOfDeviceMemory", "BudgetTooSmall"})
    enough = outcomes[: len(numbers)]
    assert least <= enough[0]["peak_bytes"] < roomy
    # While engines open, what others take cannot be told from what the engines took.
    assert {facts.get("backend") for n, facts in zip(numbers, enough, strict=True) if n not in {11, 21}} == {"tensorrt"}
    assert sum(facts["spilled_bytes"] > 0 for facts in enough) == 1  # what was free when it looked, and then not


def test_few_buffers_may_be_pinned(library: Path, planned: Path, wanted: dict[int, str]) -> None:
    """WSL caps what may be pinned: fewer buffers, or none, and the same LoRA."""
    piece = 16 << 10
    cases: list[Facts] = [{"environment": {"MODE": "lazy", "PINNABLE": allowed * piece}} for allowed in (0, 1, 70, 300)]
    for allowed, facts in enumerate(ran(library, planned, cases)):
        assert facts["loras"] == [wanted[1]]
        assert facts["problems"] == facts["live_bytes"] == facts["pinned_bytes"] == 0
        assert (facts["pageable_copies"] > 0) == (allowed < 2)  # one buffer for chunks, one for values
