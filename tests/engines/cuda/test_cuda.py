"""The cuda backend without a GPU: its engines over host pointers, its graphs in float32, what stands in its way.

Nothing here shows that CUDA works. tests/engines/tensorrt/test_gpu.py does, where there is a GPU.
"""

import json
import logging
import shutil
import sys
import types
from collections.abc import Callable, Iterator, Mapping
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import pytest
import torch
from click.testing import CliRunner
from hypothesis import given
from hypothesis import strategies as st

from conftest import MakeEngines, MakeModels, lora_of_one_batch, picture
from fake_device import HostDevice
from i2l.cli import main
from i2l.engines import backends
from i2l.engines.base import CardFacts, Limits, VramBudget
from i2l.engines.cuda import warming
from i2l.engines.cuda.arena import Arena
from i2l.engines.cuda.backend import open_cuda
from i2l.engines.cuda.graph_files import FACTS, checked_graphs, graphs_folder
from i2l.engines.cuda.libraries import missing_libraries
from i2l.engines.cuda.session import CpuTarget, CudaTarget, OrtDeviceEngine
from i2l.engines.device import card as cuda_device
from i2l.engines.device import driver
from i2l.engines.device.backend import DeviceBackend
from i2l.engines.device.device import Workspace
from i2l.engines.device.driver import driver_release
from i2l.engines.device.residency import GraphMemory, estimated_memory
from i2l.engines.device.tensor import DeviceTensor
from i2l.engines.directory.manifest import PROOFS, read_manifest
from i2l.errors import (
    BackendUnavailable,
    BudgetTooSmall,
    CudaGraphsUnusable,
    DeviceFailed,
    OutOfDeviceMemory,
    PackageMissing,
    ProviderMissing,
    ShapeMismatch,
)
from i2l.export.backends.cuda import build_cuda_graphs
from i2l.export.graphs.graphs import export_graphs
from i2l.export.packs.planning import planned_model
from i2l.export.precisions.choosing import cuda_precision
from i2l.lora.lora import Lora
from i2l.runtime.pipeline import Pipeline
from i2l.specs import PRESETS

PICTURES = [picture(90, 70, seed=1), picture(64, 64, seed=2)]


class LateEngine:
    """Runs when the compute lane comes to it."""

    def __init__(self, device: HostDevice, engine: OrtDeviceEngine) -> None:
        self._device, self._engine = device, engine
        self.activation = engine.activation

    def run(self, activation: Any, weights: Mapping[str, DeviceTensor]) -> dict[str, Any]:
        outputs: dict[str, Any] = {}
        self._device.enqueue("compute", lambda: outputs.update(self._engine.run(activation, weights)))
        self._device.drain("compute")
        return outputs


def lora_at(directory: Path, graphs: Mapping[str, Path], spare_bytes: int) -> Lora:
    """The LoRA by pointer engines over these graphs, at the smallest budget and so much more."""
    manifest = read_manifest(directory)
    device, workspace = HostDevice(1 << 30, seed=spare_bytes), Workspace()
    made_engines = {g: OrtDeviceEngine(g, path.read_bytes(), CpuTarget(), workspace) for g, path in graphs.items()}
    memory = {graph: GraphMemory(256, engine.value_bytes(4), 0) for graph, engine in made_engines.items()}

    def make(graph: str) -> LateEngine:
        return LateEngine(device, made_engines[graph])

    def backend(budget_bytes: int) -> DeviceBackend:
        return DeviceBackend("host", device, make, directory, manifest, memory, budget_bytes, workspace)

    with pytest.raises(BudgetTooSmall) as caught:
        backend(0)
    with Pipeline(directory, backend="cpu", threads=1) as pipeline:
        pipeline.close()
        made = pipeline._open._backend = backend(caught.value.needed_bytes + spare_bytes)
        lora = pipeline.lora_from_images(PICTURES)
        assert (made.residency.streamed_bytes == 0) == (spare_bytes == 10_000_000)
        assert pipeline.vram == {
            "budget_bytes": made.residency.budget_bytes,
            "planned_peak_bytes": made.residency.peak_bytes,
            "measured_peak_bytes": device.peak_bytes,
        }
    assert device.used_bytes == 0
    return lora


