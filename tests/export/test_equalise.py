"""Equalisation: the same function with even channels."""

import json
import re
from collections.abc import Callable, Iterator, Mapping
from functools import cache
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import Tensor

from i2l.export.checkpoints.finding import find_checkpoints
from i2l.export.checkpoints.recognise import SPEC_KEY, Checkpoint, recognise
from i2l.export.checkpoints.shapes import tensor_shapes
from i2l.export.checkpoints.weights import Matrix, Step, graph_weights, plan_steps
from i2l.export.graphs.modules import graph_modules
from i2l.export.packs.equalise import FEEDS, WIDEST, plan_gains
from i2l.export.packs.packs import prepared_weights
from i2l.export.packs.stack import Stack
from i2l.export.precisions import base as precision
from i2l.export.precisions.floats import Float
from i2l.export.precisions.storing import stored_tensors
from i2l.specs import EncoderSpec, Family, spec_to_dict

Models = Callable[..., Path]
Find = Callable[[str, bool], Mapping[Family, Checkpoint]]

PLAIN, EQUALISED = Float("F32"), Float("F32", equalised=True)
TOLERANCE = 1e-5
"""Gains round every weight and every sum anew: a few times 6e-8; 5e-7 observed. A gain that is not undone changes a
token by percents."""
FEEDING = {graph: {feed.matrix for feed in feeds} for graph, feeds in FEEDS.items()}
"""``graph -> matrices whose inputs are equalised``"""


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    """torch's threads wait for each other after every operator: on a busy machine that took seven times as long."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def family_of(graph: str) -> Family:
    return "siglip2" if graph.startswith("siglip2.") else "dinov3"


def step_of(checkpoint: Checkpoint, graph: str) -> Step:
    """The last step of a graph: any block will do."""
    return [step for group in plan_steps(checkpoint.spec) for step in group if step.graph == graph][-1]


def step_weights(checkpoint: Checkpoint, step: Step, form: Float) -> dict[str, Tensor]:
    """A step's weights as a pack would hold them."""
    weights = graph_weights(checkpoint.spec)[step.graph]
    pieces: dict[str, list[Tensor]] = {}
    for name, piece in prepared_weights(load_file(checkpoint.path), step, weights, form):
        pieces.setdefault(name, []).append(piece.reshape(-1))
    return {name: torch.cat(pieces[name]).view(shape) for name, _, shape in stored_tensors(weights, form)}


def residual_stream(spec: EncoderSpec) -> Tensor:
    """Two images of ordinary tokens with a massive one among them."""
    x = torch.randn(2, spec.tokens, spec.hidden, generator=torch.Generator().manual_seed(0)) / 2
    x[:, 1, :3] += 500
    return x


@torch.inference_mode()
def run_step(checkpoint: Checkpoint, graph: str, form: Float) -> tuple[Tensor, dict[str, Tensor], dict[str, Tensor]]:
    """``(output, matrix -> its input [tokens, channels], weights)`` of a step."""
    spec = checkpoint.spec
    assert isinstance(spec, EncoderSpec)
    weights = step_weights(checkpoint, step_of(checkpoint, graph), form)
    inputs: dict[str, Tensor] = {}
    multiply = precision.FloatLinear.forward

    def spy(self: precision.FloatLinear, x: Tensor, given_weights: precision.Weights) -> Tensor:
        inputs[self.name] = x
        return multiply(self, x, given_weights)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(precision.FloatLinear, "forward", spy)
        output = graph_modules(spec, form)[graph](residual_stream(spec), weights)
    return output, inputs, weights


def largest_difference(found: Tensor, wanted: Tensor) -> float:
    """Of any token, relative to that token."""
    rows, exact = found.double().view(-1, found.shape[-1]), wanted.double().view(-1, wanted.shape[-1])
    return float(((rows - exact).norm(dim=1) / exact.norm(dim=1)).max())


@pytest.fixture(scope="module")
def checkpoints(models: Models) -> Find:
    @cache
    def find(preset: str, outliers: bool) -> Mapping[Family, Checkpoint]:
        return find_checkpoints(models(preset, outliers=True) if outliers else models(preset))

    return find


CASES = [(preset, graph) for preset in ("tiny", "small") for graph in FEEDS]
"""``small`` is wide enough for sizes to be taken from samples."""


