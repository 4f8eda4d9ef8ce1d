"""The ComfyUI nodes over stand-ins of what they touch of ComfyUI (tests/real_comfyui.py has the real one)."""

import importlib
import json
import logging
import os
import re
import shutil
import subprocess
import sys
import tracemalloc
from collections.abc import Callable, Iterator
from contextlib import suppress
from itertools import pairwise
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import onnx
import psutil
import pytest
import torch
from pathspec import PathSpec
from PIL import ExifTags, Image
from safetensors.torch import load_file, save_file

from comfy_standins import EnumWeightTarget, Host, InterruptProcessingException, ModelPatcher
from comfyui.server import prompt_from_workflow
from conftest import ADOBE, MakeEngines, MakeModels, graphs_once, matrix_profile, picture
from i2l import __version__
from i2l.comfy_host.errors import (
    MODEL_FILES,
    AdapterUnfit,
    FilenameRefused,
    ImagesUnfit,
    LoraDataForeign,
    LoraNotApplied,
    NodePackIncomplete,
    NoPlaceForEngines,
    OutputOutside,
)
from i2l.comfy_host.heat_map import CELL_HEIGHT, LEFT, TOP, VIRIDIS, cell_width
from i2l.engines.backends import BACKENDS
from i2l.engines.base import BackendStatus, CardFacts
from i2l.engines.cpu.backend import OrtEngine
from i2l.engines.cpu.converted import CPU_FOLDER
from i2l.engines.directory.manifest import MANIFEST, read_manifest
from i2l.errors import BackendUnavailable, CheckpointMissing, I2LError, ImageAbsurd, ImageUnreadable
from i2l.export.precisions.base import Precision
from i2l.lora.lora import Lora
from i2l.lora.norms import norm_table
from i2l.lora.reading import describe_lora, read_lora
from i2l.machine.wording import format_bytes
from i2l.runtime.cache import FOLDER_VARIABLE, default_cache_folder
from i2l.runtime.pipeline import Pipeline
from i2l.runtime.proof.judging import FormOutcome
from i2l.runtime.proof.proving import Prover
from i2l.runtime.proof.records import Record, Records, Subject
from i2l.specs import PRESETS, Spec

ROOT = Path(__file__).parents[2]
ADAPTER = PRESETS["tiny"].adapter
MODULES = {
    f"{component}.{index}.{target}"
    for component, blocks in ADAPTER.components
    for index in range(blocks)
    for target, _, _ in (*ADAPTER.attention_targets, *ADAPTER.feed_forward_targets)
}


@pytest.fixture
def home(models: MakeModels, engines: MakeEngines, tmp_path: Path) -> Path:
    """A base folder of ComfyUI: tiny checkpoints under the names that users give them, engines beside them."""
    i2l_folder = tmp_path / "models" / "I2L"
    i2l_folder.mkdir(parents=True)
    for folder in ("CLIPS", "Z-Image"):
        (i2l_folder / folder).symlink_to(models("tiny") / folder)
    (i2l_folder / "engines").symlink_to(engines("tiny", "fp32"))
    return tmp_path


@pytest.fixture
def host(home: Path, monkeypatch: pytest.MonkeyPatch) -> Host:
    host = Host(home)
    stay = {"comfy_standins", "i2l.comfy_host.errors"}  # what is raised must be what the tests imported
    for name in [*sys.modules]:
        if name.startswith(("i2l.comfy_", "comfy", "folder_paths", "server")) and name not in stay:
            monkeypatch.delitem(sys.modules, name)
    for name, module in host.install().items():
        monkeypatch.setitem(sys.modules, name, module)
    return host


@pytest.fixture
def nodes(host: Host) -> ModuleType:
    """``i2l.comfy_nodes``, imported afresh into this ComfyUI."""
    assert host.base.is_dir()
    return importlib.import_module("i2l.comfy_nodes")


@pytest.fixture
def apply(nodes: ModuleType) -> Callable[..., Any]:
    """``(patched_model, lora_data) = apply(images, strength, **widgets)`` through the loader, in inference mode."""
    (path,) = nodes.PipelineLoader().load("Z-Image-i2L.safetensors")

    def call(images: torch.Tensor | None = None, strength: float = 1.0, **widgets: object) -> Any:
        with torch.inference_mode():
            return nodes.Apply().apply(path, batch() if images is None else images, strength, **widgets)[:2]

    return call


def batch(count: int = 1, width: int = 48, height: int = 40) -> torch.Tensor:
    """An ``IMAGE``: pictures in [0, 1], as Load Image gives them."""
    arrays = [np.asarray(picture(width, height, seed), np.float32) / 255 for seed in range(count)]
    return torch.from_numpy(np.stack(arrays))


def shown_inputs(node: Any) -> dict[str, Any]:
    """What a person sees of a node's inputs."""
    groups = node.INPUT_TYPES()
    return {**groups["required"], **groups.get("optional", {})}


AS_COMFYUI_LOADS_PACKS = """
import importlib.metadata, importlib.util, sys
from itertools import pairwise
from pathlib import Path

class NotInstalled:  # the package is in ComfyUI's folder and nowhere else
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] == "i2l":
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)

sys.meta_path.insert(0, NotInstalled())
found = importlib.metadata.distribution
def distribution(name):
    if name == "i2l-engines":
        raise importlib.metadata.PackageNotFoundError(name)
    return found(name)
importlib.metadata.distribution = distribution

root, tests, base = sys.argv[1:]
sys.path.insert(0, tests)
from comfy_standins import Host
host = Host(Path(base))
host.install()
name = root.replace(".", "_x_")
spec = importlib.util.spec_from_file_location(name, root + "/__init__.py")
module = importlib.util.module_from_spec(spec)
sys.modules[name] = module
spec.loader.exec_module(module)
assert hasattr(module, "NODE_CLASS_MAPPINGS") and not hasattr(module, "comfy_entrypoint")
assert (Path(root) / module.WEB_DIRECTORY / "docs" / "ZImageI2L_Apply.md").is_file()
assert "onnxruntime" not in sys.modules  # starting ComfyUI must not pay for it
loader, apply, save = (module.NODE_CLASS_MAPPINGS[f"ZImageI2L_{n}"]() for n in ("PipelineLoader", "Apply", "Save"))
import torch
(path,) = loader.load("Z-Image-i2L.safetensors")
patched, data, hooks = apply.apply(path, torch.rand(2, 32, 32, 3), 1.0)
assert patched is None
save.save(data, "from a pack")
"""