def relative_error(found: Lora, wanted: Lora) -> float:
    """The largest over all modules, of ``B @ A``."""
    return max(
        float(np.linalg.norm(found.factors[name][1] @ found.factors[name][0] - b @ a) / np.linalg.norm(b @ a))
        for name, (a, b) in wanted.factors.items()
    )


@pytest.fixture(scope="module")
def wanted(engines: MakeEngines) -> Lora:
    return lora_of_one_batch(engines("tiny", "fp32"), PICTURES)


@pytest.mark.parametrize("spare_bytes", [0, 60_000, 400_000, 10_000_000])
def test_pointers_give_the_cpus_lora_bit_for_bit(engines: MakeEngines, wanted: Lora, spare_bytes: int) -> None:
    directory = engines("tiny", "fp32")
    manifest = read_manifest(directory)
    graphs = {graph: directory / manifest.build / path for graph, path in manifest.graphs.items()}
    found = lora_at(directory, graphs, spare_bytes)
    for module, factors in wanted.factors.items():
        for x, y in zip(found.factors[module], factors, strict=True):
            np.testing.assert_array_equal(x, y)


@pytest.fixture(scope="module")
def with_graphs(engines: MakeEngines, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Engines with the cuda backend's graphs, in float32 for the CPU provider; int8 has the most forms."""
    directory = tmp_path_factory.mktemp("cuda") / "engines"
    shutil.copytree(engines("tiny", "int8"), directory)
    build_cuda_graphs(directory, compute=torch.float32)
    return directory


def test_the_graphs_compute_what_the_checkpoint_does(with_graphs: Path, wanted: Lora) -> None:
    """Activations are exact here: what is left is the weights' rounding."""
    graphs = checked_graphs(with_graphs, read_manifest(with_graphs))
    errors = [relative_error(lora_at(with_graphs, graphs, spare), wanted) for spare in (0, 10_000_000)]
    assert errors[0] == errors[1]
    assert 1e-3 < errors[0] < 0.05


ON_CUDA = {
    "Add", "Attention", "Cast", "Concat", "Expand", "Gather", "Gelu", "Gemm", "LayerNormalization", "MatMul", "Mul",
    "FusedMatMul", "ReduceSum", "Reshape", "RotaryEmbedding", "Shape", "Sigmoid", "Slice", "Split", "Squeeze", "Sub",
    "Transpose", "Unsqueeze",
}  # fmt: skip
"""In onnxruntime's list of CUDA kernels at opset 23, in bfloat16 too (docs/OperatorKernels.md there)."""


def test_the_graphs_use_only_what_the_provider_has(with_graphs: Path) -> None:
    int8 = [onnx.load(path) for path in checked_graphs(with_graphs, read_manifest(with_graphs)).values()]
    spec = PRESETS["tiny"].dinov3
    fp8 = [model for _, model in export_graphs(spec, cuda_precision("fp8", spec))]
    for model in [*int8, *fp8]:
        assert {node.op_type for node in model.graph.node} <= ON_CUDA, model.graph.name
        others = {node.domain for node in model.graph.node if node.op_type != "FusedMatMul"}
        assert others <= {""}, model.graph.name
    block = next(model for model in fp8 if model.graph.name == "dinov3.block")
    inferred = onnx.shape_inference.infer_shapes(block)
    types = {value.name: value.type.tensor_type.elem_type for value in inferred.graph.value_info}
    products = [node for node in block.graph.node if node.op_type == "Gemm"]
    assert len(products) == 4
    assert {types[node.output[0]] for node in products} == {onnx.TensorProto.BFLOAT16}
    assert [{a.name: a.i for a in node.attribute}.get("transB") for node in products] == [1] * 4


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (shutil.rmtree, "none were made for int8 packs"),
        (lambda folder: (folder / FACTS).write_text("{"), "does not parse"),
        (lambda folder: (folder / "dinov3.block.onnx").unlink(), "dinov3.block is not there"),
        (lambda folder: (folder / "dinov3.head.onnx").write_bytes(b"x"), "dinov3.head is not what was written"),
        (lambda folder: change(folder, form=0), "has form 0"),
        (lambda folder: change(folder, model="x"), "is for another architecture"),
    ],
)
def test_other_graphs_are_not_used(
    with_graphs: Path, tmp_path: Path, damage: Callable[[Path], object], words: str
) -> None:
    copy = tmp_path / "engines"
    shutil.copytree(with_graphs, copy)
    damage(graphs_folder(copy, "int8"))
    with pytest.raises(CudaGraphsUnusable, match=f"{words}.*--backend cuda"):
        checked_graphs(copy, read_manifest(copy))