@pytest.mark.parametrize("outliers", [False, True])
@pytest.mark.parametrize(("preset", "graph"), CASES)
def test_the_function_stays_the_same(checkpoints: Find, preset: str, graph: str, outliers: bool) -> None:
    checkpoint = checkpoints(preset, outliers)[family_of(graph)]
    wanted, _, _ = run_step(checkpoint, graph, PLAIN)
    found, _, _ = run_step(checkpoint, graph, EQUALISED)
    assert largest_difference(found, wanted) < TOLERANCE


# --- even -------------------------------------------------------------------------------------------------------


def channel_ratio(inputs: Tensor) -> float:
    """The largest channel over the median one; a channel's size is its median over tokens, as a few may be massive."""
    sizes = inputs.abs().median(dim=0).values
    return float(sizes.max() / sizes.median())


def excess(inputs: Tensor, matrix: Tensor) -> float:
    """What a rotated eight-bit product loses to uneven channels, ``|m| |n| / sum(m n)``: 1 is the least (Schwarz)."""
    sizes, norms = inputs.abs().median(dim=0).values, matrix.norm(dim=0)
    return float(sizes.norm() * norms.norm() / (sizes @ norms))


BLOCKS = [
    (preset, graph, matrix)
    for preset, graph in CASES
    for matrix in sorted(FEEDING[graph])
    if graph.endswith(".block")  # the head has no outliers
]


@pytest.mark.parametrize(("preset", "graph", "matrix"), BLOCKS)
def test_outlier_channels_are_evened(checkpoints: Find, preset: str, graph: str, matrix: str) -> None:
    checkpoint = checkpoints(preset, True)[family_of(graph)]
    _, before, _ = run_step(checkpoint, graph, PLAIN)
    _, after, _ = run_step(checkpoint, graph, EQUALISED)
    assert channel_ratio(before[matrix]) > 50  # else there is nothing to even
    assert channel_ratio(after[matrix]) < 5


@pytest.mark.parametrize(("preset", "graph", "matrix"), BLOCKS)
def test_the_error_bound_is_near_its_least(checkpoints: Find, preset: str, graph: str, matrix: str) -> None:
    checkpoint = checkpoints(preset, True)[family_of(graph)]
    _, before, plain = run_step(checkpoint, graph, PLAIN)
    _, after, equalised = run_step(checkpoint, graph, EQUALISED)
    assert excess(before[matrix], plain[f"{matrix}.weight"]) > 5
    # Sizes follow from the weights, not from data: attention evens tokens out a little differently in each channel.
    assert excess(after[matrix], equalised[f"{matrix}.weight"]) < 1.2


def test_the_gate_counts_for_the_size_of_a_gated_channel() -> None:
    generator = torch.Generator().manual_seed(0)
    gate, up, down = (torch.rand(6, generator=generator) + 0.1 for _ in range(3))
    signs = torch.randint(0, 2, (16, 8), generator=generator) * 2.0 - 1
    matrices = {
        "attention.qkv": Stack((torch.ones(24, 8),)),
        "attention.out": Stack((torch.ones(8, 8),)),
        "mlp.gate_up": Stack((signs[:6] * gate[:, None], signs[6:12] * up[:, None])),  # row sizes as given
        "mlp.down": Stack((signs[:8, :6] * down,)),  # column sizes as given, all rows alike
    }
    norms = {f"{norm}.{part}": torch.ones(8) for norm in ("norm1", "norm2") for part in ("weight", "bias")}
    gain = plan_gains("dinov3.block", matrices, norms).rows["mlp.gate_up"][6:]
    wanted = (down / (gate * up)).sqrt()
    torch.testing.assert_close(gain / gain[0], wanted / wanted[0], rtol=1e-5, atol=0)  # a few roundings


LEFT_ALONE = {
    "siglip2.block": {"mlp.down"},  # behind the GELU
    "siglip2.head": {"mlp.down", "attention.q"},  # the probe itself goes into the query
    "dinov3.block": set(),
}


@pytest.mark.parametrize("graph", FEEDS)
def test_matrices_that_nothing_feeds_linearly_are_left_alone(checkpoints: Find, graph: str) -> None:
    checkpoint = checkpoints("tiny", True)[family_of(graph)]
    _, _, plain = run_step(checkpoint, graph, PLAIN)
    _, _, equalised = run_step(checkpoint, graph, EQUALISED)
    matrices = [weight.name for weight in graph_weights(checkpoint.spec)[graph] if isinstance(weight, Matrix)]
    same = {name for name in matrices if torch.equal(equalised[f"{name}.weight"], plain[f"{name}.weight"])}
    assert same == LEFT_ALONE[graph]