def as_the_registry_ships_it(folder: Path) -> Path:
    """A copy of the repository without what is ignored."""
    ignored = [line for name in (".gitignore", ".comfyignore") for line in (ROOT / name).read_text().splitlines()]
    spec = PathSpec.from_lines("gitignore", [*ignored, ".git"])

    def left_out(place: str, names: list[str]) -> set[str]:
        paths = {name: Path(place).relative_to(ROOT) / name for name in names}
        folders = {name: f"{path.as_posix()}{'/' * (ROOT / path).is_dir()}" for name, path in paths.items()}
        return {name for name, path in folders.items() if spec.match_file(path)}

    return Path(shutil.copytree(ROOT, folder, ignore=left_out))


def test_the_pack_loads_and_runs_as_comfyui_loads_it(home: Path, tmp_path: Path) -> None:
    pack = as_the_registry_ships_it(tmp_path / "i2l v0.1")
    assert not (pack / "tests").exists()
    arguments = [str(pack), str(ROOT / "tests"), str(home)]
    run = subprocess.run(
        [sys.executable, "-c", AS_COMFYUI_LOADS_PACKS, *arguments], capture_output=True, text=True, check=False
    )
    assert run.returncode == 0, run.stderr
    facts = describe_lora(home / "output" / "loras" / "from a pack.safetensors")
    assert (facts["modules"], facts["rank"], facts["key_format"]) == (len(MODULES), 8, "comfyui")


def test_the_contracts_of_saved_workflows_hold(nodes: ModuleType) -> None:
    names = dict(nodes.NODE_DISPLAY_NAME_MAPPINGS)
    assert names.pop("ZImageI2L_LoadPicture") == "\N{FRAME WITH PICTURE} Z-Image i2L Load Picture"
    assert names == {
        "ZImageI2L_PipelineLoader": "\N{WRENCH} Z-Image i2L Loader",
        "ZImageI2L_Apply": "\N{ARTIST PALETTE} Z-Image i2L Apply",
        "ZImageI2L_Save": "\N{FLOPPY DISK} Save Z-Image i2L LoRA",
    }
    loader, apply, save = (nodes.NODE_CLASS_MAPPINGS[name] for name in names)
    assert {node.CATEGORY for node in (loader, apply, save)} == {"Z-Image-i2L"}
    files, options = loader.INPUT_TYPES()["required"]["model_filename"]
    assert (files, options["default"]) == (["Z-Image-i2L.safetensors"], "Z-Image-i2L.safetensors")
    assert (loader.RETURN_TYPES, loader.RETURN_NAMES) == (("ZI2L_FILE",), ("z_image_file_path",))
    inputs = apply.INPUT_TYPES()
    assert {name: kind for name, (kind, *_) in inputs["required"].items()} == {
        "z_image_file_path": "ZI2L_FILE",
        "images": "IMAGE",
        "strength": "FLOAT",
    }
    strength = inputs["required"]["strength"][1]
    assert (strength["default"], strength["min"], strength["max"], strength["step"]) == (1.0, 0.0, 10.0, 0.1)
    optional = {name: kind for name, (kind, *_) in inputs["optional"].items()}
    assert list(optional.items())[:3] == [
        ("model", "MODEL"),
        ("use_cpu_for_vision", "BOOLEAN"),
        ("vram_optimization", "BOOLEAN"),
    ]
    assert apply.RETURN_TYPES[:2] == ("MODEL", "lora_weights")  # links of saved workflows count by position
    assert apply.RETURN_NAMES[:2] == ("patched_model", "lora_data")
    assert {n: kind for n, (kind, *_) in save.INPUT_TYPES()["required"].items()} == {
        "lora_data": "lora_weights",
        "filename": "STRING",
    }
    assert save.INPUT_TYPES()["required"]["filename"][1]["default"] == "z_image_style_lora"
    assert (save.RETURN_TYPES, save.OUTPUT_NODE) == ((), True)


@pytest.mark.parametrize(
    ("values", "backend"),
    [([0.5], "auto"), ([0.5, True], "cpu"), ([0.5, False], "auto"), ([0.5, True, False], "cpu")],
)
def test_saved_widget_values_keep_their_meaning(nodes: ModuleType, values: list[object], backend: str) -> None:
    info = {name: {"input": node.INPUT_TYPES()} for name, node in nodes.NODE_CLASS_MAPPINGS.items()}
    node = {"id": 1, "type": "ZImageI2L_Apply", "inputs": [], "widgets_values": values}
    widgets = prompt_from_workflow({"nodes": [node], "links": []}, info)["1"]["inputs"]
    assert widgets.pop("strength") == 0.5
    adapter = nodes.PipelineLoader().load("Z-Image-i2L.safetensors")[0]
    nodes.Apply().apply(adapter, batch(), 0.5, **widgets)
    assert nodes.open_pipelines._key[2] == backend


@pytest.mark.parametrize("backend", ["cpu", pytest.param("webgpu", marks=pytest.mark.webgpu)])
def test_apply_takes_a_backend(nodes: ModuleType, backend: str) -> None:
    names, facts = nodes.Apply.INPUT_TYPES()["optional"]["backend"]
    assert {"auto", backend} <= set(names)
    assert "onnxruntime-ep-webgpu" in facts["tooltip"]
    adapter = nodes.PipelineLoader().load("Z-Image-i2L.safetensors")[0]
    _, data, _ = nodes.Apply().apply(adapter, batch(), 0.5, backend=backend)
    assert nodes.open_pipelines._pipeline.backend_name == backend
    assert data


def test_apply_gives_what_the_pipeline_gives(apply: Callable[..., Any], home: Path) -> None:
    images = batch(2)
    _, data = apply(images, 1.0)
    with Pipeline(home / "models" / "I2L" / "engines") as pipeline:
        lora = pipeline.lora_from_images([np.asarray(picture(48, 40, seed)) for seed in range(2)])
    assert {key.split(".lora_")[0] for key in data} == MODULES
    for module, (a, b) in lora.factors.items():
        for key, factor in ((f"{module}.lora_A.default.weight", a), (f"{module}.lora_B.default.weight", b)):
            assert data[key].dtype == torch.bfloat16
            assert torch.equal(data[key], torch.from_numpy(factor).to(torch.bfloat16))


def test_strength_is_linear(apply: Callable[..., Any]) -> None:
    (_, once), (_, twice) = apply(strength=1.0), apply(strength=2.0)
    for key in once:
        factor = 2.0 if ".lora_A." in key else 1.0
        assert torch.equal(twice[key], once[key] * factor)


def test_rank_reduces_what_goes_out(apply: Callable[..., Any]) -> None:
    _, whole = apply(batch(2))
    patched, data = apply(batch(2), rank=3, model=ModelPatcher(MODULES))
    for module in MODULES:
        down, up = (f"{module}.lora_{factor}.default.weight" for factor in "AB")
        assert data[down].shape[0] == data[up].shape[1] == 3
        assert torch.equal(patched.patches[module][0][1], data[down])
        wanted = whole[up].float() @ whole[down].float()
        error = torch.linalg.matrix_norm(data[up].float() @ data[down].float() - wanted)
        best = torch.linalg.svdvals(wanted)[3:].norm()  # no product of rank 3 is nearer (Eckart and Young)
        assert error <= best + 0.01 * torch.linalg.matrix_norm(wanted)  # bfloat16 rounds each factor by up to 0.4 %


