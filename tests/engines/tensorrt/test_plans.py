"""TensorRT plans: built here without a GPU by TensorRT-RTX; when one may be used; what the graphs compute."""

import ctypes
import hashlib
import importlib.util
import itertools
import json
import re
import shutil
import subprocess
import sys
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import pytest
import torch
from click.testing import CliRunner
from filelock import FileLock, Timeout

from conftest import MakeEngines, MakeModels, graphs_once
from i2l.cli import main
from i2l.engines.device.predict import graph_memory
from i2l.engines.directory.dtypes import ELEMENT_TYPES
from i2l.engines.directory.manifest import Model, read_manifest
from i2l.engines.directory.ownership import LOCK
from i2l.engines.directory.tensorfile import read_header
from i2l.engines.tensorrt.library import BuiltPlan, Flavour, build_plan, current_sm, find_flavour
from i2l.engines.tensorrt.plans import FACTS, PlanKey, checked_plan, plans_folder, read_plans
from i2l.errors import BackendUnavailable, PlanBuildFailed, PlanMissing, PlanStale, PrecisionUnsupported
from i2l.export.backends import tensorrt as exporting
from i2l.export.backends.cards import compute_dtype
from i2l.export.backends.tensorrt import build_plans, gpu_graphs
from i2l.export.checkpoints.finding import find_checkpoints
from i2l.export.checkpoints.weights import graph_weights
from i2l.export.graphs.graphs import export_graph
from i2l.export.graphs.modules import graph_modules
from i2l.export.packs.planning import planned_model
from i2l.export.precisions.choosing import gpu_precision
from i2l.export.precisions.storing import stored_tensors
from i2l.export.precisions.torch_rotation import rotate, rotation
from i2l.export.reference import reference_steps
from i2l.look.verification import step_error
from i2l.specs import FAMILIES, PRESETS, Family

tensorrt_rtx = pytest.mark.skipif(
    importlib.util.find_spec("tensorrt_rtx") is None,
    reason="tensorrt_rtx is not installed: it has wheels for Linux and Windows on x86-64",
)
GRAPHS = [
    *("siglip2.embed", "siglip2.block", "siglip2.head", "dinov3.embed", "dinov3.block", "dinov3.head"),
    *("adapter.attention", "adapter.feed_forward"),
]


# --- building, without a GPU -------------------------------------------------------------------------------------


BUILT = [("int8", 75), ("int8", 80), ("int8", 86), ("fp8", 89), ("fp8", 120), ("bf16", 89)]
"""What is built for whom: sm75 multiplies in float16, the others in bfloat16."""


