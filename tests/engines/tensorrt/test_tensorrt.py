"""The tensorrt backend without a GPU: a played TensorRT over host memory (played_tensorrt.py).

Nothing here shows that TensorRT computes what it should. tests/engines/tensorrt/test_gpu.py does, where there is a GPU.
"""

import importlib
import importlib.util
import json
import logging
import shutil
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import played_tensorrt
import pytest
import torch
from click.testing import CliRunner
from hypothesis import given
from hypothesis import strategies as st
from played_tensorrt import Played, failing, own_graphs, write_plans

from conftest import MakeEngines, graphs_once, lora_of_one_batch, picture
from fake_device import HostDevice
from i2l.cli import main
from i2l.engines import backends
from i2l.engines.base import CardFacts
from i2l.engines.device import card as cuda_device
from i2l.engines.device import driver, which_card
from i2l.engines.device.device import Workspace
from i2l.engines.device.residency import CONTEXT_BYTES
from i2l.engines.device.tensor import DeviceTensor
from i2l.engines.directory.generations import FP8_FOLDER
from i2l.engines.directory.manifest import read_manifest
from i2l.engines.tensorrt import backend as tensorrt_backend
from i2l.engines.tensorrt.backend import TensorRTBackend
from i2l.engines.tensorrt.engine import PlanRuntime
from i2l.engines.tensorrt.layers import Products, products
from i2l.engines.tensorrt.library import build_plan, choose_flavour, find_flavour
from i2l.engines.tensorrt.plans import FACTS, FORM, plans_folder
from i2l.engines.tensorrt.runtime_cache import RuntimeCache
from i2l.errors import (
    BackendUnavailable,
    BudgetTooSmall,
    DeviceFailed,
    OutOfDeviceMemory,
    PlanMissing,
    PlanStale,
    ShapeMismatch,
)
from i2l.export.precisions.choosing import gpu_precision
from i2l.lora.lora import Lora
from i2l.runtime.passes import IMAGES_PER_PASS
from i2l.runtime.pipeline import Pipeline

PICTURES = [picture(90, 70, seed=1), picture(64, 64, seed=2)]
OOM = "[defaultAllocator.cpp::allocate::31] Error Code 1: Cuda Runtime (out of memory): 123456789 bytes"
ROOMY = 10_000_000
"""Bytes above the smallest budget with which all weights stay."""