def test_pixels_are_cut_off_as_in_save_image(nodes: ModuleType) -> None:
    (array,) = nodes.arrays_from_images(torch.tensor([[[[-0.5, 0.0, 0.999], [1.0, 1.5, 0.5]]]]))
    assert array.tolist() == [[[0, 0, 254], [255, 255, 127]]]


def test_every_eight_bit_value_survives_load_image(nodes: ModuleType) -> None:
    levels = np.arange(256, dtype=np.uint8).reshape(1, 16, 16)
    loaded = torch.from_numpy(np.array(levels).astype(np.float32) / 255.0)
    assert np.array_equal(nodes.arrays_from_images(loaded)[0], levels[0])


@pytest.mark.parametrize(("images", "passes"), [(1, 1), (4, 1), (5, 2)])
def test_progress_counts_every_step_once(
    apply: Callable[..., Any], host: Host, home: Path, images: int, passes: int
) -> None:
    apply(batch(images))
    manifest = json.loads((home / "models" / "I2L" / "engines" / "manifest.json").read_text())
    count = {name: sum(len(chunk["steps"]) for chunk in m["chunks"]) for name, m in manifest["models"].items()}
    steps = passes * (count["siglip2"] + count["dinov3"]) + count["adapter"]
    values = [value for value, _ in host.progress]
    assert values == sorted(values)
    assert {total for _, total in host.progress} == {steps}
    assert set(values) == set(range(steps + 1))


