"""The table between checkpoints and graphs, and the layout of packs."""

import math
from collections import defaultdict
from collections.abc import Callable
from functools import cache
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from safetensors.torch import load_file

from i2l.engines.directory.tensorfile import PAD_PREFIX, PAGE, TENSOR_ALIGN
from i2l.export.checkpoints.finding import find_checkpoints
from i2l.export.checkpoints.shapes import tensor_shapes
from i2l.export.checkpoints.weights import Matrix, Step, graph_weights, plan_steps
from i2l.export.packs.planning import PackPlan, plan_pack
from i2l.export.packs.stack import Stack, every
from i2l.export.precisions.choosing import PRECISIONS, precision_for
from i2l.export.precisions.storing import stored_tensors
from i2l.specs import PRESETS, AdapterSpec, EncoderSpec, Spec

SPECS: dict[str, Spec] = {f"{name}-{spec.family}": spec for name, preset in PRESETS.items() for spec in preset}
ENCODERS = [case for case in SPECS if not case.endswith("adapter")]
ADAPTERS = [case for case in SPECS if case.endswith("adapter")]
UNUSED = {"embeddings.mask_token"}
"""DINOv3's token for masked training; no image has it."""


def encoder(case: str) -> EncoderSpec:
    spec = SPECS[case]
    assert isinstance(spec, EncoderSpec)
    return spec


def adapter(case: str) -> AdapterSpec:
    spec = SPECS[case]
    assert isinstance(spec, AdapterSpec)
    return spec


def steps(spec: Spec) -> list[Step]:
    return [step for group in plan_steps(spec) for step in group]


# --- weights ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", SPECS)
def test_every_row_of_a_checkpoint_is_used_once(case: str) -> None:
    spec = SPECS[case]
    uses: dict[str, NDArray[np.int64]] = {
        name: np.zeros(shape[0], np.int64) for name, shape in tensor_shapes(spec).items()
    }
    weights = graph_weights(spec)
    for step in steps(spec):
        for weight in weights[step.graph]:
            for source in (source.at(step.block) for source in weight.sources):
                rows = uses[source.key][source.start :]
                rows[: source.rows] += 1
                assert source.rows is None or len(rows) >= source.rows
    assert {name for name, rows in uses.items() if (rows != 1).any()} == UNUSED & uses.keys()
    assert not any(rows.any() for name, rows in uses.items() if name in UNUSED)


@pytest.mark.parametrize("case", SPECS)
def test_no_tensor_is_shared_by_two_steps(case: str) -> None:
    spec = SPECS[case]
    weights = graph_weights(spec)
    users = defaultdict(set)
    for step in steps(spec):
        for weight in weights[step.graph]:
            for source in weight.sources:
                users[source.at(step.block).key].add(step.name)
    assert [key for key, names in users.items() if len(names) > 1] == []


@pytest.mark.parametrize("case", SPECS)
def test_a_weight_holds_as_many_values_as_its_sources(case: str) -> None:
    spec = SPECS[case]
    shapes = tensor_shapes(spec)
    weights = graph_weights(spec)
    for step in steps(spec):
        for weight in weights[step.graph]:
            shape = (weight.out_features, weight.in_features) if isinstance(weight, Matrix) else weight.shape
            values = 0
            for source in (source.at(step.block) for source in weight.sources):
                rows = shapes[source.key][0] - source.start if source.rows is None else source.rows
                values += rows * math.prod(shapes[source.key][1:])
            assert values == math.prod(shape), (step.name, weight.name)


@pytest.mark.parametrize("case", SPECS)
def test_the_rows_of_a_matrix_come_from_matrices_of_its_width(case: str) -> None:
    spec = SPECS[case]
    shapes = tensor_shapes(spec)
    weights = graph_weights(spec)
    for step in steps(spec):
        for weight in weights[step.graph]:
            if isinstance(weight, Matrix):
                widths = {shapes[source.at(step.block).key][1:] for source in weight.sources}
                assert widths == {(weight.in_features,)}, (step.name, weight.name)


@pytest.mark.parametrize("case", SPECS)
def test_the_names_of_a_graph_are_unique(case: str) -> None:
    spec = SPECS[case]
    for name, weights in graph_weights(spec).items():
        for precision in PRECISIONS:
            names = [stored for stored, _, _ in stored_tensors(weights, precision_for(precision, spec))]
            assert len(set(names)) == len(names), name


