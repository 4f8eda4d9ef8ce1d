"""Which chunks stay: against trying every subset, and at full size from the specs."""

from collections.abc import Mapping, Sequence
from itertools import pairwise, product

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from i2l.engines.device.device import aligned
from i2l.engines.device.predict import graph_memory
from i2l.engines.device.residency import GraphMemory, Residency, estimated_memory, plan_residency, spread
from i2l.engines.directory.manifest import Chunk
from i2l.errors import BudgetTooSmall
from i2l.export.packs.planning import plan_pack, planned_model
from i2l.export.precisions.choosing import precision_for
from i2l.machine.wording import GIB
from i2l.specs import FAMILIES, PRESETS, Family

Chunks = dict[Family, tuple[Chunk, ...]]


def chunk_row(sizes: Sequence[int]) -> tuple[Chunk, ...]:
    return tuple(Chunk(index << 20, size, ()) for index, size in enumerate(sizes))


sizes_of_models = st.fixed_dictionaries(
    {family: st.lists(st.integers(1, 4000), min_size=1, max_size=3) for family in FAMILIES}
)
memories = st.dictionaries(
    st.sampled_from("abcd"), st.builds(GraphMemory, *[st.integers(0, 5000)] * 3), min_size=1, max_size=4
)


def least_by_trying(chunks: Chunks, graphs: Mapping[str, GraphMemory], slots: int) -> int:
    """The smallest budget over all subsets of resident chunks."""
    sizes = [aligned(chunk.nbytes) for row in chunks.values() for chunk in row]
    costs = []
    for stays in product([False, True], repeat=len(sizes)):
        passing = [size for size, stay in zip(sizes, stays, strict=True) if not stay]
        kept = sum(size for size, stay in zip(sizes, stays, strict=True) if stay)
        costs.append(kept + min(slots, len(passing)) * max(passing, default=0))
    shared = max(m.activation_bytes for m in graphs.values()) + max(m.value_bytes for m in graphs.values())
    return min(costs) + shared + sum(m.context_bytes for m in graphs.values())


@settings(max_examples=150, deadline=None)
@given(sizes_of_models, memories, st.integers(1, 4), st.integers(0, 40000))
def test_the_smallest_budget_is_the_smallest_of_all_subsets(
    sizes: dict[Family, list[int]], graphs: dict[str, GraphMemory], slots: int, spare: int
) -> None:
    chunks: Chunks = {family: chunk_row(row) for family, row in sizes.items()}
    least = least_by_trying(chunks, graphs, slots)
    with pytest.raises(BudgetTooSmall) as caught:
        plan_residency(chunks, graphs, least - 1, slots=slots, reserved_bytes=0)
    assert caught.value.needed_bytes == least
    plan = plan_residency(chunks, graphs, least + spare, slots=slots, reserved_bytes=0)
    check(plan, chunks, slots)


def check(plan: Residency, chunks: Chunks, slots: int) -> None:
    """Every promise of a plan, counted again from its resident set."""
    stays = [aligned(row[i].nbytes) for family, row in chunks.items() for i in plan.resident[family]]
    passing = [c for f, row in chunks.items() for i, c in enumerate(row) if i not in plan.resident[f]]
    assert plan.peak_bytes == sum(plan.parts.values()) <= plan.budget_bytes
    assert plan.resident_bytes == sum(stays)
    assert plan.streamed_bytes == sum(chunk.nbytes for chunk in passing)
    assert plan.slots == min(slots, len(passing))
    assert plan.slot_bytes == max((aligned(chunk.nbytes) for chunk in passing), default=0)
    left = plan.budget_bytes - plan.peak_bytes
    for chunk in passing:  # nothing that would still fit is streamed
        others = [aligned(other.nbytes) for other in passing if other is not chunk]
        slot_bytes = min(slots, len(others)) * max(others, default=0)
        assert aligned(chunk.nbytes) + slot_bytes > left + plan.slots * plan.slot_bytes


@given(st.integers(0, 200), st.integers(0, 200))
def test_every_beginning_of_a_spread_is_even(count: int, taken: int) -> None:
    order = spread(count)
    assert sorted(order) == list(range(count))
    kept = sorted(order[:taken])
    if len(kept) > 1:
        gaps = [b - a for a, b in pairwise([*kept, count])]
        assert max(gaps[:-1]) <= 2 * min(gaps[:-1]) or max(gaps) <= 2


def test_the_first_chunks_stay_first_then_the_adapter() -> None:
    chunks: Chunks = {family: chunk_row([1024] * 8) for family in FAMILIES}
    graphs = {"graph": GraphMemory(0, 0, 0)}
    plan = plan_residency(chunks, graphs, 1024 * (2 + 3 + 4), reserved_bytes=0)
    assert plan.resident == {"siglip2": (0,), "dinov3": (0,), "adapter": (0, 1, 2, 4, 6)}


# --- full size, without weights ----------------------------------------------------------------------------------


@pytest.fixture(scope="module", params=["fp8", "int8", "bf16"])
def full(request: pytest.FixtureRequest) -> Chunks:
    return {spec.family: plan_pack(spec, precision_for(request.param, spec), 1).chunks for spec in PRESETS["full"]}


def test_int8_counts_its_16_bit_copies() -> None:
    models = {spec.family: planned_model(spec, "int8") for spec in PRESETS["full"]}
    block = graph_memory(models, 1)["dinov3.block"].activation_bytes
    plain = estimated_memory(PRESETS["full"].dinov3, 1)["dinov3.block"].activation_bytes
    assert block - plain == 2 * (4 * 4096 * 4096 + 3 * 4096 * 8192)
    plan = plan_residency({f: m.chunks for f, m in models.items()}, graph_memory(models, 8), 2 * GIB)
    assert plan.peak_bytes <= 2 * GIB


def full_graphs(images: int) -> dict[str, GraphMemory]:
    return {name: memory for spec in PRESETS["full"] for name, memory in estimated_memory(spec, images).items()}


@pytest.mark.parametrize("images", [1, 8])
def test_two_gibibytes_are_enough_at_full_size(full: Chunks, images: int) -> None:
    plan = plan_residency(full, full_graphs(images), 2 * GIB)
    check(plan, full, 2)
    assert all(0 in indices for indices in plan.resident.values())


def test_more_budget_streams_less_until_everything_stays(full: Chunks) -> None:
    plans = [plan_residency(full, full_graphs(1), gib * GIB) for gib in (2, 4, 6, 10, 14, 24)]
    streamed = [plan.streamed_bytes for plan in plans]
    assert all(a > b or a == b == 0 for a, b in pairwise(streamed))
    assert (plans[-1].slots, streamed[-1]) == (0, 0)
    for plan in plans[:-1]:
        left = plan.budget_bytes - plan.peak_bytes
        assert plan.streamed_bytes == 0 or left < plan.slot_bytes


def test_the_error_says_what_to_type(full: Chunks) -> None:
    with pytest.raises(BudgetTooSmall) as caught:
        plan_residency(full, full_graphs(1), GIB // 4)
    mebibytes = int(str(caught.value).split("--vram-budget ")[1].split("MiB")[0])
    assert plan_residency(full, full_graphs(1), mebibytes << 20).peak_bytes <= mebibytes << 20
