"""The cuda backend on onnxruntime's real CUDA provider, over stand-ins for NVIDIA's libraries: ``make test-cuda``.

onnxruntime-gpu cannot be installed beside onnxruntime, so each case is a process of another environment's Python. No
kernel runs: results are noise. Seen is what lies on the card, what is copied when, and where each node went.
"""

import json
import os
import shutil
import subprocess
from collections import Counter
from collections.abc import Callable, Iterable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from hollow import make_hollow
from standin_libraries import compile_libraries

from conftest import MakeEngines
from i2l.engines.device.pinned.host_cache import RING_BYTES
from i2l.export.backends.cuda import build_cuda_graphs
from i2l.machine.wording import format_bytes
from i2l.specs import PRESETS

HERE = Path(__file__).parent
ROOT = HERE.parents[2]
GIB = 1 << 30
GRAPH_BYTES = 20 << 20
TENTH = 10
"""The plan may leave so small a part of a budget unused."""
ORDERS = ([1, 4], [4, 2, 3, 1], [2, 1, 4, 3])
NOISE = {"I2L_STANDIN_HOLLOW": "1", "I2L_STANDIN_BYTES": str(24 * GIB), "I2L_STANDIN_PINNABLE": str(GIB)}
"""A large card without bytes; of the host, whose bytes are real, only the ring and a few chunks are pinned."""
ABORTED = -6
"""onnxruntime ends the process where the card is lost just as it frees pinned memory, in a destructor."""
Facts = dict[str, Any]
Run = Callable[..., Facts]
RunAll = Callable[..., list[Facts]]
pytestmark = pytest.mark.cuda


@pytest.fixture(scope="module")
def run_all(engines: MakeEngines, tmp_path_factory: pytest.TempPathFactory) -> RunAll:
    """``run_all(preset, precision, cases) -> facts`` of each, in a process of its own.

    ``whole`` is tiny with its weights and the CPU's graphs, which the other presets lack.
    """
    home = ROOT / ".cuda"
    (packages,) = home.glob("lib/python3.*/site-packages")
    libraries = tmp_path_factory.mktemp("libraries")
    (headers,) = home.glob("headers/nvidia/cu*/include")
    compile_libraries(packages, headers, libraries)

    @cache
    def made(preset: str, precision: str) -> Path:
        directory = tmp_path_factory.mktemp(f"{preset}-{precision}")
        if preset == "whole":
            shutil.copytree(engines("tiny", precision), directory, dirs_exist_ok=True)
            build_cuda_graphs(directory)
        else:
            make_hollow(directory, preset, precision)
        return directory

    def run_cases(
        preset: str, precision: str, cases: list[Facts], environment: dict[str, str] | None = None
    ) -> list[Facts]:
        command = [str(home / "bin" / "python"), str(HERE / "provider_run.py")]
        own = {"LD_LIBRARY_PATH": str(libraries), "PYTHONPATH": str(ROOT / ".typecheck"), "OMP_NUM_THREADS": "1"}
        result = subprocess.run(
            [*command, str(made(preset, precision)), json.dumps(cases)],
            env=os.environ | own | (environment or {}), capture_output=True, text=True, check=False, timeout=900,
        )  # fmt: skip
        assert result.returncode == 0, result.stderr[-3000:]
        for noise in ("Traceback", "No registered plugin"):
            assert noise not in result.stderr, result.stderr[-3000:]
        found: list[Facts] = [json.loads(line) for line in result.stdout.splitlines()]
        ends = Counter(facts["ended"] for facts in found)
        aborts = result.stderr.count(
            "terminate called after throwing an instance of 'onnxruntime::OnnxRuntimeException'"
        )
        assert aborts == result.stderr.count("expr=cudaFreeHost(p); \n\n") == ends[ABORTED] <= len(cases) // 20, ends
        assert ends.keys() <= {0, ABORTED}, ends  # -14: it hung
        return found

    return run_cases


@pytest.fixture(scope="module")
def run(run_all: RunAll) -> Run:
    """``run(preset, precision, passes=...) -> facts`` of one case."""

    def run_case(preset: str, precision: str, environment: dict[str, str] | None = None, **case: Any) -> Facts:
        (facts,) = run_all(preset, precision, [case], environment)
        return facts

    return run_case


@pytest.mark.parametrize(
    ("preset", "precision"), [("tiny", "int8"), ("tiny", "fp8"), ("tiny", "bf16"), ("small", "int8"), ("small", "fp8")]
)
def test_everything_computes_on_the_card(run: Run, preset: str, precision: str) -> None:
    """But shapes: those are numbers for the host."""
    facts = run(preset, precision, passes=[1], spare_bytes=GIB, placement=True)
    assert "CUDAExecutionProvider" in facts["providers"]
    operators = {line.split()[1] for line in facts["elsewhere"]}
    assert operators <= {"Concat", "Shape", "Gather", "Unsqueeze"}, facts["elsewhere"]
    assert len(facts["elsewhere"]) <= 5