def change(folder: Path, **values: object) -> None:
    rows = json.loads((folder / FACTS).read_text())
    (folder / FACTS).write_text(json.dumps({graph: row | values for graph, row in rows.items()}))


# --- engines ------------------------------------------------------------------------------------------------------


@pytest.fixture
def head(engines: MakeEngines) -> bytes:
    directory = engines("tiny", "fp32")
    manifest = read_manifest(directory)
    return (directory / manifest.build / manifest.graphs["dinov3.head"]).read_bytes()


def test_an_activation_of_another_shape(head: bytes) -> None:
    engine = OrtDeviceEngine("dinov3.head", head, CpuTarget(), Workspace())
    with pytest.raises(ShapeMismatch, match=r"hidden_in is \[1, 3, 4\]"):
        engine.run(DeviceTensor(0, (1, 3, 4), 1), {})


def test_a_cpu_onnxruntime_says_what_to_install(head: bytes) -> None:
    if "CUDAExecutionProvider" in ort.get_available_providers():
        pytest.skip("this onnxruntime has CUDA")
    with pytest.raises(ProviderMissing, match=r"without CUDAExecutionProvider.*i2l-engines\[cuda\]"):
        OrtDeviceEngine("dinov3.head", head, CudaTarget(Arena(HostDevice(0), Workspace()), 0), Workspace())


@pytest.mark.parametrize(
    ("words", "memory"),
    [
        ("CUDA failure 2: out of memory ; GPU=0", True),
        ("Available memory of 12 is smaller than requested bytes of 48", True),
        ("CUBLAS failure 13", False),
    ],
)
def test_memory_errors_become_ours(head: bytes, words: str, memory: bool) -> None:
    engine = OrtDeviceEngine("dinov3.head", head, CpuTarget(), Workspace())
    failures = [sys.modules["onnxruntime.capi.onnxruntime_pybind11_state"].RuntimeException, RuntimeError]

    def fail(*_: object) -> None:
        raise failures.pop()(words)

    session = engine._session
    engine._session = types.SimpleNamespace(io_binding=session.io_binding, run_with_iobinding=fail)
    x = np.zeros((1, *engine._shape), np.float32)
    while failures:
        with pytest.raises(OutOfDeviceMemory if memory else DeviceFailed):
            engine.compute({engine.activation: DeviceTensor(x.ctypes.data, x.shape, 1)}, {})