# --- stacks -----------------------------------------------------------------------------------------------------

stacks = st.builds(
    lambda heights, columns: Stack(
        tuple(
            (torch.arange(rows * columns).view(rows, columns) + 64 * index).to(torch.float16)
            for index, rows in enumerate(heights)
        )
    ),
    st.lists(st.integers(1, 6), min_size=1, max_size=4),
    st.integers(1, 5) | st.sampled_from([32, 64, 160]),
)


def whole(stack: Stack) -> torch.Tensor:
    return torch.cat(stack.parts).float()


@given(stacks, st.data())
@settings(deadline=None)
def test_rows_of_a_stack(stack: Stack, data: st.DataObject) -> None:
    start = data.draw(st.integers(0, stack.shape[0] - 1))
    count = data.draw(st.integers(1, stack.shape[0] - start))
    torch.testing.assert_close(stack.rows(start, count), whole(stack)[start : start + count], rtol=0, atol=0)


@given(stacks, st.integers(1, 30))
@settings(deadline=None)
def test_samples_of_a_stack(stack: Stack, step: int) -> None:
    columns = every(torch.arange(stack.shape[1]), step)
    torch.testing.assert_close(stack.sampled_rows(step), whole(stack)[::step], rtol=0, atol=0)
    torch.testing.assert_close(stack.sampled_columns(step), whole(stack)[:, columns], rtol=0, atol=0)


@given(st.integers(1, 300) | st.integers(1, 300).map(lambda runs: 32 * runs), st.integers(1, 30))
@settings(deadline=None)
def test_a_sample_is_spread_over_the_whole(width: int, step: int) -> None:
    taken = every(torch.arange(width), step).tolist()
    assert taken == sorted(set(taken))
    longest_run = 32  # one cache line
    gaps = [following - at for at, following in pairwise([0, *taken, width])]
    assert len(taken) >= width / step
    assert max(gaps) <= step * longest_run


@pytest.mark.parametrize("case", ["tiny-siglip2", "tiny-dinov3", "tiny-adapter"])
def test_a_stack_is_the_tensors_of_the_library(case: str, models: Callable[..., Path]) -> None:
    checkpoint = find_checkpoints(models("tiny"))[SPECS[case].family]
    tensors = load_file(checkpoint.path)
    weights = graph_weights(checkpoint.spec)
    for step in steps(checkpoint.spec):
        for weight in weights[step.graph]:
            parts = []
            for source in (source.at(step.block) for source in weight.sources):
                rows = tensors[source.key][source.start :][: source.rows].float()
                parts.append(rows.reshape(len(rows), -1))
            shape = (weight.out_features, weight.in_features) if isinstance(weight, Matrix) else weight.shape
            stack = Stack.of(tensors, step, weight)
            wanted = torch.cat([part.reshape(-1, stack.shape[1]) for part in parts]).view(shape)
            torch.testing.assert_close(stack.rows(0, stack.shape[0]).view(shape), wanted, rtol=0, atol=0)


# --- steps ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", ENCODERS)
def test_an_encoder_runs_embed_blocks_head(case: str) -> None:
    spec = encoder(case)
    graphs = [f"{spec.family}.embed", *[f"{spec.family}.block"] * spec.depth, f"{spec.family}.head"]
    assert [step.graph for step in steps(spec)] == graphs


@pytest.mark.parametrize("case", ENCODERS)
def test_blocks_run_in_the_order_of_the_checkpoint(case: str) -> None:
    spec = encoder(case)
    blocks = steps(spec)[1:-1]
    assert [int(step.block) for step in blocks] == list(range(spec.depth))
    assert [int(step.name.rsplit(".", 1)[1]) for step in blocks] == list(range(spec.depth))


@pytest.mark.parametrize("case", ENCODERS)
def test_blocks_sort_by_name_as_they_run(case: str) -> None:
    names = [step.name for step in steps(encoder(case))[1:-1]]
    assert sorted(names) == names  # as a file manager shows the standalone graphs