@pytest.mark.parametrize(("preset", "order"), [*[("tiny", order) for order in ORDERS], ("small", ORDERS[1])])
def test_memory_is_the_plan_s_in_every_order_of_passes(run: Run, preset: str, order: list[int]) -> None:
    """At the least budget and with all resident: live bytes never move, and all of them are given back.

    Opening takes no more of the card than the first estimate, where the budget would leave a gibibyte.
    """
    for spare in (0, GIB):
        facts = run(preset, "int8", passes=order, spare_bytes=spare)
        planned = facts["vram"]["planned_peak_bytes"] - facts["parts"]["reserved"]
        assert {row["live_bytes"] for row in facts["passes"]} == {planned}
        assert facts["after"]["peak_bytes"] + facts["parts"]["reserved"] <= facts["budget_bytes"]
        assert facts["after"]["live_bytes"] == facts["after"]["pinned_bytes"] == facts["after"]["problems"] == 0
        assert facts["open"]["peak_bytes"] < GIB // 2


@pytest.mark.parametrize("precision", ["int8", "fp8", "bf16"])
def test_full_size_keeps_and_uses_its_budget(run: Run, precision: str) -> None:
    """4 GiB; only chunks and what goes in and out is copied, from pinned memory, once models that stay are recorded."""
    facts = run("full", precision, NOISE, passes=[4, 1, 1], budget_bytes=4 * GIB)
    reserved = facts["parts"]["reserved"]
    assert facts["after"]["peak_bytes"] + reserved <= 4 * GIB
    live = {row["live_bytes"] for row in facts["passes"]}
    assert len(live) == 1
    unused = 4 * GIB - max(live) - reserved
    assert unused <= 4 * GIB // TENTH, format_bytes(unused)
    assert facts["after"]["problems"] == facts["after"]["live_bytes"] == 0
    last = facts["passes"][-1]
    assert last["pageable_copies"] == 0
    assert last["uploaded_bytes"] == facts["streamed_bytes"] + values_of_an_image()
    came = last["copied_bytes"] - last["uploaded_bytes"]
    assert 0 < came < 64 << 20, format_bytes(came)  # embeddings, 40 MB of factors


def values_of_an_image() -> int:
    """Bytes of its pixels and its embedding at full size: all that the host sends beside weights."""
    spec = PRESETS["full"]
    pixels = sum(3 * encoder.image_size**2 for encoder in (spec.siglip2, spec.dinov3))
    return 4 * (pixels + spec.adapter.embedding)


@pytest.mark.parametrize("precision", ["int8", "fp8"])
def test_an_image_is_three_launches_where_all_weights_stay(run: Run, precision: str) -> None:
    """What comes from the host is the pixels and the embedding; onnxruntime itself is not asked at all.

    The card's memory is the plan's and that of the graphs; the host's pinned one the ring's and that of results.
    """
    card = NOISE | {"I2L_STANDIN_BYTES": str(48 * GIB), "I2L_STANDIN_GRAPH_BYTES": str(GRAPH_BYTES)}
    facts = run("full", precision, card, passes=[4, 4, 1, 1, 4, 1], budget_bytes=40 * GIB)
    last = {row["images"]: row for row in facts["passes"]}
    for images, row in last.items():
        assert (row["launches"], row["graph_launches"], row["pageable_copies"]) == (0, 3, 0)
        assert row["uploaded_bytes"] == images * values_of_an_image()
        assert row["calls"] < 60
    assert facts["passes"][0]["graph_launches"] == 0 < facts["passes"][0]["launches"]
    taken = [row["live_bytes"] - facts["open"]["live_bytes"] for row in facts["passes"]]
    assert taken == [n * GRAPH_BYTES for n in (0, 3, 6, 6, 6, 6)]
    assert facts["vram"]["graphs_bytes"] == 6 * GRAPH_BYTES
    assert 0.8 * facts["values_bytes"] < facts["after"]["pinned_peak_bytes"] - RING_BYTES <= facts["values_bytes"]
    assert facts["after"]["problems"] == facts["after"]["live_bytes"] == facts["after"]["pinned_bytes"] == 0


@pytest.mark.parametrize("function", ["cuMemcpyHtoDAsync", "cuMemcpyAsync"])
def test_a_pass_that_copies_from_the_host_is_not_recorded(run: Run, function: str) -> None:
    """Nobody promises that the bytes are still there when a graph copies them again."""
    facts = run("tiny", "int8", passes=[1, 1, 1], spare_bytes=GIB, copies_from_host=function)
    assert [row["graph_launches"] for row in facts["passes"]] == [0, 0, 0]
    assert facts["after"]["problems"] == facts["after"]["pinned_bytes"] == 0


def test_sessions_of_others_take_their_memory_from_the_card(run: Run) -> None:
    """Our arena is onnxruntime's shared allocator only while our sessions open."""
    facts = run("tiny", "int8", passes=[1], stranger=True)
    assert facts["lent_bytes"] == 0 < facts["stranger_bytes"]
    assert facts["after"]["problems"] == 0