@given(st.lists(st.tuples(st.integers(0, 5000), st.integers(0, 5)), max_size=40), st.integers(0, 20_000))
def test_the_arena_gives_out_each_byte_once(work: list[tuple[int, int]], scratch_bytes: int) -> None:
    """Pieces never overlap, none ends behind the scratch, and where they lie depends on the run alone."""
    arena = Arena(HostDevice(0), Workspace(1 << 20, scratch_bytes))
    places: list[list[int]] = []
    for _ in range(2):
        live: list[tuple[int, int]] = []
        places.append([])
        for nbytes, given_back in work:
            if given_back and live:
                arena.free(live.pop(given_back % len(live))[0])
            address = arena.allocate(nbytes)
            places[-1].append(address)
            if not address:
                assert isinstance(arena.refusal, OutOfDeviceMemory)
                continue
            end = address + max(nbytes, 1)
            assert address % 256 == 0
            assert 1 << 20 <= address < end <= (1 << 20) + scratch_bytes
            assert all(end <= other or stop <= address for other, stop in live)
            assert end - (1 << 20) <= arena.most_bytes
            live.append((address, end))
        for address, _ in live:
            arena.free(address)
    assert places[0] == places[1]


def test_what_sessions_keep_goes_at_once() -> None:
    device = HostDevice(16 << 20)
    arena = Arena(device, Workspace())
    arena.opening = True
    first = [arena.allocate(3000) for _ in range(3)]
    arena.free(first[1])
    large = arena.allocate(3 << 20)
    arena.opening = False
    assert arena.allocate(1) == 0
    assert len({*first, large}) == 4
    assert device.used_bytes == 6 << 20  # in whole pieces: 2 and 4 MiB
    arena.close()
    assert device.used_bytes == 0


@pytest.mark.parametrize(("precision", "copied"), [("int8", 1), ("fp8", 1), ("bf16", 0)])
def test_the_estimate_counts_16_bit_copies(precision: str, copied: int) -> None:
    """Of all matrices of a block that the pack does not hold in 16 bits."""
    spec = PRESETS["full"].dinov3
    block = warming.estimated_memory({"dinov3": planned_model(spec, precision)}, 1)["dinov3.block"]
    plain = estimated_memory(spec, 1)["dinov3.block"]
    assert block.activation_bytes - plain.activation_bytes == copied * 2 * (4 * 4096 * 4096 + 3 * 4096 * 8192)


# --- the card -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("sm", "budget_bytes", "error", "words"),
    [
        (75, None, BackendUnavailable, r"multiply in bfloat16, which fake device \(sm75\) cannot: use --backend cpu"),
        (89, None, OutOfDeviceMemory, "no room for 2.00 GiB"),
        (89, 1, BudgetTooSmall, "give --vram-budget"),
    ],
)
def test_a_card_that_does_not_do_is_given_back(
    with_graphs: Path, monkeypatch: pytest.MonkeyPatch, sm: int, budget_bytes: int, error: type[Exception], words: str
) -> None:
    device = HostDevice(1000)
    device.sm, device.index = sm, 0  # type: ignore[attr-defined]
    monkeypatch.setattr(cuda_device, "CudaDevice", lambda **_: device)
    with pytest.raises(error, match=words):
        open_cuda(with_graphs, read_manifest(with_graphs), Limits(4, vram=VramBudget(budget_bytes)))
    assert device.used_bytes == 0


# --- which backend ------------------------------------------------------------------------------------------------


class PlayedDriver:
    """CUDA's driver as far as it names cards."""

    count = 2

    def cuInit(self, _: int) -> int:  # noqa: N802 - CUDA's names
        return 0

    def cuDeviceGetCount(self, count: Any) -> int:  # noqa: N802
        count._obj.value = self.count
        return 0

    def cuDriverGetVersion(self, version: Any) -> int:  # noqa: N802
        version._obj.value = 13010
        return 0

    def cuDeviceGet(self, device: Any, index: int) -> int:  # noqa: N802
        device._obj.value = 7 + index
        return 0

    def cuDeviceGetName(self, name: Any, size: int, device: Any) -> int:  # noqa: N802
        name.value = f"card {device.value - 7}".encode()[:size]
        return 0