@pytest.fixture(scope="module")
def planned(engines: MakeEngines, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """``precision -> engines directory`` with all plans of :data:`BUILT`."""
    directories = {}
    for precision in ("int8", "fp8", "bf16"):
        sms = [sm for name, sm in BUILT if name == precision]
        target = tmp_path_factory.mktemp("planned") / precision
        directories[precision] = Path(shutil.copytree(engines("tiny", precision), target))
        result = build_plans(target, sms)
        assert result.built == len(sms) * len(GRAPHS)
    return directories


@tensorrt_rtx
@pytest.mark.parametrize(("precision", "sm"), BUILT)
def test_every_graph_becomes_a_plan(planned: Mapping[str, Path], precision: str, sm: int) -> None:
    facts = read_plans(plans_folder(planned[precision], sm, precision))
    assert sorted(facts) == sorted(GRAPHS)
    for graph, plan in facts.items():
        assert len(checked_plan(planned[precision], graph, plan.key)) == plan.nbytes > 10_000
        assert (plan.key.sm, plan.key.precision, plan.key.profile) == (sm, precision, (1, 1, 8))
    manifest = read_manifest(planned[precision])
    weights = max(chunk.nbytes for model in manifest.models.values() for chunk in model.chunks)
    assert max(plan.activation_bytes for plan in facts.values()) < (16 << 20) + 8 * weights  # 8 MiB is its floor


@tensorrt_rtx
def test_the_command_builds_what_is_not_up_to_date(planned: Mapping[str, Path], models: MakeModels) -> None:
    folder = plans_folder(planned["int8"], 86, "int8")
    facts = read_plans(folder)
    rows = json.loads((folder / FACTS).read_text())
    rows["dinov3.head"]["key"]["version"] = "1.0"
    (folder / FACTS).write_text(json.dumps(rows))
    before = {path.name: path.stat().st_mtime_ns for path in folder.glob("*.plan")}
    arguments = ["build-engines", "--models", str(models("tiny")), "--engines", str(planned["int8"])]
    result = CliRunner().invoke(main, [*arguments, "--backend", "tensorrt", "--sm", "86"])
    assert result.exit_code == 0, result.output
    assert "precision int8 for sm86 (auto: no FP8 products on sm86)" in result.output
    assert "kept plans from before: sm75, sm80" in result.output
    assert "sm86 (RTX 30): 8 plans by tensorrt_rtx 1." in result.output
    after = {path.name: path.stat().st_mtime_ns for path in folder.glob("*.plan")}
    assert {name for name in after if after[name] != before[name]} == {"dinov3.head.plan"}
    assert {graph: plan.key for graph, plan in read_plans(folder).items()} == {g: p.key for g, p in facts.items()}


def test_sm_without_tensorrt() -> None:
    result = CliRunner().invoke(main, ["build-engines", "--models", "m", "--engines", "e", "--sm", "89"])
    assert (result.exit_code, "--sm is for --backend tensorrt" in result.output) == (2, True)


def full_width_graph(family: str, graph: str, precision: str, sm: int) -> bytes:
    """A graph of the published size; it holds no weights."""
    spec = next(spec for spec in PRESETS["full"] if spec.family == family)
    kept = gpu_precision(precision, spec, compute_dtype(sm))
    module = graph_modules(spec, kept)[graph]
    model = export_graph(graph, module, spec, stored_tensors(graph_weights(spec)[graph], kept))
    return model.SerializeToString()


@tensorrt_rtx
@pytest.mark.parametrize(
    ("precision", "sm", "limit_bytes"),
    [
        # 107 MB planned for eight images; a 16-bit copy of one of the four matrices would add 33 to 134 MB
        ("fp8", 89, 125e6),
        # 432 MB: int8 weights do become 16-bit copies, 335 MB for all four
        ("int8", 86, 500e6),
        # 415 MB: the same copies; 2132 MB in the form of sm86, with the activations once per panel
        ("int8", 75, 500e6),
    ],
)
def test_a_full_width_block_keeps_no_more_copies_than_known(precision: str, sm: int, limit_bytes: float) -> None:
    plan = build_plan(find_flavour(89), "dinov3.block", full_width_graph("dinov3", "dinov3.block", precision, sm), sm)
    assert 20e6 < plan.activation_bytes < limit_bytes
    assert len(plan.data) < 4 << 20
    models: dict[Family, Model] = {"dinov3": planned_model(PRESETS["full"].dinov3, precision)}
    assert plan.activation_bytes < graph_memory(models, 8)["dinov3.block"].activation_bytes


@tensorrt_rtx
def test_the_parsers_words_are_in_the_error() -> None:
    node = onnx.helper.make_node("NoSuchOperator", ["x"], ["y"])
    tensors = [onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, ["batch", 4]) for name in "xy"]
    model = onnx.helper.make_model(onnx.helper.make_graph([node], "g", tensors[:1], tensors[1:]))
    with pytest.raises(PlanBuildFailed, match=r"tensorrt_rtx 1\.\S+ makes no plan of g for sm89 \(.*NoSuchOperator"):
        build_plan(find_flavour(89), "g", model.SerializeToString(), 89)


@tensorrt_rtx
@pytest.mark.parametrize(
    ("precision", "compute", "sm", "words"),
    [("fp8", torch.bfloat16, 86, "HW-specific datatypes: fp8_e4m3"), ("bf16", torch.bfloat16, 75, "datatypes: b16")],
)
def test_tensorrt_says_what_a_generation_lacks(precision: str, compute: torch.dtype, sm: int, words: str) -> None:
    """The same is refused before any work: :func:`require_precision`."""
    spec = PRESETS["tiny"].dinov3
    kept: Any = gpu_precision(precision, spec, compute)
    model = dict(graphs_once(spec, kept))["dinov3.block"]
    with pytest.raises(PlanBuildFailed, match=words):
        build_plan(find_flavour(89), "dinov3.block", model.SerializeToString(), sm)