@pytest.mark.parametrize("case", ADAPTERS)
def test_adapter_blocks_are_paired_as_published(case: str) -> None:
    spec = adapter(case)
    wanted = []
    components = (("layers", spec.layers), ("context_refiner", spec.refiners), ("noise_refiner", spec.refiners))
    for component, count in components:
        for index in range(count):  # first all attention blocks, then all feed-forward blocks
            wanted.append(("adapter.attention", f"{component}_lora.blocks.{index}"))
            wanted.append(("adapter.feed_forward", f"{component}_lora.blocks.{count + index}"))
    assert [(step.graph, step.block) for step in steps(spec)] == wanted


@pytest.mark.parametrize("case", SPECS)
def test_the_names_of_steps_are_unique_and_no_prefix_of_another(case: str) -> None:
    names = [f"{step.name}." for step in steps(SPECS[case])]
    assert not [(a, b) for a in names for b in names if a is not b and b.startswith(a)]


@pytest.mark.parametrize("case", SPECS)
def test_every_step_has_a_graph(case: str) -> None:
    spec = SPECS[case]
    assert {step.graph for step in steps(spec)} == graph_weights(spec).keys()


# --- packs ------------------------------------------------------------------------------------------------------


@cache
def plan(case: str, precision: str, blocks_per_chunk: int) -> PackPlan:
    spec = SPECS[case]
    return plan_pack(spec, precision_for(precision, spec), blocks_per_chunk)


plans = st.builds(plan, st.sampled_from(sorted(SPECS)), st.sampled_from(PRECISIONS), st.integers(1, 50))
some = settings(max_examples=40, deadline=None)  # the largest has 2000 tensors


@given(plans)
@some
def test_chunks_start_on_pages(planned: PackPlan) -> None:
    assert [chunk.offset % PAGE for chunk in planned.chunks] == [0] * len(planned.chunks)


@given(plans)
@some
def test_chunks_follow_each_other(planned: PackPlan) -> None:
    for chunk, following in pairwise(planned.chunks):
        assert 0 <= following.offset - (chunk.offset + chunk.nbytes) < PAGE


@given(plans)
@some
def test_chunks_cover_the_file_but_for_its_header(planned: PackPlan) -> None:
    last = planned.chunks[-1]
    assert planned.chunks[0].offset == len(planned.layout.header)
    assert last.offset + last.nbytes == planned.layout.nbytes


@given(plans)
@some
def test_every_tensor_lies_in_the_chunk_of_its_step(planned: PackPlan) -> None:
    regions = {
        f"{step.name}.": (chunk.offset, chunk.offset + chunk.nbytes) for chunk in planned.chunks for step in chunk.steps
    }
    rest = {name: info for name, info in planned.layout.tensors.items() if not name.startswith(PAD_PREFIX)}
    for prefix, (start, end) in regions.items():
        for name in [name for name in rest if name.startswith(prefix)]:
            info = rest.pop(name)
            assert start <= info.offset
            assert info.offset + info.nbytes <= end
    assert rest == {}


@given(plans)
@some
def test_chunks_hold_the_steps_in_the_order_of_running(planned: PackPlan) -> None:
    chunked = [(step.name, step.graph) for chunk in planned.chunks for step in chunk.steps]
    assert chunked == [(step.name, step.graph) for step in planned.steps]


@given(st.sampled_from(sorted(SPECS)), st.integers(1, 50))
@some
def test_blocks_are_chunked_by_the_number_given(case: str, blocks_per_chunk: int) -> None:
    spec = SPECS[case]
    sizes = [len(chunk.steps) for chunk in plan(case, "fp8", blocks_per_chunk).chunks]
    if isinstance(spec, EncoderSpec):
        first, *sizes, last = sizes
        assert (first, last) == (1, 1)  # embed and head stay alone
    per_block = 2 if isinstance(spec, AdapterSpec) else 1  # attention and feed-forward stay together
    blocks = sum(count for _, count in spec.components) if isinstance(spec, AdapterSpec) else spec.depth
    full, rest = divmod(blocks, blocks_per_chunk)
    assert sizes == [per_block * size for size in [*[blocks_per_chunk] * full, *([rest] if rest else [])]]


@given(plans)
@some
def test_tensors_are_aligned_for_the_gpu(planned: PackPlan) -> None:
    assert {info.offset % TENSOR_ALIGN for name, info in planned.layout.tensors.items() if name[0] != "."} == {0}