def test_the_cards_are_what_a_proof_is_of(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("i2l.engines.device.driver.without_driver", lambda _: None)
    monkeypatch.setattr("i2l.engines.device.driver.without_cuda_python", lambda _: None)
    monkeypatch.setattr("i2l.engines.device.driver._driver_library", PlayedDriver)
    monkeypatch.setattr("i2l.engines.device.driver.driver_release", lambda: "")
    monkeypatch.setattr(ort, "get_available_providers", lambda: ["CUDAExecutionProvider", "CPUExecutionProvider"])
    monkeypatch.setattr("i2l.engines.cuda.backend.missing_libraries", tuple)
    libraries = {"onnxruntime-gpu": ort.__version__}
    cards = tuple(CardFacts(name, "for CUDA 13.1", libraries) for name in ("card 0", "card 1"))
    assert backends.working_backend("cuda").cards == cards
    monkeypatch.setattr(PlayedDriver, "count", 0)
    with pytest.raises(BackendUnavailable, match="the NVIDIA driver finds no GPU"):
        backends.working_backend("cuda")


def test_what_is_missing_is_told_apart(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """No driver, the build for the CPU, CUDA's libraries; what onnxruntime prints does not reach the output."""
    missing_libraries.cache_clear()
    monkeypatch.setattr("i2l.engines.device.driver._driver_library", lambda: None)
    assert backends.offer_of("cuda").find().reason == "no NVIDIA driver on this machine"
    monkeypatch.setattr("i2l.engines.device.driver._driver_library", PlayedDriver)
    monkeypatch.setattr(ort, "get_available_providers", lambda: ["CPUExecutionProvider"])
    assert backends.offer_of("cuda").find().reason == "onnxruntime is the build for the CPU"
    monkeypatch.setattr(ort, "get_available_providers", lambda: ["CUDAExecutionProvider"])
    lacking = "Failed to load libcublas.so.13: cannot open shared object file\nPlease follow https://onnxruntime.ai"
    monkeypatch.setattr(ort, "preload_dlls", lambda **_: print(lacking))  # noqa: T201 - as onnxruntime does
    status = backends.offer_of("cuda").find()
    missing_libraries.cache_clear()
    assert "CUDA's libraries are missing" in status.reason
    assert status.reason.endswith("(libcublas.so.13)")
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize(
    ("system", "torchs", "imported", "broken", "places", "lacking"),
    [
        ("Windows", "2.13.0+cu130", True, "", set(), ()),  # as in ComfyUI: they are in the process
        ("Windows", "2.13.0+cu130", False, "", {"torch"}, ()),
        ("Windows", "2.13.0+cu128", True, "", {"nvidia"}, ()),  # of another CUDA
        ("Linux", "2.13.0+cu130", True, "", {"nvidia"}, ()),  # the packages that PyTorch brought
        ("Linux", "2.13.0+cu130", True, "/libcublas.so.13", {"nvidia", "system"}, ()),
        ("Linux", "2.13.0+cu130", True, "libcublas.so.13", {"nvidia"}, ("libcublas.so.13",)),
    ],
)
def test_pytorchs_libraries_serve_onnxruntime(
    monkeypatch: pytest.MonkeyPatch,
    system: str,
    torchs: str,
    imported: bool,
    broken: str,
    places: set[str],
    lacking: tuple[str, ...],
) -> None:
    """onnxruntime's own search; played are the system, PyTorch's build and what loads."""
    found: set[str] = set()

    def load(name: str) -> None:
        if broken and name.endswith(broken):
            raise OSError("not of this machine")
        if "140" not in name:  # Microsoft's
            found.add("nvidia" if "/nvidia/" in name else "torch" if "/torch/lib/" in name else "system")

    missing_libraries.cache_clear()
    with monkeypatch.context() as patch:
        patch.setattr(ort, "cuda_version", "13.0")
        patch.setattr(ort, "_get_package_version", lambda _: torchs)
        patch.setattr("platform.system", lambda: system)
        patch.setattr("os.path.isfile", lambda path: "/nvidia/" in path or "/torch/lib/" in path)
        patch.setattr("ctypes.CDLL", load)
        if not imported:
            patch.delitem(sys.modules, "torch")
        assert missing_libraries() == lacking
    missing_libraries.cache_clear()
    assert found == places


@pytest.mark.skipif(driver.without_driver("cuda") is None, reason="here is a driver")
@pytest.mark.skipif(driver.without_cuda_python("cuda") is not None, reason="cuda-bindings is not installed")
def test_a_card_without_a_driver_is_an_error_of_ours() -> None:
    """cuda-bindings raises one of its own."""
    with pytest.raises(BackendUnavailable, match=r"the NVIDIA driver does not load.*--backend cpu"):
        cuda_device.CudaDevice()


def test_without_any_onnxruntime_it_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backends, "import_module", missing)
    assert {status.reason for status in backends.detect_backends()} == {"no onnxruntime is installed"}
    with pytest.raises(PackageMissing, match=r"onnxruntime, which is not installed.*\[cpu\]"):
        backends.offer_of("cpu")


def missing(*_: object) -> None:
    raise ModuleNotFoundError("No module named 'onnxruntime'", name="onnxruntime")


@pytest.mark.parametrize(
    "line",
    [
        "NVRM version: NVIDIA UNIX x86_64 Kernel Module  580.95.05  Tue Sep 23 10:11:16 UTC 2025",
        "NVRM version: NVIDIA UNIX Open Kernel Module for x86_64  580.95.05  Release Build",
    ],
)
def test_the_drivers_version_is_the_kernel_modules(tmp_path: Path, line: str) -> None:
    path = tmp_path / "version"
    assert driver_release(path) == ""
    path.write_text(f"{line}\nGCC version:  gcc version 12.2.0\n")
    assert driver_release(path) == "580.95.05"


def test_graphs_that_are_not_finished_change_nothing(with_graphs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*arguments: Any) -> Iterator[tuple[str, onnx.ModelProto]]:
        yield from islice(export_graphs(*arguments), 1)
        raise KeyboardInterrupt

    before = {path: path.stat().st_mtime_ns for path in with_graphs.rglob("*")}
    monkeypatch.setattr("i2l.export.backends.cuda.export_graphs", interrupted)
    with pytest.raises(KeyboardInterrupt):
        build_cuda_graphs(with_graphs)
    assert {path: path.stat().st_mtime_ns for path in with_graphs.rglob("*")} == before


def test_the_command_makes_the_graphs(
    models: MakeModels,
    engines: MakeEngines,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """One exported graph is enough; the fixture exported all. Checkpoints are looked for once, and said once."""
    one = lambda spec, _: islice(export_graphs(spec, cuda_precision("fp8", spec)), 1)  # noqa: E731
    monkeypatch.setattr("i2l.export.backends.cuda.export_graphs", one)
    copy = tmp_path / "engines"
    shutil.copytree(engines("tiny", "int8"), copy)
    twice = Path(shutil.copytree(models("tiny"), tmp_path / "models"))
    encoder = next((twice / "CLIPS").iterdir())
    shutil.copy2(encoder, encoder.with_name(f"z-{encoder.name}"))
    command = ["build-engines", "--models", str(twice), "--engines", str(copy), "--precision", "int8"]
    (copy / PROOFS).write_text("what a card lacked")
    with caplog.at_level(logging.INFO, "i2l"):
        run = CliRunner().invoke(main, [*command, "--backend", "cuda"], catch_exceptions=False)
    assert caplog.text.count("is there twice with the same content") == 1
    assert not (copy / PROOFS).exists()  # it may be there now
    assert run.exit_code == 0
    assert "8 graphs for the cuda backend; i2l prove shows whether the card is right" in run.output
    written = json.loads((graphs_folder(copy, "int8") / FACTS).read_text())
    assert {"siglip2.embed", "dinov3.embed"} < set(written)
    with pytest.raises(CudaGraphsUnusable, match="is not there"):
        checked_graphs(copy, read_manifest(copy))