@tensorrt_rtx
def test_a_plan_is_one_stream(caplog: pytest.LogCaptureFixture) -> None:
    """Two branches of three products, which TensorRT would compute on two; the streams of layers stand in its log."""
    make, info = onnx.helper.make_node, onnx.helper.make_tensor_value_info
    inputs = [info("x", onnx.TensorProto.FLOAT, ["batch", 256, 256])]
    outputs = [info(branch + "3", onnx.TensorProto.FLOAT, ["batch", 256, 256]) for branch in "yz"]
    nodes = []
    for branch, layer in itertools.product("yz", "123"):
        before = "x" if layer == "1" else f"{branch}{int(layer) - 1}"
        inputs.append(info(f"w_{branch}{layer}", onnx.TensorProto.FLOAT, [256, 256]))
        nodes.append(make("MatMul", [before, f"w_{branch}{layer}"], [f"product_{branch}{layer}"]))
        nodes.append(make("Softmax", [f"product_{branch}{layer}"], [branch + layer]))
    graph = onnx.helper.make_graph(nodes, "g", inputs, outputs)
    model = onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 21)])
    with caplog.at_level("DEBUG", "i2l.engines.tensorrt"):
        build_plan(find_flavour(89), "g", model.SerializeToString(), 89)
    assert set(re.findall(r"StreamId: (\d+)", caplog.text)) == {"0"}


def test_each_generation_gets_the_tensorrt_that_knows_it(
    engines: MakeEngines, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Both are installed: TensorRT-RTX makes the plans for an RTX 40, TensorRT proper those for the H100 at hand."""
    own = Path(shutil.copytree(engines("tiny", "int8"), tmp_path / "engines"))
    for name, members in {"tensorrt_rtx": {"ComputeCapability": SimpleNamespace(SM89=89)}, "tensorrt": {}}.items():
        module = ModuleType(name)
        module.__spec__ = ModuleSpec(name, None)
        vars(module).update(members, __version__="1.0")
        monkeypatch.setitem(sys.modules, name, module)
    monkeypatch.setattr(exporting, "gpu_graphs", lambda *_: [(PRESETS["tiny"].dinov3, "dinov3.head", b"a graph")])
    monkeypatch.setattr(exporting, "build_plan", lambda flavour, *_: BuiltPlan(flavour.name.encode(), 0))
    result = build_plans(own, [89, 90])
    assert {sm: (str(flavour), flavour.reason) for sm, flavour in result.flavours.items()} == {
        89: ("tensorrt_rtx 1.0", "it knows sm89, so it goes before tensorrt"),
        90: ("tensorrt 1.0", "tensorrt_rtx does not know sm90"),
    }
    for sm, flavour in {89: "tensorrt_rtx", 90: "tensorrt"}.items():
        facts = result.plans[sm]["dinov3.head"]
        assert facts.key.flavour == flavour
        assert checked_plan(own, "dinov3.head", facts.key) == flavour.encode()


@tensorrt_rtx
def test_plans_of_a_wrong_precision_are_refused(engines: MakeEngines) -> None:
    with pytest.raises(PrecisionUnsupported, match=r"sm86 cannot compute with fp8 packs: .* --precision int8"):
        build_plans(engines("tiny", "fp8"), [86])


@tensorrt_rtx
def test_plans_that_are_finished_count(engines: MakeEngines, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ctrl-C in the third: two may be used, and six are left to do. Meanwhile no other build gets in."""
    own = Path(shutil.copytree(engines("tiny", "fp8"), tmp_path / "engines"))
    stale = plans_folder(own, 86, "int8")
    stale.mkdir(parents=True)
    (stale / FACTS).write_text("{}")
    calls = iter(range(100))

    def interrupted(*arguments: Any) -> BuiltPlan:
        with ThreadPoolExecutor(1) as other, pytest.raises(Timeout):
            other.submit(FileLock(own / LOCK).acquire, timeout=0).result()
        if next(calls) == 2:
            raise KeyboardInterrupt
        return build_plan(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr("i2l.export.backends.tensorrt.build_plan", interrupted)
        with pytest.raises(KeyboardInterrupt):
            build_plans(own, [89])
    finished = read_plans(plans_folder(own, 89, "fp8"))
    assert len(finished) == 2
    for graph, facts in finished.items():
        assert len(checked_plan(own, graph, facts.key)) == facts.nbytes
    assert build_plans(own, [89]).built == len(GRAPHS) - 2
    assert not stale.exists(), "plans for int8 packs, where the packs are fp8"


# --- which plan may be used --------------------------------------------------------------------------------------

KEY = PlanKey("aa" * 32, "bb" * 32, "tensorrt_rtx", "1.7.1", 89, "fp8", (1, 1, 8))


@pytest.fixture
def one_plan(tmp_path: Path) -> Path:
    folder = plans_folder(tmp_path, 89, "fp8")
    folder.mkdir(parents=True)
    (folder / "g.plan").write_bytes(b"plan")
    digest = hashlib.sha256(b"plan").hexdigest()
    row = {"key": vars(KEY), "sha256": digest, "nbytes": 4, "activation_bytes": 1}
    (folder / FACTS).write_text(json.dumps({"g": row}))
    return tmp_path


def test_the_wanted_plan(one_plan: Path) -> None:
    assert checked_plan(one_plan, "g", KEY) == b"plan"


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"graph": "cc" * 32}, "its graph is aaaaaaaaaaaa, not cccccccccccc"),
        ({"model": "cc" * 32}, "its model is bbbbbbbbbbbb, not cccccccccccc"),
        ({"flavour": "tensorrt", "version": "11.1"}, "its flavour is tensorrt_rtx, not tensorrt; its version is 1.7.1"),
        ({"profile": (1, 1, 16)}, r"its profile is \(1, 1, 8\), not \(1, 1, 16\)"),
    ],
)
def test_a_foreign_plan_is_not_used(one_plan: Path, change: dict[str, Any], words: str) -> None:
    with pytest.raises(PlanStale, match=f"g.plan cannot be used .*{words}.* --backend tensorrt --sm 89"):
        checked_plan(one_plan, "g", replace(KEY, **change))