@pytest.fixture(scope="module")
def planned(engines: MakeEngines, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Engines in float32 with the CPU's graphs as plans: then a device gives the CPU's LoRA bit for bit."""
    directory = tmp_path_factory.mktemp("planned") / "engines"
    shutil.copytree(engines("tiny", "fp32"), directory)
    write_plans(directory, own_graphs(directory))
    return directory


@pytest.fixture
def engines_dir(planned: Path, tmp_path: Path) -> Path:
    """A copy to change."""
    return Path(shutil.copytree(planned, tmp_path / "engines", ignore=shutil.ignore_patterns("*.jit")))


@pytest.fixture(scope="module")
def wanted(planned: Path) -> Lora:
    return lora_of_one_batch(planned, PICTURES)


Play = Callable[..., Played]


@pytest.fixture
def play(monkeypatch: pytest.MonkeyPatch) -> Play:
    """``play(sm=..., fail=..., scratch=..., rtx=...)``: a card with a TensorRT, for what is opened from now on."""

    def begin(*, sm: int = 89, card: str = "a played card", **options: Any) -> Played:
        device = HostDevice(1 << 30, seed=len(options))
        device.sm, device.name = sm, card
        played = Played(device, **options)
        for name in ("tensorrt_rtx", "tensorrt"):
            monkeypatch.setitem(sys.modules, name, played.module if name == played.name else None)
        monkeypatch.setattr(cuda_device, "CudaDevice", lambda **_: device)
        monkeypatch.setattr(driver, "without_driver", lambda _: None)
        monkeypatch.setattr(driver, "without_cuda_python", lambda _: None)
        monkeypatch.setattr(driver, "nvidia_cards", lambda libraries: (CardFacts(card, "1.0", libraries),))
        monkeypatch.setattr(tensorrt_backend, "current_sm", lambda *_: sm)
        return played

    return begin


def least_budget(directory: Path) -> int:
    with pytest.raises(BudgetTooSmall) as caught:
        Pipeline(directory, backend="tensorrt", vram_budget_bytes=1)
    return caught.value.needed_bytes


def open_with(directory: Path, spare_bytes: int) -> Pipeline:
    """Opened with so much more than the smallest budget."""
    return Pipeline(directory, backend="tensorrt", vram_budget_bytes=least_budget(directory) + spare_bytes)


def backend_of(pipeline: Pipeline) -> TensorRTBackend:
    assert isinstance(pipeline._open._backend, TensorRTBackend)
    return pipeline._open._backend


def rtx_configs(played: Played) -> list[played_tensorrt.Config]:
    return [config for config in played.configs if isinstance(config, played_tensorrt.Config)]


def assert_same(found: Lora, wanted: Lora) -> None:
    for module, factors in wanted.factors.items():
        for x, y in zip(found.factors[module], factors, strict=True):
            np.testing.assert_array_equal(x, y)


# --- the whole pipeline -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rtx", [True, False])
@pytest.mark.parametrize("spare_bytes", [0, 60_000, 400_000, ROOMY])
def test_plans_give_the_cpus_lora_bit_for_bit(
    engines_dir: Path, wanted: Lora, play: Play, spare_bytes: int, rtx: bool
) -> None:
    played = play(rtx=rtx)
    write_plans(engines_dir, own_graphs(engines_dir), played.name)
    with open_with(engines_dir, spare_bytes) as pipeline:
        assert pipeline.backend_name == "tensorrt"
        for _ in range(2):
            assert_same(pipeline.lora_from_images(PICTURES), wanted)
        plan = backend_of(pipeline).residency
        assert (plan.streamed_bytes == 0) == (spare_bytes == ROOMY)
        used = plan.peak_bytes - plan.context_bytes - plan.reserved_bytes
        assert played.device.peak_bytes == played.device.used_bytes == used
        assert plan.context_bytes == 8 * CONTEXT_BYTES
    assert played.device.used_bytes == 0
    assert all(config.strategy == "user managed" for config in played.configs)
    assert {config.dynamic_shapes_kernel_specialization_strategy for config in rtx_configs(played)} <= {"eager"}


def test_the_gpus_graphs_compute_what_the_checkpoint_does(engines: MakeEngines, tmp_path: Path, play: Play) -> None:
    """TensorRT's own graphs in float32: what is left is the weights' rounding."""
    directory = Path(shutil.copytree(engines("tiny", "int8"), tmp_path / "engines"))
    graphs: dict[str, bytes] = {}
    for model in read_manifest(directory).models.values():
        kept: Any = gpu_precision("int8", model.spec, torch.float32)
        graphs |= {name: graph.SerializeToString() for name, graph in graphs_once(model.spec, kept)}
    write_plans(directory, graphs)
    play()
    with Pipeline(engines("tiny", "fp32"), backend="cpu", threads=1) as pipeline:
        exact = pipeline.lora_from_images(PICTURES)
    found = []
    for spare in (0, ROOMY):
        with open_with(directory, spare) as pipeline:
            found.append(pipeline.lora_from_images(PICTURES))
    assert_same(*found)
    errors = [
        np.linalg.norm(found[0].factors[name][1] @ found[0].factors[name][0] - b @ a) / np.linalg.norm(b @ a)
        for name, (a, b) in exact.factors.items()
    ]
    assert 1e-3 < max(errors) < 0.05


def test_more_pictures_than_share_a_pass(planned: Path, play: Play) -> None:
    play()
    pictures = [picture(64, 64, seed=seed) for seed in range(IMAGES_PER_PASS + 2)]
    with open_with(planned, 0) as pipeline:
        assert_same(pipeline.lora_from_images(pictures), lora_of_one_batch(planned, pictures))


def test_too_many_at_once_are_refused(planned: Path, play: Play) -> None:
    """Beyond what the plan counted lies other memory."""
    play()
    with open_with(planned, 0) as pipeline:
        backend = backend_of(pipeline)
        engine = backend.engine("dinov3.head")
        tensor = DeviceTensor(backend.residency.slot_bytes, (IMAGES_PER_PASS + 1, *engine._shape), 1)  # type: ignore[attr-defined]
        with pytest.raises(ShapeMismatch, match="of 1 to 4 images"):
            engine.run(tensor, {})
        with pytest.raises(ShapeMismatch, match="fewer images at once"):
            pipeline.embed_pixels(pipeline.pixels([PICTURES[0]] * 40))


def test_the_most_scratch_is_counted_whatever_number_of_images_wants_it(planned: Path, play: Play) -> None:
    play(scratch={1: 70_000, 2: 20_000, 3: 90_000, 4: 40_000}.__getitem__)
    with open_with(planned, 0) as pipeline:
        plan = backend_of(pipeline).residency
        assert 90_000 <= plan.activation_bytes < 90_000 + 256
        for count in (4, 1, 3, 2):
            pipeline.lora_from_images([PICTURES[0]] * count)


# --- memory runs out ----------------------------------------------------------------------------------------------


def test_out_of_memory_while_it_runs_gives_the_same_lora(
    planned: Path, wanted: Lora, play: Play, caplog: pytest.LogCaptureFixture
) -> None:
    played = play()
    with open_with(planned, ROOMY) as pipeline:
        before = backend_of(pipeline).residency.peak_bytes
        played.fail = failing("run", OOM, at=5, times=2)
        with caplog.at_level(logging.WARNING, "i2l"):
            assert_same(pipeline.lora_from_images(PICTURES), wanted)
        assert len([record for record in caplog.records if "going on with" in record.message]) == 2
        assert backend_of(pipeline).residency.peak_bytes < before


def test_the_smallest_plan_raises_in_tensorrts_words(planned: Path, play: Play) -> None:
    played = play()
    with open_with(planned, 0) as pipeline:
        played.fail = failing("run", OOM, times=99)
        words = r"a played card \(sm89, tensorrt_rtx 1.7.1\), siglip2.embed .*defaultAllocator.*no room for 117.7 MiB"
        with pytest.raises(OutOfDeviceMemory, match=words):
            pipeline.lora_from_images(PICTURES)


@pytest.mark.parametrize("what", ["load", "context"])
@pytest.mark.parametrize(
    ("message", "error", "words"),
    [
        (OOM, OutOfDeviceMemory, "out of memory.*no room for 117.7 MiB"),
        ("Error Code 6: wrong magic", DeviceFailed, r"sm89, tensorrt_rtx 1.7.1\): .*wrong magic"),
    ],
)
def test_a_plan_that_does_not_open(
    planned: Path, play: Play, what: str, message: str, error: type[Exception], words: str
) -> None:
    played = play(fail=failing(what, message, at=2))
    with pytest.raises(error, match=words):
        Pipeline(planned, backend="tensorrt", vram_budget_bytes=1 << 30)
    assert played.device.used_bytes == 0


@pytest.mark.parametrize(
    ("what", "words"),
    [
        ("run", "does not run"),
        ("size", "does not say what 1 images need"),
        ("scratch", "does not take its scratch"),
    ],
)
def test_other_failures_are_in_tensorrts_words(planned: Path, play: Play, what: str, words: str) -> None:
    played = play()
    with open_with(planned, 0) as pipeline:
        played.fail = failing(what, "Error Code 2: misaligned")
        with pytest.raises(DeviceFailed, match=f"siglip2.embed: it {words}.*misaligned.*--backend cpu"):
            pipeline.lora_from_images(PICTURES[:1])


# --- which plans --------------------------------------------------------------------------------------------------


def test_plans_of_another_version_generation_or_form(engines_dir: Path, play: Play) -> None:
    played = play()
    vars(played.module)["__version__"] = "1.8"
    with pytest.raises(PlanStale, match=r"its version is 1.7.1, not 1.8.*--backend tensorrt --sm 89"):
        Pipeline(engines_dir, backend="tensorrt")
    play(sm=120)
    with pytest.raises(PlanMissing, match=r"for sm120, which tensorrt_rtx 1.7.1 wants: .* --sm 120"):
        Pipeline(engines_dir, backend="tensorrt")
    play()
    folder = plans_folder(engines_dir, 89, "fp32")
    rows = json.loads((folder / FACTS).read_text())
    for row in rows.values():
        del row["key"]["form"]
    (folder / FACTS).write_text(json.dumps(rows))
    with pytest.raises(PlanStale, match=rf"its form is 0, not {FORM}"):
        Pipeline(engines_dir, backend="tensorrt")
    (folder / "siglip2.block.onnx").write_bytes(b"another")
    with pytest.raises(PlanStale, match="its graph is"):
        Pipeline(engines_dir, backend="tensorrt")


def test_rtx_knows_no_hopper(planned: Path, play: Play) -> None:
    play(sm=90)
    with pytest.raises(BackendUnavailable, match=r"rtx 1.7.1 does not know this GPU, sm90: use --backend cuda"):
        Pipeline(planned, backend="tensorrt")


def test_tensorrt_proper_runs_on_what_is_there(engines_dir: Path, wanted: Lora, play: Play) -> None:
    played = play(sm=90, rtx=False)
    with pytest.raises(PlanMissing, match=r"for sm90, which tensorrt 1.7.1 wants: .* --backend tensorrt --sm current"):
        Pipeline(engines_dir, backend="tensorrt")
    write_plans(engines_dir, own_graphs(engines_dir), played.name, sm=90)
    with open_with(engines_dir, 0) as pipeline:
        assert_same(pipeline.lora_from_images(PICTURES), wanted)
    assert not list(engines_dir.rglob("*.jit"))


@pytest.mark.parametrize(
    ("installed", "sm", "wanted", "why"),
    [
        ("tensorrt_rtx", 89, "tensorrt_rtx", ""),
        ("tensorrt_rtx", 90, "tensorrt_rtx", ""),  # it is refused, and cuda named
        ("tensorrt", 89, "tensorrt", ""),
        ("tensorrt", 90, "tensorrt", ""),
        ("tensorrt_rtx tensorrt", 89, "tensorrt_rtx", "it knows sm89, so it goes before tensorrt"),
        ("tensorrt_rtx tensorrt", 90, "tensorrt", "tensorrt_rtx does not know sm90"),
    ],
)
def test_which_tensorrt_a_generation_gets(installed: str, sm: int, wanted: str, why: str) -> None:
    assert choose_flavour(installed.split(), sm, {86, 89, 120}) == (wanted, why)


def test_proper_is_taken_by_itself_where_rtx_does_not_know_the_card(
    engines_dir: Path, wanted: Lora, play: Play, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Both are installed; plans of the other one are refused with the command that makes them again."""
    played = play(sm=90, rtx=False)
    monkeypatch.setitem(sys.modules, "tensorrt_rtx", Played(played.device).module)
    write_plans(engines_dir, own_graphs(engines_dir), "tensorrt_rtx", sm=90)
    with pytest.raises(PlanStale, match=r"its flavour is tensorrt_rtx, not tensorrt\): rebuild with: .* --sm current"):
        Pipeline(engines_dir, backend="tensorrt")
    write_plans(engines_dir, own_graphs(engines_dir), "tensorrt", sm=90)
    budget = least_budget(engines_dir)
    caplog.clear()
    with (
        caplog.at_level(logging.INFO, "i2l.engines.tensorrt"),
        Pipeline(engines_dir, backend="tensorrt", vram_budget_bytes=budget) as pipeline,
    ):
        assert_same(pipeline.lora_from_images(PICTURES), wanted)
    assert caplog.text.count("(sm90, tensorrt 1.7.1): tensorrt_rtx does not know sm90") == 1
    status = json.loads(CliRunner().invoke(main, ["doctor", "--engines", str(engines_dir), "--json"]).stdout)
    found = next(backend for backend in status["backends"] if backend["name"] == "tensorrt")
    assert found["reason"] == "tensorrt 1.7.1, sm90: tensorrt_rtx does not know sm90"
    assert found["cards"][0]["libraries"] == {"tensorrt": "1.7.1"}


def test_the_second_of_two_cards_gets_its_own_tensorrt(play: Play, monkeypatch: pytest.MonkeyPatch) -> None:
    """An RTX 40 and an H100: a proof of the second is one of TensorRT proper."""
    monkeypatch.setitem(sys.modules, "tensorrt", play(rtx=False).module)
    monkeypatch.setitem(sys.modules, "tensorrt_rtx", Played(HostDevice(0)).module)
    monkeypatch.setattr(tensorrt_backend, "current_sm", lambda index=0: (89, 90)[index])
    cards = [CardFacts(name, "1.0", {}) for name in ("RTX 4090", "H100")]
    for module in (driver, which_card):
        monkeypatch.setattr(module, "nvidia_cards", lambda _: tuple(cards))
    libraries = [{"tensorrt_rtx": "1.7.1"}, {"tensorrt": "1.7.1"}]
    assert [card.libraries for card in tensorrt_backend.find_tensorrt().cards] == libraries
    named = [tensorrt_backend.card_on_tensorrt(name) for name in ("0", "h100", "A100")]
    assert [card and card.libraries for card in named] == [*libraries, None]


def test_each_generation_runs_the_engines_that_serve_it(
    engines_dir: Path, engines: MakeEngines, wanted: Lora, play: Play
) -> None:
    """Any two precisions do: the outer engines are float32's here, the inner ones int8's."""
    inner = Path(shutil.copytree(engines("tiny", "int8"), engines_dir / FP8_FOLDER))
    played = play(sm=89)
    with pytest.raises(PlanMissing, match=rf"--engines \S*{engines_dir.name} --backend tensorrt --sm 89"):
        Pipeline(engines_dir, backend="tensorrt")
    write_plans(inner, own_graphs(inner))
    with open_with(engines_dir, 0) as pipeline:
        lora = pipeline.lora_from_images(PICTURES)
        assert (pipeline.manifest.precision, pipeline.runs_as) == ("int8", "int8")
        assert lora.metadata["i2l.precision"] == "int8"
        pipeline._open._may_fall_back = True
        pipeline._open._limits = replace(pipeline._open._limits, threads=1)
        played.fail = failing("run", OOM, times=99)
        found = pipeline.lora_from_images(PICTURES)
        assert (pipeline.backend_name, pipeline.manifest.precision) == ("cpu", "fp32")
    with Pipeline(engines("tiny", "fp32"), backend="cpu", threads=1) as pipeline:
        assert_same(found, pipeline.lora_from_images(PICTURES))
    play(sm=86)
    write_plans(engines_dir, own_graphs(engines_dir), sm=86)
    with open_with(engines_dir, 0) as pipeline:
        assert_same(pipeline.lora_from_images(PICTURES), wanted)


# --- compiled kernels ---------------------------------------------------------------------------------------------


def test_compiled_kernels_are_kept_for_the_next_process(engines_dir: Path, play: Play) -> None:
    first = play()
    with Pipeline(engines_dir, backend="tensorrt", vram_budget_bytes=4 << 30) as pipeline:
        pipeline.lora_from_images(PICTURES[:1])
        (path,) = engines_dir.rglob("*.jit")
        assert path == plans_folder(engines_dir, 89, "fp32") / "tensorrt_rtx-1.7.1-a-played-card.jit"
        kept = path.read_bytes()
        assert kept == json.dumps(sorted(first.compiled)).encode()
        pipeline.lora_from_images(PICTURES)  # another number of images
        assert len(path.read_bytes()) > len(kept)
    assert (first.loaded_cache, len({id(config.cache) for config in rtx_configs(first)})) == (b"", 1)
    second = play()
    with Pipeline(engines_dir, backend="tensorrt", vram_budget_bytes=4 << 30):
        assert second.loaded_cache == path.read_bytes()
    other = play(card="another card")
    with Pipeline(engines_dir, backend="tensorrt", vram_budget_bytes=4 << 30) as pipeline:
        assert other.loaded_cache == b""
        pipeline.lora_from_images(PICTURES[:1])
    assert {path.name for path in engines_dir.rglob("*.jit")} == {path.name, "tensorrt_rtx-1.7.1-another-card.jit"}


def test_kernels_that_tensorrt_refuses_are_made_again(
    engines_dir: Path, play: Play, caplog: pytest.LogCaptureFixture
) -> None:
    path = plans_folder(engines_dir, 89, "fp32") / "tensorrt_rtx-1.7.1-a-played-card.jit"
    path.write_bytes(b"of an older driver")
    play().accepts_cache = False
    with (
        caplog.at_level(logging.INFO, "i2l"),
        Pipeline(engines_dir, backend="tensorrt", vram_budget_bytes=4 << 30) as pipeline,
    ):
        pipeline.lora_from_images(PICTURES[:1])
    assert "is of another driver or card" in caplog.text
    assert path.read_bytes() != b"of an older driver"


def test_a_folder_that_cannot_be_written_is_said_once(
    engines_dir: Path, wanted: Lora, play: Play, caplog: pytest.LogCaptureFixture
) -> None:
    play()
    (plans_folder(engines_dir, 89, "fp32") / "tensorrt_rtx-1.7.1-a-played-card.jit").mkdir()  # root writes anywhere
    with (
        caplog.at_level(logging.WARNING, "i2l"),
        Pipeline(engines_dir, backend="tensorrt", vram_budget_bytes=4 << 30) as pipeline,
    ):
        for _ in range(2):
            assert_same(pipeline.lora_from_images(PICTURES), wanted)
        pipeline.lora_from_images(PICTURES[:1])
    assert len([record for record in caplog.records if "compiled kernels are not kept" in record.message]) == 1


# --- parts --------------------------------------------------------------------------------------------------------


sizes = st.integers(1, 5000)


@given(sizes, st.lists(sizes, max_size=6), st.lists(sizes, min_size=1, max_size=4))
def test_outputs_lie_clear_of_their_input(first: int, chain: list[int], last: list[int]) -> None:
    """Graphs of one output, each reading that of the one before, and a last graph of several."""
    graphs = [[first], *([size] for size in chain), last]
    rounded = [[-(-size // 256) * 256 for size in outputs] for outputs in graphs]
    most = max(sum(outputs) + inputs[0] for inputs, outputs in pairwise(rounded))
    workspace = Workspace(1 << 20, 4096, most)
    start, nbytes = workspace.values_address, first
    for outputs in graphs[1:]:
        placed = workspace.place(start, nbytes, {str(index): size for index, size in enumerate(outputs)})
        spans = [(placed[str(index)], placed[str(index)] + size) for index, size in enumerate(outputs)]
        spans = sorted([(start, start + nbytes), *spans])
        assert all(left[1] <= right[0] for left, right in pairwise(spans))
        assert workspace.values_address <= spans[0][0]
        assert spans[-1][1] <= workspace.values_address + most
        assert all(address % 256 == 0 for address in placed.values())
        start, nbytes = placed["0"], outputs[0]


def layer(kind: str, tactic: str, *types: str, key: str = "Format/Datatype") -> dict[str, Any]:
    """In the form of the inspector's JSON."""
    inputs = [{"Name": f"t{i}", "Location": "Device", "Dimensions": [201, 4096], key: t} for i, t in enumerate(types)]
    return {"Name": f"{kind} {tactic}", "LayerType": kind, "Inputs": inputs, "Outputs": [], "TacticName": tactic}


def test_the_operands_of_products_are_counted() -> None:
    layers = [
        layer("gemm", "sm89_xmma_gemm_e4m3bf16_e4m3f32_f32_tn_n", "FP8", "FP8", "Float"),
        layer("gemm", "cutlass_bf16_gemm", "Row major linear BF16 format", "Row major linear BF16 format"),
        layer("MatrixMultiply", "", "Half", "Half", key="DataType"),
        layer("gemm", "mixed_gemm", "BFloat16", "FP8", key="Datatype"),
        layer("gemm", "tf32_gemm", "Float", "Float"),
        layer("kgen", "__myl_MulAdd", "Float", "Float"),
        layer("fusedMHA", "_gemm_mha_v2", "BFloat16", "BFloat16"),
        layer("Reformat", "gemm_reformat", "Half", "Half"),
        {"Name": "silent", "LayerType": "gemm"},
        "only_a_name_gemm",
        "__myl_CastMul",
    ]
    found = products(json.dumps({"Layers": layers, "I/O Tensors": []}))
    assert found == Products(fp8=1, half=2, other=2, unknown=("silent", "only_a_name_gemm"))


def test_an_engine_shows_its_layers(planned: Path, play: Play) -> None:
    play()
    with open_with(planned, 0) as pipeline:
        layers = backend_of(pipeline).opened["dinov3.block"].layers
        assert products(layers) == Products(0, 0, 0, ("product_gemm",))


@pytest.mark.skipif(importlib.util.find_spec("tensorrt_rtx") is None, reason="tensorrt_rtx is not installed")
def test_the_played_tensorrt_has_only_what_the_real_one_has() -> None:
    real: Any = importlib.import_module("tensorrt_rtx")

    pairs = {
        "Runtime": real.Runtime, "Engine": real.ICudaEngine, "Context": real.IExecutionContext,
        "Config": real.IRuntimeConfig, "Cache": real.IRuntimeCache, "Inspector": real.EngineInspector,
    }  # fmt: skip
    own = {"played", "runner", "inputs", "tensors", "cache", "strategy"}
    for name, real_class in pairs.items():
        called = {member for member in dir(getattr(played_tensorrt, name)) if not member.startswith("_")}
        assert called - own <= set(dir(real_class)), name
    members = vars(Played(HostDevice(0)).module)
    for name in (name for name in members if name[0].isupper() and name not in {"Runtime", "ILogger"}):
        assert vars(members[name]).keys() <= set(dir(getattr(real, name))), name
    assert {"ERROR", "INTERNAL_ERROR"} <= set(dir(real.ILogger))
    assert real.float32 == real.DataType.FLOAT


@pytest.mark.skipif(importlib.util.find_spec("tensorrt_rtx") is None, reason="tensorrt_rtx is not installed")
@pytest.mark.skipif(driver.without_driver("cuda") is None, reason="here is a driver")
def test_the_real_tensorrt_says_what_it_lacks(tmp_path: Path) -> None:
    """As far as the real one comes without a driver: it is loaded, logs to us, and does not open a plan."""
    values = [onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, ["batch", 4]) for name in "xy"]
    graph = onnx.helper.make_graph([onnx.helper.make_node("Neg", ["x"], ["y"])], "g", values[:1], values[1:])
    model = onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 21)])
    flavour = find_flavour(89)
    plan = build_plan(flavour, "g", model.SerializeToString(), 89)
    runtime = PlanRuntime(flavour, HostDevice(0), Workspace(), 4, RuntimeCache(tmp_path, flavour, "card"))
    with pytest.raises(
        DeviceFailed, match=r"fake device \(sm89, tensorrt_rtx 1\..*\): g: its plan cannot be .*CUDA driver"
    ):
        runtime.open("g", plan.data)