def test_graphs_without_feeds_get_no_gains() -> None:
    gains = plan_gains("dinov3.head", {}, {"norm.weight": torch.ones(4), "norm.bias": torch.ones(4)})
    assert (gains.rows, gains.columns) == ({}, {})


# --- dead channels ----------------------------------------------------------------------------------------------

MINIATURES: dict[Family, EncoderSpec] = {
    "siglip2": EncoderSpec("siglip2", hidden=16, depth=1, heads=2, intermediate=24, image_size=8, patch=4),
    "dinov3": EncoderSpec("dinov3", hidden=16, depth=1, heads=2, intermediate=24, image_size=8, patch=4, registers=2),
}
NORMS = r"norm[12]?\.(weight|bias)$|layernorm\.(weight|bias)$"
READERS = r"([qkv]|gate|up)_proj\.weight$|in_proj_weight$|fc1\.weight$"
FEEDERS = r"(v|up)_proj\.(weight|bias)$|in_proj_(weight|bias)$"
DEAD: dict[str, tuple[str, Callable[[Tensor], object]]] = {
    "a few channels of every norm": (NORMS, lambda tensor: tensor[[0, 5]].zero_()),
    "most channels of every norm": (NORMS, lambda tensor: tensor[2:].zero_()),
    "every norm": (NORMS, lambda tensor: tensor.zero_()),
    "a few columns": (READERS, lambda tensor: tensor[:, [3, 4]].zero_()),
    "most columns": (READERS, lambda tensor: tensor[:, 2:].zero_()),
    "a few rows": (FEEDERS, lambda tensor: tensor[[1, -1]].zero_()),
    "most rows": (FEEDERS, lambda tensor: tensor[:-2].zero_()),
    "every row": (FEEDERS, lambda tensor: tensor.zero_()),
    "whole matrices": (READERS, lambda tensor: tensor.zero_()),
    "everything": (r"", lambda tensor: tensor.zero_()),
    "numbers next to zero": (NORMS, lambda tensor: tensor[::2].mul_(1e-30)),
}


@pytest.mark.parametrize("case", DEAD)
@pytest.mark.parametrize("graph", FEEDS)
def test_dead_channels_stay_finite_and_change_nothing(graph: str, case: str, tmp_path: Path) -> None:
    spec = MINIATURES[family_of(graph)]
    pattern, kill = DEAD[case]
    generator = torch.Generator().manual_seed(0)
    tensors = {name: torch.randn(shape, generator=generator) for name, shape in tensor_shapes(spec).items()}
    killed = [kill(tensor) for name, tensor in tensors.items() if re.search(pattern, name)]
    assert killed
    save_file(tensors, tmp_path / "model.safetensors", {SPEC_KEY: json.dumps(spec_to_dict(spec))})
    checkpoint = recognise(tmp_path / "model.safetensors")
    wanted, _, _ = run_step(checkpoint, graph, PLAIN)
    found, _, weights = run_step(checkpoint, graph, EQUALISED)
    assert all(tensor.isfinite().all() for tensor in weights.values())
    assert ((found - wanted).abs() <= TOLERANCE * wanted.norm(dim=-1, keepdim=True)).all()  # 0 <= 0 where all is dead


sizes = st.floats(1e-6, 1e6) | st.just(0.0)


@given(st.lists(sizes, min_size=8, max_size=8), st.lists(sizes, min_size=8, max_size=8), st.integers(0, 1 << 32))
@settings(deadline=None)
def test_gains_are_finite_and_undone(channels: list[float], columns: list[float], seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    shapes = {"attention.kv": (16, 8), "attention.out": (8, 8), "mlp.up": (12, 8)}
    matrices = {
        name: Stack((torch.randn(shape, generator=generator) * torch.tensor(columns),))
        for name, shape in shapes.items()
    }
    norms = {f"{name}.{part}": torch.tensor(channels) for name in ("norm", "norm2") for part in ("weight", "bias")}
    gains = plan_gains("siglip2.head", matrices, norms)
    for matrix, feeding in (
        ("attention.kv", gains.rows["norm"]),
        ("attention.out", gains.rows["attention.kv"][8:]),
        ("mlp.up", gains.rows["norm2"]),
    ):
        product = feeding * gains.columns[matrix]
        torch.testing.assert_close(product, torch.ones(8), rtol=1e-6, atol=0)  # nan and inf fail; one rounding
        assert 1 / WIDEST / 1.001 <= feeding.min() <= 1.001 * WIDEST  # within the band around the median, which is 1
    assert torch.equal(gains.rows["attention.kv"][:8], torch.ones(8))  # the keys are not fed on