@pytest.mark.parametrize(("precision", "least_mib"), [("int8", 1186), ("fp8", 1208), ("bf16", 1443)])
def test_the_least_budget_is_what_readme_says(run: Run, precision: str, least_mib: int) -> None:
    """It opens there; what the error names where there is less is enough, too."""
    facts = run("full", precision, NOISE, passes=[], budget_bytes=least_mib << 20)
    assert facts["least_bytes"] <= least_mib << 20 < facts["least_bytes"] + (2 << 20)
    assert str(least_mib) in (ROOT / "docs" / "gpu.md").read_text()
    (row,) = (line for line in (ROOT / "README.md").read_text().splitlines() if line.startswith("| `cuda` | 1,"))
    assert f"{least_mib:,} MiB ({precision})" in row
    small = run("full", precision, NOISE, passes=[], budget_bytes=(least_mib - 200) << 20)
    assert small["error"] == "BudgetTooSmall"
    assert small["after"]["live_bytes"] == 0


def test_the_libraries_are_the_stand_in_s(run: Run) -> None:
    """Whoever looks at these results must not take them for a card's."""
    assert run("tiny", "int8", passes=[])["card"].startswith("stand-in")


def failing(name: str, numbers: Iterable[int], budgets: Iterable[int], backends: Iterable[str]) -> list[Facts]:
    """A case for each."""
    return [
        {"passes": [1], "budget_bytes": budget, "backend": backend, "environment": {name: number}}
        for backend in backends
        for budget in budgets
        for number in numbers
    ]


@pytest.fixture(scope="module")
def budgets(run: Run) -> tuple[int, int]:
    """The least of ``whole``, and one in which all weights stay."""
    least = run("whole", "int8", passes=[])["budget_bytes"]
    return least, least + GIB


def lora_or_error(facts: Facts, case: Facts, cpus: str, errors: set[str]) -> None:
    """From the card, with ``auto`` from the CPU; by name one error, short, that says what to do. Nothing is left."""
    if facts["ended"] == ABORTED:
        return
    after, lost = facts["after"], "FAIL_CALL" in case["environment"]
    assert after["problems"] == 0, case
    assert lost or after["live_bytes"] == after["pinned_bytes"] == facts.get("held_bytes", 0) == 0, case
    if "error" in facts:
        assert case["backend"] == "cuda", (case, facts)
        assert facts["error"] in errors, facts
        assert "--backend cpu" in facts["message"], facts
        assert len(facts["message"]) < 300, facts
        assert "hostname" not in facts["message"], facts
    else:
        assert facts["backend"] in {"cuda", "cpu"}
        assert facts["backend"] == "cuda" or facts["passes"][0]["factors"] == cpus, case


@pytest.fixture(scope="module")
def cpus(run: Run) -> str:
    """The CPU's LoRA, by the same onnxruntime."""
    return str(run("whole", "int8", passes=[1], backend="cpu", budget_bytes=GIB)["passes"][0]["factors"])


def test_memory_that_runs_out_at_any_allocation(run_all: RunAll, budgets: tuple[int, int], cpus: str) -> None:
    """Of ours, of the provider's, of cuBLAS' and of CUDA's runtime: a smaller plan, the CPU, or one clear error."""
    cases = failing("FAIL_ALLOC", range(1, 25), budgets, ("cuda", "auto"))
    outcomes = run_all("whole", "int8", cases)
    for case, facts in zip(cases, outcomes, strict=True):
        lora_or_error(facts, case, cpus, {"OutOfDeviceMemory"})
    assert all(facts["after"]["allocations"] < 24 for facts in outcomes)
    assert {facts.get("backend") for facts in outcomes} == {"cpu", "cuda", None}


@pytest.mark.parametrize(
    ("backend", "numbers"), [("auto", range(1, 201)), ("cuda", (*range(1, 200, 9), *range(200, 5200, 500)))]
)
def test_a_card_that_is_lost_at_any_call(
    run_all: RunAll, budgets: tuple[int, int], cpus: str, backend: str, numbers: range
) -> None:
    """While sessions open, warm up and run, and while all is given back."""
    cases = failing("FAIL_CALL", numbers, budgets[:1], (backend,))
    for case, facts in zip(cases, run_all("whole", "int8", cases), strict=True):
        lora_or_error(facts, case, cpus, {"DeviceFailed", "BackendUnavailable"})


def test_hopper_keeps_more(run: Run) -> None:
    """cuBLAS' workspace there is four times as large: it is counted, and estimated before."""
    facts = run("full", "int8", NOISE | {"I2L_STANDIN_SM": "90"}, passes=[])
    assert facts["parts"]["contexts"] >= 8 * (32 << 20)
    assert facts["least_bytes"] <= 1377 << 20 < facts["least_bytes"] + (2 << 20)
    assert facts["after"]["peak_bytes"] + facts["parts"]["reserved"] <= facts["budget_bytes"]