@pytest.mark.parametrize("total", [1, 1000, 9 << 30])
@pytest.mark.parametrize("graphs", [1, 12, 40])
@pytest.mark.usefixtures("host")
def test_the_bar_of_a_build_moves_with_every_graph_and_ends_at_its_end(graphs: int, total: int) -> None:
    place = importlib.import_module("i2l.comfy_host.progress").of_build(graphs)
    reports = [0] * graphs + [total * step // 8 for step in range(1, 9)]
    stands = [place("any", done, total) for done in reports]
    (of,) = {of for _, of in stands}
    shares = [value / of for value, _ in stands]
    assert shares == sorted(shares)
    assert all(before < after for before, after in pairwise(shares[:graphs]))
    assert shares[-1] == 1
    if total > 1000:
        assert 0.19 < shares[graphs - 1] < 0.21  # a fifth is a quarter of the rest


def test_a_second_run_opens_nothing(apply: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> None:
    apply()
    opened: list[object] = []
    for opening in (Pipeline, OrtEngine):
        monkeypatch.setattr(opening, "__init__", lambda *arguments, **_: opened.append(arguments))
    apply(strength=0.5)
    assert opened == []


def test_known_pictures_need_only_the_adapter(
    apply: Callable[..., Any], host: Host, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    _, before = apply(batch(2))
    host.unload_all_models()
    host.progress.clear()
    monkeypatch.delattr(Pipeline, "embed_pixels")
    _, after = apply(batch(2), 0.5)
    for key, value in before.items():
        assert torch.equal(after[key], value * (0.5 if ".lora_A." in key else 1.0))
    assert "rank 8 from 2 pictures (2 known before)" in caplog.text
    assert host.progress[0][0] > 0
    assert host.progress[-1][0] == host.progress[-1][1]  # the bar ends where it ends after a whole run


def test_embeddings_lie_in_comfyuis_user_folder(
    apply: Callable[..., Any], home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    chosen = default_cache_folder()
    apply()
    assert len(list(chosen.iterdir())) == 1
    assert not (home / "user").exists()
    monkeypatch.delenv(FOLDER_VARIABLE)
    monkeypatch.setenv("HOME", str(home / "nobody"))
    importlib.import_module("i2l.comfy_nodes").open_pipelines.close()
    apply()
    assert len(list((home / "user" / "__i2l" / "embeddings").iterdir())) == 1
    assert not (home / "nobody").exists()


def test_a_vram_budget_without_a_gpu_is_said_once(apply: Callable[..., Any], caplog: pytest.LogCaptureFixture) -> None:
    for _ in range(2):
        apply(vram_budget_gib=8.0)
    assert caplog.text.count("a VRAM budget of 8.00 GiB has no effect: the backend is cpu") == 1


@pytest.fixture
def fp8(home: Path, engines: MakeEngines) -> Path:
    """The home's engines are fp8, and no CPU has run them yet."""
    folder = home / "models" / "I2L" / "engines"
    folder.unlink()
    shutil.copytree(engines("tiny", "fp8"), folder, ignore=shutil.ignore_patterns(CPU_FOLDER))
    return folder


def test_converting_fp8_moves_the_bar(apply: Callable[..., Any], host: Host, fp8: Path) -> None:
    apply()
    assert (fp8 / CPU_FOLDER / "manifest.json").is_file()
    steps = host.progress[-1][1]
    opening = [value for value, total in host.progress if total != steps]
    assert len(opening) > 10
    assert opening == sorted(opening)
    assert host.progress[: len(opening)] == [(value, host.progress[0][1]) for value in opening]


def test_an_interrupt_stops_the_conversion_of_fp8(
    apply: Callable[..., Any], nodes: ModuleType, host: Host, fp8: Path
) -> None:
    host.interrupt_at = 3
    with pytest.raises(InterruptProcessingException):
        apply()
    assert len(host.progress) == 3
    assert not (fp8 / CPU_FOLDER / "manifest.json").exists()
    assert nodes.open_pipelines._pipeline is None
    assert len(apply()[1]) == 2 * len(MODULES)


def test_an_interrupt_acts_between_two_graphs(
    apply: Callable[..., Any], host: Host, home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    exported = []

    def export(spec: Spec, precision: Precision) -> Iterator[tuple[str, onnx.ModelProto]]:
        for named in graphs_once(spec, precision):  # type: ignore[arg-type]  # frozen, so it has a hash
            exported.append(named)
            yield named

    monkeypatch.setattr("i2l.export.build.export_graphs", export)
    host.interrupt_at = 2
    try:
        with pytest.raises(InterruptProcessingException):
            apply(precision="int8")
        assert len(exported) == 2
    finally:
        shutil.rmtree(home / "models" / "I2L" / "engines" / "Z-Image-i2L-int8")  # the folder is the session's


def test_freeing_memory_closes_the_pipeline(
    nodes: ModuleType, apply: Callable[..., Any], host: Host, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    _, before = apply()
    host.unload_all_models()
    assert nodes.open_pipelines._pipeline is None
    _, after = apply()
    assert all(torch.equal(before[key], after[key]) for key in before)
    assert len([r for r in caplog.records if r.message.startswith("i2l: opened")]) == 2


CARDS = {"cuda": CardFacts("a card"), "webgpu": CardFacts("a renderer", software=True)}
PACKS = object()
"""Room for all weights, and the margin."""


@pytest.mark.parametrize(
    ("backend", "budget_gib", "proven_ms", "asked"),
    [
        ("auto", 0.0, 49.0, [PACKS, 0]),
        ("auto", 0.0, 51.0, []),  # slower than the CPU: it is passed over
        ("auto", 1.5, None, [3 << 29, 0, 3 << 29, 0]),  # it proves itself, and is opened
        ("cuda", 1.5, None, [3 << 29, 0]),
        ("webgpu", 1.5, None, []),
        ("cpu", 1.5, 49.0, []),
    ],
)
def test_a_cards_memory_is_asked_of_comfyui(
    apply: Callable[..., Any],
    host: Host,
    home: Path,
    monkeypatch: pytest.MonkeyPatch,
    backend: str,
    budget_gib: float,
    proven_ms: float | None,
    asked: list[object],
) -> None:
    """Before a card proves itself or is opened, and of that card alone; which backends there are is asked once."""
    engines = home / "models" / "I2L" / "engines"
    shared = engines.resolve()
    engines.unlink()
    shutil.copytree(shared, engines)  # the record lies beside them
    (directory,) = (path.parent for path in engines.rglob(MANIFEST))
    manifest = read_manifest(directory)
    cpu = BackendStatus("cpu", works=True, reason="it is there")
    played = (BackendStatus(name, works=True, reason="played", cards=(card,)) for name, card in CARDS.items())
    found, looked = (cpu, *played), []

    def detect() -> tuple[BackendStatus, ...]:
        looked.append(len(host.asked))
        return found

    def record(subject: Subject, milliseconds: float) -> Record:
        return Record(subject, (FormOutcome(None, ms_per_image=milliseconds),), 50.0, False, 1.0, "today")

    def prove(_: Prover, subject: Subject, __: object) -> Record:
        assert host.asked
        return record(subject, 49.0)

    for module in ("engines.backends", "runtime.proof.deciding"):
        monkeypatch.setattr(f"i2l.{module}.detect_backends", detect)
    monkeypatch.setattr("i2l.comfy_host.pipelines.get_torch_device", lambda: torch.device("cuda"))
    monkeypatch.setattr(Prover, "prove", prove)
    monkeypatch.setattr(Prover, "cpu_time", lambda _: None)
    if proven_ms is not None:
        subject = Subject("cuda", CARDS["cuda"], manifest.build, __version__)
        Records(directory, manifest.build, home).keep(record(subject, proven_ms))
    with suppress(I2LError):  # there is no card
        apply(backend=backend, vram_budget_gib=budget_gib)
    packs = sum(manifest.files[model.pack].nbytes for model in manifest.models.values())
    assert host.asked == [packs + (2 << 30) if what is PACKS else what for what in asked]
    assert looked == [0]


@pytest.mark.parametrize("moves", [1, 4, 9])
def test_an_interrupt_acts_within_one_step(
    apply: Callable[..., Any], host: Host, monkeypatch: pytest.MonkeyPatch, moves: int
) -> None:
    _, whole = apply()
    shutil.rmtree(default_cache_folder())  # or only the adapter would be left to do
    runs: list[int] = []
    run = OrtEngine.run

    def counted(self: OrtEngine, *arguments: Any) -> Any:
        runs.append(len(host.progress))
        return run(self, *arguments)

    monkeypatch.setattr(OrtEngine, "run", counted)
    host.progress.clear()
    host.interrupt_at = moves
    with pytest.raises(InterruptProcessingException):
        apply()
    assert sum(progress >= moves for progress in runs) <= 1
    _, again = apply()
    assert all(torch.equal(whole[key], again[key]) for key in whole)


def test_an_image_that_cannot_be_used_is_an_error(apply: Callable[..., Any]) -> None:
    with pytest.raises(ImageAbsurd):
        apply(torch.rand(1, 8, 8, 3))


def test_a_backend_that_cannot_run_is_an_error(
    apply: Callable[..., Any], nodes: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise BackendUnavailable("cuda", "no such card", "buy one")

    monkeypatch.setattr("i2l.runtime.opening.choose_backend", refuse)
    with pytest.raises(BackendUnavailable, match="no such card"):
        apply()
    assert nodes.open_pipelines._pipeline is None


def test_an_adapter_that_is_not_there_is_named_with_its_place_and_its_source(
    nodes: ModuleType, host: Host, home: Path
) -> None:
    with pytest.raises(CheckpointMissing) as caught:
        nodes.PipelineLoader().load("mine.safetensors")
    place = home / "models" / "I2L" / "Z-Image" / "Z-Image-i2L.safetensors"
    assert str(caught.value).startswith("mine.safetensors is not there; no checkpoint for adapter under ")
    assert str(caught.value).endswith(f"put {MODEL_FILES['adapter'][1]} to {place}")
    assert host.texts == [str(caught.value)]


def test_a_file_that_is_no_adapter_is_named_for_what_it_is(nodes: ModuleType, home: Path) -> None:
    adapters = home / "models" / "I2L" / "Z-Image"
    original = adapters.resolve()
    adapters.unlink()
    shutil.copytree(original, adapters)
    save_file({"layers.0.attention.to_q.lora_A.weight": torch.ones(4, 8)}, adapters / "my_lora.safetensors")
    (adapters / "encoder.safetensors").symlink_to(home / "models" / "I2L" / "CLIPS" / "DINOv3-7B.safetensors")
    for name, what in (("my_lora", "a LoRA"), ("encoder", "DINOv3-7B")):
        with pytest.raises(AdapterUnfit, match=rf"^{name}.safetensors in \S+ is {what}, not Z-Image-i2L: choose "):
            nodes.PipelineLoader().load(f"{name}.safetensors")
        with pytest.raises(AdapterUnfit):  # a prompt of the API may name the path itself
            nodes.Apply().apply(str(adapters / f"{name}.safetensors"), batch(), 1.0)


def test_extra_model_paths_are_searched(host: Host, home: Path) -> None:
    more = home / "big disk"
    (more / "Z-Image").mkdir(parents=True)
    shutil.copyfile(home / "models" / "I2L" / "Z-Image" / "Z-Image-i2L.safetensors", more / "Z-Image" / "b.safetensors")
    (more / "Z-Image" / "notes.txt").touch()
    host._add_folder("I2L", str(more))  # extra_model_paths.yaml is read before packs are loaded
    nodes = importlib.import_module("i2l.comfy_nodes")
    names = nodes.PipelineLoader.INPUT_TYPES()["required"]["model_filename"][0]
    assert names == ["Z-Image-i2L.safetensors", "b.safetensors"]
    (path,) = nodes.PipelineLoader().load("b.safetensors")
    assert Path(path).parent == more / "Z-Image"
    assert nodes.root_of(Path(path)) == more
    found = importlib.import_module("i2l.comfy_host.engines").find_encoders([more, home / "models" / "I2L"])
    assert set(found) == {"siglip2", "dinov3"}


PLACES = ["share", "models/I2L", "output/i2l", "user/__i2l", "big disk"]
"""Where engines may go, best first, for an adapter on a share."""


@pytest.fixture
def share(host: Host, home: Path) -> Path:
    """A second folder of extra_model_paths.yaml, and a third."""
    for name in ("share", "big disk"):
        (home / name / "Z-Image").mkdir(parents=True)
        host._add_folder("I2L", str(home / name))
    adapter = home / "models" / "I2L" / "Z-Image" / "Z-Image-i2L.safetensors"
    shutil.copyfile(adapter, home / "share" / "Z-Image" / "mine.safetensors")
    (home / "models" / "I2L" / "engines").unlink()
    return home / "share"


def test_the_order_of_places_for_engines(nodes: ModuleType, share: Path, home: Path) -> None:
    assert nodes.engine_folders(share) == [home / place / "engines" for place in PLACES]
    at_home = nodes.engine_folders(home / "models" / "I2L")
    assert at_home == [home / PLACES[index] / "engines" for index in (1, 2, 3, 0, 4)]


@pytest.mark.parametrize("first", range(1, len(PLACES)))
def test_engines_go_to_the_first_place_that_can_be_written(
    nodes: ModuleType, share: Path, home: Path, first: int, monkeypatch: pytest.MonkeyPatch, caplog: Any
) -> None:
    """Said once with its reason; nothing is tried below a place that was refused."""

    class Built(Exception):
        pass

    def build(_: object, engines: Path, **__: object) -> None:
        raise Built(engines.relative_to(home).as_posix())

    refused = [home / place / "engines" for place in PLACES[:first]]
    host_engines = importlib.import_module("i2l.comfy_host.engines")
    monkeypatch.setattr(host_engines, "can_write", lambda place: place not in refused)
    monkeypatch.setattr("i2l.export.build.build_engines", build)
    caplog.set_level(logging.INFO)
    (path,) = nodes.PipelineLoader().load("mine.safetensors")
    with pytest.raises(Built, match=f"{PLACES[first]}/engines/mine-int8"):
        nodes.Apply().apply(path, batch(), 1.0)
    said = [
        record.getMessage() for record in caplog.records if "cannot be written, so engines go to" in record.getMessage()
    ]
    assert len(said) == 1
    assert share.name in said[0]


def test_no_place_for_engines_is_an_error(nodes: ModuleType, share: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    host_engines = importlib.import_module("i2l.comfy_host.engines")
    monkeypatch.setattr(host_engines, "can_write", lambda _: False)
    (path,) = nodes.PipelineLoader().load("mine.safetensors")
    with pytest.raises(NoPlaceForEngines, match=share.name):
        nodes.Apply().apply(path, batch(), 1.0)


def test_an_empty_folder_offers_the_default_name(nodes: ModuleType, home: Path) -> None:
    (home / "models" / "I2L" / "Z-Image").unlink()
    assert nodes.PipelineLoader.INPUT_TYPES()["required"]["model_filename"][0] == ["Z-Image-i2L.safetensors"]


def test_engines_are_built_on_first_use(
    apply: Callable[..., Any], host: Host, home: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    _, data = apply(precision="bf16")
    engines = home / "models" / "I2L" / "engines" / "Z-Image-i2L-bf16"
    try:
        assert json.loads((engines / "manifest.json").read_text())["precision"] == "bf16"
        total = host.progress[0][1]
        built = [value for value, of in host.progress if of == total]
        assert built == sorted(built)
        assert 0.95 * total < built[-1] <= total  # the total counts headers and padding, which nobody reports
        exporting = [text for text in host.texts if text.startswith("building engines, once: exporting ")]
        assert len(exporting) > 8  # the bar and the text move with every graph
        assert any(text.startswith("building engines, once: packing dinov3, bf16, ") for text in host.texts)
        assert any(text.startswith("computing adapter, ") for text in host.texts)
        assert re.fullmatch(r"rank 4 from 1 picture \(0 known before\) in [\d.]+ s", host.texts[-1])
        assert "building them in" in caplog.text
        assert set(data) == set(apply(precision="bf16")[1])
        assert caplog.text.count("building them in") == 1
    finally:
        shutil.rmtree(engines)  # the folder is the session's


def test_changed_checkpoints_are_built_anew(
    apply: Callable[..., Any], home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = mapped_packs()  # a pipeline of another test may still be open
    apply()
    assert mapped_packs() > before
    adapters = home / "models" / "I2L" / "Z-Image"
    original = adapters.resolve()
    adapters.unlink()
    shutil.copytree(original, adapters, copy_function=shutil.copyfile)  # with a new modification time

    class Built(Exception):
        pass

    def build(_: object, engines: Path, **options: object) -> None:
        assert options["precision"] == "auto"
        assert mapped_packs() == before  # Windows would let none of them be removed
        raise Built(engines.name)

    monkeypatch.setattr("i2l.export.build.build_engines", build)
    with pytest.raises(Built, match="Z-Image-i2L-int8"):
        apply()


def mapped_packs() -> int:
    """How many packs are in this process's address space."""
    maps = psutil.Process().memory_maps(grouped=False)
    return sum(Path(found.path).name == "weights.safetensors" for found in maps)


def test_engines_serve_when_the_encoders_are_gone(
    apply: Callable[..., Any], home: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (home / "models" / "I2L" / "CLIPS").unlink()
    _, data = apply()
    assert len(data) == 2 * len(MODULES)
    assert "unchecked" in caplog.text
    (home / "models" / "I2L" / "engines").unlink()
    with pytest.raises(CheckpointMissing) as caught:
        apply()
    for family in ("siglip2", "dinov3"):
        assert f"put {MODEL_FILES[family][1]} to {home / 'models' / 'I2L'}" in str(caught.value)
    assert "make-checkpoints" not in str(caught.value)  # ComfyUI's Python has no i2l command


def test_the_patched_model_carries_the_lora(apply: Callable[..., Any]) -> None:
    model = ModelPatcher(MODULES)
    patched, data = apply(strength=3.0, model=model)
    assert model.patches == {}
    assert patched.patches.keys() == MODULES
    for module, ((strength, down, up),) in patched.patches.items():
        assert strength == 1.0  # it is in the factors already
        assert torch.equal(down, data[f"{module}.lora_A.default.weight"])
        assert torch.equal(up, data[f"{module}.lora_B.default.weight"])


def test_a_second_lora_on_the_same_model_counts_by_itself(apply: Callable[..., Any]) -> None:
    patched, _ = apply(model=ModelPatcher(MODULES))
    twice, _ = apply(model=patched)
    assert all(len(patches) == 2 for patches in twice.patches.values())


def test_a_model_that_takes_a_part_is_an_error(apply: Callable[..., Any]) -> None:
    with pytest.raises(LoraNotApplied, match=f"only 1 of the LoRA's {len(MODULES)} modules"):
        apply(model=ModelPatcher({min(MODULES)}))


def test_the_hooks_carry_the_lora_and_ask_for_a_model_that_takes_it_whole(nodes: ModuleType) -> None:
    (path,) = nodes.PipelineLoader().load("Z-Image-i2L.safetensors")
    _, data, hooks = nodes.Apply().apply(path, batch(), 1.0)
    assert hooks.strengths == (1.0, 0.0)
    assert {key: value for key, value in hooks.weights.items() if ".lora_A." in key}.keys() == {
        f"diffusion_model.{module}.lora_A.weight" for module in MODULES
    }
    for module in MODULES:
        up = hooks.weights[f"diffusion_model.{module}.lora_B.weight"]
        assert torch.equal(up, data[f"{module}.lora_B.default.weight"])
    model, clip = EnumWeightTarget.Model, EnumWeightTarget.Clip
    assert hooks.add_hook_patches(ModelPatcher(MODULES), model)
    assert hooks.add_hook_patches(ModelPatcher(set()), clip)  # a text encoder has none of its modules
    with pytest.raises(LoraNotApplied, match=f"only 1 of the LoRA's {len(MODULES)} modules"):
        hooks.add_hook_patches(ModelPatcher({min(MODULES)}), model)


@pytest.fixture
def save(nodes: ModuleType) -> Callable[..., Path]:
    """``save(data, name) -> path`` of the file."""
    return lambda data, name: Path(nodes.Save().save(data, name)["ui"]["text"][0])


def test_the_file_has_the_values_and_the_metadata(
    apply: Callable[..., Any], save: Callable[..., Path], home: Path
) -> None:
    _, data = apply()
    path = save(data, "style")
    assert path == home / "output" / "loras" / "style.safetensors"
    tensors = load_file(path)
    assert len(tensors) == len(data)
    for key, value in data.items():
        module, factor = key.split(".lora_")
        assert torch.equal(tensors[f"diffusion_model.{module}.lora_{factor[0]}.weight"], value)
    metadata = describe_lora(path)["metadata"]
    assert isinstance(metadata, dict)
    assert {"i2l.images", "i2l.engines", "ss_base_model_version"} <= metadata.keys()


def test_a_dictionary_of_another_pack_is_saved(save: Callable[..., Path]) -> None:
    data = {
        "layers.0.attention.to_q.lora_A.default.weight": torch.ones(4, 8, dtype=torch.float16),
        "layers.0.attention.to_q.lora_B.default.weight": torch.ones(6, 4, dtype=torch.float16),
    }
    assert describe_lora(save(data, "style"))["modules"] == 1


def test_no_lora_is_an_error_not_an_empty_file(save: Callable[..., Path], home: Path) -> None:
    with pytest.raises(LoraDataForeign):
        save({}, "style")
    assert not list(home.rglob("style*"))


def test_names_that_are_taken_get_numbers(apply: Callable[..., Any], save: Callable[..., Path]) -> None:
    _, data = apply()
    paths = [save(data, name) for name in ("style", "style", "style.safetensors", "portraits/style", "in %year%/style")]
    loras = paths[0].parent
    assert [str(path.relative_to(loras)) for path in paths] == [
        "style.safetensors",
        "style_00002.safetensors",
        "style_00003.safetensors",
        "portraits/style.safetensors",
        "in 2026/style.safetensors",
    ]


@pytest.mark.parametrize(
    "name",
    [
        "../style",
        "../../style",
        "a/../../style",
        "/tmp/style",
        "../loras2/style",
        "",
        "  ",
        ".",
        "..",
        ".safetensors",
        "a\0b",
    ],
)
def test_names_that_lead_out_are_refused(nodes: ModuleType, home: Path, name: str) -> None:
    data = {"m.lora_A.default.weight": torch.ones(1, 1), "m.lora_B.default.weight": torch.ones(1, 1)}
    with pytest.raises(OutputOutside, match="below"):
        nodes.Save().save(data, name)
    assert not (home / "output").exists()


def test_a_link_that_leads_out_is_refused(nodes: ModuleType, home: Path) -> None:
    (home / "output" / "loras").mkdir(parents=True)
    (home / "elsewhere").mkdir()
    (home / "output" / "loras" / "link").symlink_to(home / "elsewhere")
    data = {"m.lora_A.default.weight": torch.ones(1, 1), "m.lora_B.default.weight": torch.ones(1, 1)}
    with pytest.raises(OutputOutside):
        nodes.Save().save(data, "link/style")


@pytest.mark.parametrize("path", sorted((ROOT / "example_workflows").glob("*.json")), ids=lambda path: path.stem)
def test_example_workflows_hang_together(nodes: ModuleType, path: Path) -> None:
    workflow = json.loads(path.read_text())
    assert path.with_suffix(".jpg").is_file()
    by_id = {node["id"]: node for node in workflow["nodes"]}
    for number, source, out, target, into, kind in workflow["links"]:
        assert number in by_id[source]["outputs"][out]["links"]
        assert by_id[target]["inputs"][into]["link"] == number
        assert by_id[source]["outputs"][out]["type"] == by_id[target]["inputs"][into]["type"] == kind
    for node in workflow["nodes"]:
        if node["type"] in nodes.NODE_CLASS_MAPPINGS:
            inputs = shown_inputs(nodes.NODE_CLASS_MAPPINGS[node["type"]])
            defaults = [rest[0]["default"] for _, *rest in inputs.values() if rest and "default" in rest[0]]
            assert node["widgets_values"] == defaults
            sockets = [slot["name"] for slot in node["inputs"]]
            assert sockets == [name for name, (kind, *_) in inputs.items() if isinstance(kind, str) and name in sockets]
            outputs = getattr(nodes.NODE_CLASS_MAPPINGS[node["type"]], "RETURN_NAMES", ())
            assert tuple(out["name"] for out in node["outputs"]) == outputs
        if node["type"].endswith("Loader"):
            assert node["properties"]["models"][0]["name"] == node["widgets_values"][0]


# --- what a person sees -------------------------------------------------------------------------------------------


def test_save_shows_the_file_its_facts_and_where_it_acts(
    apply: Callable[..., Any], nodes: ModuleType, host: Host, home: Path
) -> None:
    _, data = apply(batch(2), rank=3)
    shown = nodes.Save().save(data, "portraits/style")["ui"]
    path = home / "output" / "loras" / "portraits" / "style.safetensors"
    size = format_bytes(path.stat().st_size)
    assert host.texts[-1].startswith(
        f"output/loras/portraits/style.safetensors\nrank 3, {size} from 2 pictures (0 known before) in "
    )
    assert "rank 8 reduced to 3: relative error of B @ A" in host.texts[-1]
    (preview,) = shown["images"]
    with Image.open(home / "temp" / preview["filename"]) as image:
        norms = norm_table(read_lora(path).lora).norms
        row, column = np.unravel_index(np.nanargmax(norms), norms.shape)
        centre = (LEFT + int(column) * cell_width(norms.shape[1]) + 4, TOP + int(row) * CELL_HEIGHT + 4)
        assert image.getpixel(centre) == VIRIDIS[-1]


def test_an_error_and_an_interrupt_stand_on_the_node(apply: Callable[..., Any], host: Host, nodes: ModuleType) -> None:
    with pytest.raises(ImageAbsurd) as caught:
        apply(torch.rand(1, 8, 8, 3))
    assert host.texts[-1] == str(caught.value)
    host.interrupt_at = len(host.progress) + 1
    with pytest.raises(InterruptProcessingException):
        apply()
    assert host.texts[-1] == "interrupted"
    with pytest.raises(LoraDataForeign) as foreign:
        nodes.Save().save({}, "style")
    assert host.texts[-1] == str(foreign.value)


def test_a_card_that_proves_itself_is_spoken_of(
    apply: Callable[..., Any], host: Host, home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The text moves with its phases, so that nobody takes it for hung; the CPU goes on, as this card crashes."""
    engines = home / "models" / "I2L" / "engines"
    shared = engines.resolve()
    engines.unlink()
    shutil.copytree(shared, engines)  # the record lies beside them
    monkeypatch.syspath_prepend(Path(__file__).parents[1] / "runtime" / "proof")  # where the played card lies
    monkeypatch.setitem(BACKENDS, "played", "played_card")
    monkeypatch.setenv("PLAYED_CARD", json.dumps({"fault": "crashes"}))
    _, data = apply()
    assert data.made
    proving = [text for text in host.texts if text.startswith("proving played, ")]
    assert proving[0] == "proving played, 0 %"
    assert len(proving) > 1
    assert any(text.startswith("timing the CPU, ") for text in host.texts)


def test_a_prompt_of_the_api_has_nobody_to_tell(apply: Callable[..., Any], host: Host) -> None:
    host.client_id = None
    apply()
    assert host.texts == []


def test_every_socket_and_widget_says_what_it_is(nodes: ModuleType) -> None:
    for name, node in nodes.NODE_CLASS_MAPPINGS.items():
        inputs = shown_inputs(node)
        assert [name for name, (_, *options) in inputs.items() if not (options and options[0].get("tooltip"))] == []
        assert len(getattr(node, "OUTPUT_TOOLTIPS", ())) == len(node.RETURN_TYPES)
        assert any("image to lora" in alias for alias in node.SEARCH_ALIASES)
        page = (ROOT / nodes.WEB_DIRECTORY / "docs" / f"{name}.md").read_text(encoding="utf-8")
        assert page.startswith(f"# {nodes.NODE_DISPLAY_NAME_MAPPINGS[name][2:]}\n")
        if name == "ZImageI2L_Apply":
            words = set(page.split("**"))
            assert (inputs.keys() | set(node.RETURN_NAMES)) - words == {"z_image_file_path"}  # the Loader's page has it
    widgets = nodes.Apply.INPUT_TYPES()["optional"]
    assert [name for name, (_, options) in widgets.items() if not options.get("advanced")] == ["model"]


# --- what other nodes hand over ------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_any_floating_image_is_the_same_in_float32(nodes: ModuleType, dtype: torch.dtype) -> None:
    values = torch.rand(2, 20, 30, 3).to(dtype)
    found = nodes.arrays_from_images(values)
    for array, wanted in zip(found, nodes.arrays_from_images(values.float()), strict=True):
        assert (array.dtype, array.shape) == (np.dtype(np.uint8), (20, 30, 3))
        np.testing.assert_array_equal(array, wanted)


def test_a_batch_is_not_copied_as_floats(nodes: ModuleType) -> None:
    """Eight pictures of 12 megapixels are 1.1 GB in float32: bytes go on, and the floats of one at a time."""
    images = torch.rand(8, 300, 400, 3)
    one_bytes = 4 * 300 * 400 * 3
    tracemalloc.start()
    try:
        arrays = nodes.arrays_from_images(images)
        _, peak_bytes = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert sum(array.nbytes for array in arrays) == 2 * one_bytes
    assert peak_bytes < 2 * one_bytes + 3.5 * one_bytes  # the scaled, the cut off, the finite ones


def test_one_channel_is_grey(nodes: ModuleType) -> None:
    (array,) = nodes.arrays_from_images(torch.full((1, 20, 30, 1), 0.5))
    assert (array.shape, array[0, 0]) == ((20, 30), 127)


@pytest.mark.parametrize(
    ("images", "words"),
    [
        (torch.full((2, 20, 30, 3), float("nan")), "not finite .* in picture 1 of 2"),
        (torch.full((1, 20, 30, 3), float("inf")), "not finite"),
        (torch.zeros(0, 20, 30, 3), "empty batch"),
        (torch.zeros(1, 20, 30, 5), r"\[1, 20, 30, 5\]"),
        (torch.zeros(20, 30, 3), r"\[20, 30, 3\]"),
        (torch.zeros(1, 20, 30, 3, dtype=torch.int32), "int32"),
    ],
)
def test_what_is_no_batch_of_pictures_is_said(nodes: ModuleType, images: torch.Tensor, words: str) -> None:
    with pytest.raises(ImagesUnfit, match=words) as caught:
        nodes.arrays_from_images(images)
    assert "i2l run" not in str(caught.value)


@pytest.mark.parametrize("letters", [250, 300, 5000])
def test_a_long_name_is_explained(nodes: ModuleType, letters: int) -> None:
    factors = {"a.0.b": (np.ones((2, 3), np.float32), np.ones((4, 2), np.float32))}
    data = nodes.tensors_from_lora(Lora(factors), "diffsynth")
    with pytest.raises(FilenameRefused, match="give a shorter"):
        nodes.Save().save(data, "x" * letters)


# --- pictures with their colours ----------------------------------------------------------------------------------


@pytest.fixture
def photo(home: Path) -> Path:
    """In ``input``: sideways, with a profile whose gamma is not that of sRGB."""
    path = home / "input" / "photo.jpg"
    path.parent.mkdir()
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = 6
    picture(48, 40).save(path, exif=exif, icc_profile=matrix_profile(b"RGB ", 1.0, ADOBE))
    return path


@pytest.mark.parametrize("ignore_icc", [False, True])
def test_load_picture_gives_what_the_command_gives(
    nodes: ModuleType, apply: Callable[..., Any], save: Callable[..., Path], photo: Path, home: Path, ignore_icc: bool
) -> None:
    (images,) = nodes.LoadPicture().load("photo.jpg", ignore_icc)
    assert (images.shape, images.dtype) == ((1, 48, 40, 3), torch.float32)
    prompt = Prompt(LOADED | {"1": picture_node(ignore_icc)})
    found = describe_lora(save(apply(images, prompt=prompt, unique_id="7")[1], "style"))["metadata"]
    with Pipeline(home / "models" / "I2L" / "engines") as pipeline:
        wanted = pipeline.lora_from_images([photo], ignore_icc=ignore_icc).metadata
    for key in ("i2l.images", "i2l.icc"):
        assert found[key] == wanted[key]  # type: ignore[index]
    assert wanted["i2l.icc"] == ("ignored" if ignore_icc else "converted to sRGB")


def picture_node(ignore_icc: object) -> dict[str, Any]:
    return {"class_type": "ZImageI2L_LoadPicture", "inputs": {"image": "photo.jpg", "ignore_icc": ignore_icc}}


class Prompt(dict[str, dict[str, Any]]):
    """ComfyUI's of a prompt of the API."""

    def get_node(self, node_id: str) -> dict[str, Any]:
        return self[node_id]


LOADED = {"7": {"class_type": "ZImageI2L_Apply", "inputs": {"images": ["1", 0], "z_image_file_path": ["9", 0]}}}
CORE: dict[str, tuple[str, ...]] = {
    "LoadImage": ("IMAGE", "MASK"),
    "BatchImagesNode": ("IMAGE",),
    "ImageScale": ("IMAGE",),
    "Reroute": ("*",),
    "Switch": ("COMFY_MATCHTYPE_V3",),
    "PrimitiveInt": ("INT",),
    "VAEDecode": ("IMAGE",),
    "KSampler": ("LATENT",),
}
CONVERTED, IGNORED = "converted to sRGB", "ignored"
MIXED = "converted to sRGB in some pictures, ignored in others"
LOAD_IMAGE = {"class_type": "LoadImage", "inputs": {"image": "a.png"}}


def between(kind: str, **inputs: object) -> dict[str, Any]:
    return {"class_type": kind, "inputs": inputs}


@pytest.mark.parametrize(
    ("above", "said"),
    [
        ({"1": picture_node(False)}, CONVERTED),
        ({"1": picture_node(True)}, IGNORED),
        ({"1": LOAD_IMAGE}, IGNORED),
        ({"1": picture_node(["2", 0]), "2": between("PrimitiveBoolean")}, "unknown, as another node decided"),
        # a size that comes from elsewhere is no picture
        (
            {
                "1": between("ImageScale", image=["2", 0], width=["3", 0]),
                "2": picture_node(False),
                "3": between("PrimitiveInt", value=8),
            },
            CONVERTED,
        ),
        (
            {
                "1": between("BatchImagesNode", **{"images.image0": ["2", 0], "images.image1": ["3", 0]}),
                "2": between("Reroute", **{"": ["4", 0]}),
                "3": between("Switch", on_true=["4", 0], on_false=["5", 0]),
                "4": picture_node(False),
                "5": picture_node(False),
            },
            CONVERTED,
        ),
        (
            {
                "1": between("BatchImagesNode", **{"images.image0": ["2", 0], "images.image1": ["3", 0]}),
                "2": picture_node(False),
                "3": LOAD_IMAGE,
            },
            MIXED,
        ),
        ({"1": between("VAEDecode", samples=["2", 0]), "2": between("KSampler", latent_image=["1", 0])}, IGNORED),
        # a circle ends; ComfyUI refuses it anyway
        ({"1": between("Reroute", **{"": ["2", 0]}), "2": between("Reroute", **{"": ["1", 0]})}, IGNORED),
    ],
)
def test_the_metadata_says_what_became_of_profiles(
    nodes: ModuleType, host: Host, above: dict[str, dict[str, Any]], said: str
) -> None:
    host.nodes |= {name: type(name, (), {"RETURN_TYPES": types}) for name, types in CORE.items()}
    host.nodes |= nodes.NODE_CLASS_MAPPINGS | {"PrimitiveBoolean": type("P", (), {"RETURN_TYPES": ("BOOLEAN",)})}
    assert nodes.profiles_mark(Prompt(LOADED | above), "7") == {"i2l.icc": said}


def test_load_picture_lists_what_it_reads_and_sees_a_change(nodes: ModuleType, photo: Path) -> None:
    for name in ("10.HEIC", "2.jxl", "notes.txt", "clip.mov"):
        (photo.parent / name).touch()
    (photo.parent / "no suffix").write_bytes(photo.read_bytes())
    (photo.parent / "folder").mkdir()
    names, options = nodes.LoadPicture.INPUT_TYPES()["required"]["image"]
    assert names == ["2.jxl", "10.HEIC", "no suffix", "photo.jpg"]
    assert options["image_upload"]
    check, changed = nodes.LoadPicture.VALIDATE_INPUTS, nodes.LoadPicture.IS_CHANGED
    assert check(image="photo.jpg") is True
    assert "not in ComfyUI's input folder" in check(image="gone.jpg")
    before = changed(image="photo.jpg", ignore_icc=False)
    assert before == changed(image="no suffix", ignore_icc=False)
    photo.write_bytes(photo.read_bytes() + b"\0")
    assert before != changed(image="photo.jpg", ignore_icc=False)
    if sys.platform != "win32":
        os.mkfifo(photo.parent / "pipe.jpg")
        assert not changed(image="pipe.jpg", ignore_icc=False)  # which would wait for who writes there


def test_what_load_picture_cannot_read_stands_on_the_node(
    nodes: ModuleType, host: Host, photo: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    photo.write_bytes(photo.read_bytes()[:300])
    with pytest.raises(ImageUnreadable, match=r"photo\.jpg"):
        nodes.LoadPicture().load("photo.jpg", False)
    assert "photo.jpg cannot be read" in host.texts[-1]
    monkeypatch.setitem(sys.modules, "pillow_heif", None)
    (photo.parent / "a.heic").write_bytes(b"\0\0\0\x18ftypheic\0\0\0\0mif1heic")
    with pytest.raises(NodePackIncomplete, match="pillow-heif is not installed in ComfyUI's Python") as caught:
        nodes.LoadPicture().load("a.heic", False)
    assert "requirements.txt" in str(caught.value)