# --- which backend ------------------------------------------------------------------------------------------------


def test_it_is_not_proven_and_auto_passes_it_over(planned: Path, play: Play) -> None:
    play()
    status = next(status for status in backends.detect_backends() if status.name == "tensorrt")
    assert (status.works, status.cards[0].libraries) == (True, {"tensorrt_rtx": "1.7.1"})
    text = CliRunner().invoke(main, ["doctor", "--engines", str(planned)]).output
    assert "backend tensorrt: works (tensorrt_rtx 1.7.1, sm89)\n  card 0: a played card, driver 1.0" in text
    assert "tensorrt on a played card, driver 1.0: not proven with these engines: i2l prove --engines" in text
    with Pipeline(planned, prove=False) as pipeline:
        assert pipeline.backend_name == "cpu"
        assert "tensorrt: a played card is not proven: i2l prove does it" in pipeline.backend_reason


def test_without_cuda_python_the_extra_installs_it(play: Play, monkeypatch: pytest.MonkeyPatch) -> None:
    play()
    monkeypatch.undo()
    real = importlib.util.find_spec
    monkeypatch.setattr(driver, "without_driver", lambda _: None)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name.startswith("cuda") else real(name))
    if real("tensorrt_rtx") is None:
        pytest.skip("tensorrt_rtx is not installed")
    with pytest.raises(
        BackendUnavailable, match=r"cuda.bindings .* is not installed: pip install \"i2l-engines\[tensorrt\]\""
    ):
        backends.working_backend("tensorrt")


def test_a_tensorrt_whose_libraries_do_not_load(play: Play, monkeypatch: pytest.MonkeyPatch) -> None:
    play()

    def broken(_: int) -> Iterator[None]:
        raise OSError("libnvinfer.so: cannot open shared object file")

    monkeypatch.setattr(tensorrt_backend, "find_flavour", broken)
    with pytest.raises(BackendUnavailable, match=r"TensorRT does not load .*libnvinfer"):
        backends.working_backend("tensorrt")


def test_the_command_runs_on_it(planned: Path, photo: Path, tmp_path: Path, play: Play) -> None:
    play()
    arguments = ["run", str(photo), "--engines", str(planned), "--output", str(tmp_path / "lora.safetensors"), "--json"]
    result = CliRunner().invoke(main, [*arguments, "--backend", "tensorrt", "--vram-budget", "1GiB"])
    assert result.exit_code == 0, result.output
    facts = json.loads(result.stdout)
    assert facts["backend"] == "tensorrt"
    assert facts["vram"]["planned_peak_bytes"] <= facts["vram"]["budget_bytes"] == 1 << 30