@pytest.mark.parametrize("change", [{"sm": 120}, {"precision": "int8"}])
def test_no_plan_for_this_gpu(one_plan: Path, change: dict[str, Any]) -> None:
    with pytest.raises(PlanMissing, match="has no TensorRT plan of g for sm"):
        checked_plan(one_plan, "g", replace(KEY, **change))


def test_a_damaged_plan_is_not_used(one_plan: Path) -> None:
    (plans_folder(one_plan, 89, "fp8") / "g.plan").write_bytes(b"nalp")
    with pytest.raises(PlanStale, match="its content is not what was built"):
        checked_plan(one_plan, "g", KEY)
    (plans_folder(one_plan, 89, "fp8") / FACTS).write_text("[1]")
    with pytest.raises(PlanMissing):
        checked_plan(one_plan, "g", KEY)


class FakeDriver:
    """What the driver's library answers for one GPU, or for none."""

    def __init__(self, found: int) -> None:
        self.cuInit = lambda _: found
        self.cuDeviceGet = lambda *_: 0

    def cuDeviceGetAttribute(self, value: Any, number: int, _: Any) -> int:  # noqa: N802
        value._obj.value = {75: 12, 76: 0}[number]
        return 0


def test_the_generation_at_hand(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ctypes, "CDLL", lambda _: FakeDriver(0))
    assert current_sm() == 120
    monkeypatch.setattr(ctypes, "CDLL", lambda _: FakeDriver(100))
    with pytest.raises(BackendUnavailable, match="finds no GPU: name the generation instead, such as --sm 89"):
        current_sm()

    def absent(_: str) -> None:
        raise OSError

    monkeypatch.setattr(ctypes, "CDLL", absent)
    with pytest.raises(BackendUnavailable, match="no NVIDIA driver"):
        current_sm()


# --- what the graphs compute -------------------------------------------------------------------------------------


def pack_values(path: Path, step: str) -> dict[str, ort.OrtValue]:
    """A step's weights from a pack, as onnxruntime takes them."""
    values, data = {}, path.read_bytes()
    for name, info in read_header(path)[0].items():
        if name.startswith(f"{step}."):
            dtype, element = ELEMENT_TYPES[info.dtype]
            flat = np.frombuffer(data, dtype, info.nbytes // np.dtype(dtype).itemsize, info.offset)
            values[name.removeprefix(f"{step}.")] = ort.OrtValue.ortvalue_from_numpy_with_onnx_type(
                flat.reshape(info.shape).copy(), element
            )
    return values


def cpu_session(model: bytes) -> ort.InferenceSession:
    return ort.InferenceSession(model, providers=["CPUExecutionProvider"])


TOLERANCES = {
    "bf16": 1e-5,  # the checkpoint's values: two float32 programs
    "int8": 3e-2,  # weights of 8 bits, activations exact here
    "fp8": 8e-2,  # 3.7 % per product of two FP8 operands
}


EXACT = torch.float32


@pytest.mark.parametrize(
    ("precision", "compute", "families", "options"),
    [
        ("fp8", EXACT, FAMILIES, {}),
        ("int8", EXACT, FAMILIES, {}),
        ("bf16", EXACT, ("dinov3",), {}),
        ("int8", torch.float16, FAMILIES, {"outliers": True}),
    ],
)
def test_the_gpu_graphs_compute_what_torch_does(
    models: MakeModels,
    engines: MakeEngines,
    precision: str,
    compute: torch.dtype,
    families: tuple[Family, ...],
    options: dict[str, Any],
) -> None:
    """Each step from the reference's input; in float32 for bfloat16, which onnxruntime's CPU cannot multiply."""
    directory = engines("tiny", precision, **options)
    manifest = read_manifest(directory)
    folder = directory / manifest.build
    checkpoints = find_checkpoints(models("tiny", **options))
    worst: dict[str, float] = {}
    for family in families:
        model = manifest.models[family]
        graphs = {name: data for _, name, data in gpu_graphs([model.spec], precision, compute)}
        sessions = {
            name: ort.InferenceSession(data, providers=["CPUExecutionProvider"]) for name, data in graphs.items()
        }
        size = 192 if family == "adapter" else (3, 64, 64)
        shape = (2, size) if isinstance(size, int) else (2, *size)
        value = np.random.default_rng(0).standard_normal(shape).astype(np.float32)
        given = value
        steps = {step.name: step for chunk in model.chunks for step in chunk.steps}
        for name, wanted in reference_steps(checkpoints[family], value):
            session = sessions[steps[name].graph]
            feed = {session.get_inputs()[0].name: ort.OrtValue.ortvalue_from_numpy(np.ascontiguousarray(given))}
            names = [output.name for output in session.get_outputs()]
            found = session.run_with_ort_values(names, feed | pack_values(folder / model.pack, name))
            for output, y in zip(names, found, strict=True):
                error = step_error(name, y.numpy(), wanted[output]).relative_error
                worst[name] = max(error, worst.get(name, 0.0))
            if family != "adapter":
                (given,) = wanted.values()
    assert len(worst) == sum(len(c.steps) for family in families for c in manifest.models[family].chunks)
    assert max(worst.values()) < TOLERANCES[precision], worst
    assert (max(worst.values()) > 1e-3) == (precision != "bf16"), "is anything quantised?"


def test_two_levels_make_the_adapters_activations_finer() -> None:
    """One level of FP8 loses 2 to 3 % of an activation; two lose less than a tenth of that."""
    spec = PRESETS["tiny"].adapter
    kept = gpu_precision("fp8", spec, torch.float32)
    generator = torch.Generator().manual_seed(0)
    exact = torch.randn(32, 64, generator=generator)
    weight, scale = (piece for _, piece in kept.prepare(lambda start, count: exact[start : start + count], 32, 64))
    x = torch.randn(4, 64, generator=generator)
    wanted = (x @ (weight.float() * scale[:, None]).t()).numpy()
    errors = []
    for levels in (1, 2):
        module = replace(kept, levels=levels).linear("w", 64)  # type: ignore[type-var]

        class Alone(torch.nn.Module):
            def __init__(self, inner: Any) -> None:
                super().__init__()
                self.inner = inner

            def forward(self, hidden_in: torch.Tensor, weights: dict[str, torch.Tensor]) -> torch.Tensor:
                return self.inner(hidden_in, weights)

        stored = [("w.weight", "F8_E4M3", (32, 64)), ("w.scale", "F32", (32,))]
        model = linear_graph(Alone(module), stored)
        session = cpu_session(model)
        raw = weight.view(torch.uint8).numpy()
        feed = {
            session.get_inputs()[0].name: ort.OrtValue.ortvalue_from_numpy(x.numpy()),
            "w.weight": ort.OrtValue.ortvalue_from_numpy_with_onnx_type(raw, 17),
            "w.scale": ort.OrtValue.ortvalue_from_numpy(scale.numpy()),
        }
        (found,) = session.run_with_ort_values([session.get_outputs()[0].name], feed)
        errors.append(float(np.linalg.norm(found.numpy() - wanted) / np.linalg.norm(wanted)))
    assert 0.01 < errors[0] < 0.05
    assert errors[1] < errors[0] / 10


def linear_graph(module: torch.nn.Module, stored: list[tuple[str, str, tuple[int, ...]]]) -> bytes:
    """One linear as an ONNX file with named inputs."""
    dtypes = {"F8_E4M3": torch.float8_e4m3fn, "F32": torch.float32}
    weights = {name: torch.zeros(shape, dtype=dtypes[dtype]) for name, dtype, shape in stored}
    program = torch.export.export(module, (torch.zeros(4, 64), weights), strict=False)
    exported = torch.onnx.export(program, dynamo=True, opset_version=23, verbose=False)
    assert exported is not None
    for value, name in zip(exported.model.graph.inputs, ["hidden_in", *weights], strict=True):
        value.name = name
    return bytes(exported.model_proto.SerializeToString())


def test_no_row_overflows_float16(monkeypatch: pytest.MonkeyPatch) -> None:
    """The largest sums there can be: the widest matrix, all its weights the largest, and rows parallel to them.

    Half as much more, and the product were infinite. In torch, as onnxruntime's CPU keeps float16 products in float32.
    """
    monkeypatch.setattr(
        "i2l.export.precisions.rotated_int8.dequantised", lambda weight, scale, dtype: weight.to(dtype) * scale
    )
    width = PRESETS["full"].dinov3.intermediate
    linear = gpu_precision("int8", PRESETS["full"].dinov3, torch.float16).linear("w", width)
    weights = {"w.weight": torch.full((1, width, 8), 127, dtype=torch.int8), "w.scale": torch.full((1, 1, 8), 1e-3)}
    parallel = rotate(torch.ones(1, width), rotation(width).t().contiguous())
    x = torch.tensor([[1e-6], [1.0], [3e5]]) * parallel  # 3e5 is more than float16 holds
    wanted = rotate(x, rotation(width)).sum(dim=1, keepdim=True).expand(-1, 8) * 0.127
    torch.testing.assert_close(linear(x, weights), wanted, rtol=4e-3, atol=0)  # a few roundings of 2^-11


def test_polygraphy_runs_a_standalone_step(engines: MakeEngines) -> None:
    manifest = read_manifest(engines("tiny", "fp32"))
    step = engines("tiny", "fp32") / manifest.build / "dinov3" / "dinov3.block.1.onnx"
    command = ["run", str(step), "--onnxrt", "--input-shapes", "hidden_in:[1,21,128]"]
    program = "import sys; from polygraphy.tools import main; sys.exit(main())"  # its script may not be on the path
    run = subprocess.run([sys.executable, "-c", program, *command], capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stdout[-2000:] + run.stderr[-2000:]
    assert "PASSED" in run.stdout


def test_without_a_tensorrt_the_error_installs_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda _: None)
    with pytest.raises(ImportError, match=r"pip install \"i2l-engines\[tensorrt\]\""):
        find_flavour(89)
    assert str(Flavour("tensorrt_rtx", "1.7")) == "tensorrt_rtx 1.7"
