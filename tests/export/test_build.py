"""Building an engines directory: what comes out, when it is made anew, and what a build that dies leaves behind."""

import errno
import hashlib
import json
import os
import shutil
import signal
import stat
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open

import i2l
from conftest import MakeEngines, MakeModels, graphs_once
from i2l.engines.cpu.backend import CpuBackend
from i2l.engines.directory.hashing import REGION_BYTES, FileFacts
from i2l.engines.directory.manifest import MANIFEST, Manifest, Step, manifest_to_json, read_manifest
from i2l.engines.directory.ownership import LOCK
from i2l.engines.plugin.graph_paths import PLUGIN_FOLDER
from i2l.errors import CheckpointsUnfit, DiskFull, EnginesMissing, ManifestInvalid, OutputUnwritable
from i2l.export import build, build_folder
from i2l.export.backends import cpu as cpuplan
from i2l.export.backends.build_lock import only_build
from i2l.export.build import build_engines
from i2l.export.packs.packs import write_pack
from i2l.export.packs.planning import plan_pack
from i2l.export.precisions.base import Precision
from i2l.export.precisions.choosing import PRECISIONS, precision_for
from i2l.machine import files
from i2l.machine.progress import Report
from i2l.machine.wording import format_bytes, format_path
from i2l.runtime.pipeline import Pipeline
from i2l.specs import PRESETS, AdapterSpec, EncoderSpec, Family, Spec

TINY = PRESETS["tiny"]
GRAPHS: dict[str, Family] = {
    "siglip2.embed": "siglip2",
    "siglip2.block": "siglip2",
    "siglip2.head": "siglip2",
    "dinov3.embed": "dinov3",
    "dinov3.block": "dinov3",
    "dinov3.head": "dinov3",
    "adapter.attention": "adapter",
    "adapter.feed_forward": "adapter",
}
ELEMENTS = {"F32": "FLOAT", "BF16": "BFLOAT16", "F8_E4M3": "FLOAT8E4M3FN", "I8": "INT8", "U8": "UINT8"}
"""safetensors dtype -> ONNX element type."""


@pytest.fixture
def own(engines: MakeEngines, tmp_path: Path) -> Path:
    """A tiny fp32 engines directory that a test may change."""
    return Path(shutil.copytree(engines("tiny", "fp32"), tmp_path / "engines"))


@pytest.fixture
def lora_of(photo: Path) -> Callable[[Path], bytes]:
    """All values of the LoRA that an engines directory makes of the photo."""

    def values(directory: Path) -> bytes:
        with Pipeline(directory) as pipeline:
            factors = pipeline.lora_from_images([photo]).factors
        return b"".join(factor.tobytes() for module in sorted(factors) for factor in factors[module])

    return values


def builds(directory: Path) -> list[str]:
    """The build folders in an engines directory."""
    return sorted(path.name for path in directory.iterdir() if path.is_dir())


def times(directory: Path) -> dict[Path, int]:
    """Every file's modification time."""
    return {path: path.stat().st_mtime_ns for path in directory.rglob("*")}


# --- when to build -----------------------------------------------------------------------------------------------


def test_building_again_does_nothing(models: MakeModels, own: Path) -> None:
    before = times(own)
    result = build_engines(models("tiny"), own, precision="fp32")
    assert not result.rebuilt
    assert times(own) == before


@pytest.mark.parametrize("change", [{"precision": "int8"}, {"blocks_per_chunk": 2}, {"force": True}])
def test_a_changed_wish_rebuilds(models: MakeModels, own: Path, change: dict[str, Any]) -> None:
    before = builds(own)
    result = build_engines(models("tiny"), own, **({"precision": "fp32"} | change))
    assert result.rebuilt
    assert read_manifest(own) == result.manifest
    assert builds(own) == [result.manifest.build] != before


def test_a_touched_checkpoint_rebuilds(models: MakeModels, own: Path, tmp_path: Path) -> None:
    mine = Path(shutil.copytree(models("tiny"), tmp_path / "models"))
    assert not build_engines(mine, own, precision="fp32").rebuilt
    os.utime(next(mine.rglob("DINOv3*")))
    assert build_engines(mine, own, precision="fp32").rebuilt


def test_checkpoints_under_other_names_are_the_same_checkpoints(models: MakeModels, own: Path, tmp_path: Path) -> None:
    for index, path in enumerate(sorted(models("tiny").rglob("*.safetensors"))):
        folder = tmp_path / "models" / f"folder {index}"
        folder.mkdir(parents=True)
        shutil.copy2(path, folder / "model.safetensors")
    assert not build_engines(tmp_path / "models", own, precision="fp32").rebuilt


def test_a_lost_file_rebuilds(models: MakeModels, own: Path, lora_of: Callable[[Path], bytes]) -> None:
    wanted = lora_of(own)
    next(own.rglob("dinov3/weights.safetensors")).unlink()
    assert build_engines(models("tiny"), own, precision="fp32").rebuilt
    assert lora_of(own) == wanted


@pytest.mark.parametrize("text", [b"", b"\xff\xfe\x00\x80", b'{"format": 999}'])
def test_a_broken_manifest_rebuilds(models: MakeModels, own: Path, text: bytes) -> None:
    (own / MANIFEST).write_bytes(text)
    assert build_engines(models("tiny"), own, precision="fp32").rebuilt
    assert len(builds(own)) == 1


def test_blocks_per_chunk_changes_no_bit(
    models: MakeModels, own: Path, tmp_path: Path, lora_of: Callable[[Path], bytes]
) -> None:
    wanted = lora_of(own)
    for count, chunks in ((2, 4), (100, 3)):  # dinov3: embed, three blocks, head
        build_engines(models("tiny"), tmp_path / str(count), precision="fp32", blocks_per_chunk=count)
        manifest = read_manifest(tmp_path / str(count))
        assert len(manifest.models["dinov3"].chunks) == chunks
        assert lora_of(tmp_path / str(count)) == wanted


# --- builds that die ---------------------------------------------------------------------------------------------


@pytest.fixture
def dying_build(monkeypatch: pytest.MonkeyPatch) -> Callable[[BaseException], None]:
    """``dying_build(error)``: from now on the second pack of a build raises it."""

    def install(error: BaseException) -> None:
        calls = iter(range(100))

        def dying(*arguments: Any) -> FileFacts:
            if next(calls) == 1:
                raise error
            return write_pack(*arguments)

        monkeypatch.setattr(build, "write_pack", dying)

    return install


DEATHS = [
    pytest.param(OSError(errno.ENOSPC, "No space left on device"), DiskFull, id="disk full"),
    pytest.param(OSError(errno.EROFS, "Read-only file system"), OutputUnwritable, id="read-only"),
    pytest.param(KeyboardInterrupt(), KeyboardInterrupt, id="Ctrl-C"),
    pytest.param(MemoryError(), MemoryError, id="no memory"),
]


@pytest.mark.parametrize(("error", "raised"), DEATHS)
def test_a_build_that_dies_leaves_the_previous_engines(
    models: MakeModels,
    own: Path,
    lora_of: Callable[[Path], bytes],
    dying_build: Callable[[BaseException], None],
    error: BaseException,
    raised: type[BaseException],
) -> None:
    wanted, before = lora_of(own), times(own).keys()
    dying_build(error)
    with pytest.raises(raised):
        build_engines(models("tiny"), own, precision="fp32", force=True)
    assert times(own).keys() == before
    assert lora_of(own) == wanted


@pytest.mark.parametrize(("error", "raised"), DEATHS)
def test_a_first_build_that_dies_leaves_its_lock_only(
    models: MakeModels,
    tmp_path: Path,
    dying_build: Callable[[BaseException], None],
    error: BaseException,
    raised: type[BaseException],
) -> None:
    dying_build(error)
    with pytest.raises(raised):
        build_engines(models("tiny"), tmp_path / "new", precision="fp32")
    assert [path.name for path in (tmp_path / "new").iterdir()] == [LOCK]
    with pytest.raises(EnginesMissing):
        read_manifest(tmp_path / "new")


def test_a_write_that_fails_in_the_background_ends_the_build(
    models: MakeModels, own: Path, lora_of: Callable[[Path], bytes]
) -> None:
    wanted = lora_of(own)
    if sys.platform == "win32":
        pytest.skip("Windows has no such call")
    import resource

    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, limits[1]))  # dinov3's pack is larger: the system says EFBIG
    try:
        with pytest.raises(OutputUnwritable, match="File too large"):
            build_engines(models("tiny"), own, precision="fp32", force=True)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert len(builds(own)) == 1
    assert lora_of(own) == wanted


def test_interrupted_while_removing_the_old_build(
    models: MakeModels, own: Path, monkeypatch: pytest.MonkeyPatch, lora_of: Callable[[Path], bytes]
) -> None:
    """By then the manifest names the new build: it must stay, and the next build removes the old one."""
    wanted, old = lora_of(own), builds(own)
    real = build_folder.remove_dead

    def interrupted(engines: Path, keep: tuple[str, ...]) -> None:
        if keep != tuple(old):
            raise KeyboardInterrupt
        real(engines, keep)

    with monkeypatch.context() as patch:
        patch.setattr(build_folder, "remove_dead", interrupted)
        with pytest.raises(KeyboardInterrupt):
            build_engines(models("tiny"), own, precision="fp32", force=True)
    assert read_manifest(own).build not in old
    assert lora_of(own) == wanted
    result = build_engines(models("tiny"), own, precision="fp32", force=True)
    assert builds(own) == [result.manifest.build]


# The real command but for the graphs: exporting them takes 7 s, and it is while packs are written that builds die.
KILLED_BUILD = """
import sys
from pathlib import Path
from i2l.export import build
from i2l.export.backends import cpu as cpuplan
def write_graphs(folder, checkpoints, *_):
    for family in checkpoints:
        (folder / family).mkdir()
    return {}
build.write_graphs = write_graphs
build.build_engines(Path(sys.argv[1]), Path(sys.argv[2]), precision="fp32", force=True)
"""


def test_a_killed_build_leaves_the_previous_engines(
    models: MakeModels, own: Path, lora_of: Callable[[Path], bytes]
) -> None:
    if sys.platform == "win32":
        pytest.skip("Windows has no such call")
    wanted, old = lora_of(own), set(builds(own))
    process = subprocess.Popen([sys.executable, "-c", KILLED_BUILD, str(models("small")), str(own)])
    deadline = time.monotonic() + 60
    while not [path for path in own.rglob("weights.safetensors") if path.relative_to(own).parts[0] not in old]:
        assert process.poll() is None, "the build ended before it could be killed"
        assert time.monotonic() < deadline
        time.sleep(0.002)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    assert len(builds(own)) == 2  # the kill came in the middle
    assert lora_of(own) == wanted
    result = build_engines(models("tiny"), own, precision="fp32", force=True)
    assert builds(own) == [result.manifest.build]
    assert lora_of(own) == wanted


def test_a_build_waits_for_another_one(
    models: MakeModels, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """The second build must not remove the first one's folder, and finds its work done."""
    second = ThreadPoolExecutor(1)  # a lock on another open file keeps threads apart as it does processes
    started: list[Future[build.BuildResult]] = []
    real = build.write_graphs

    def write_graphs(folder: Path, *arguments: Any) -> dict[str, str]:
        if not started:
            started.append(second.submit(build_engines, models("tiny"), tmp_path / "new", precision="fp32"))
            deadline = time.monotonic() + 60
            while "waiting for it" not in caplog.text and not started[0].done():
                assert time.monotonic() < deadline
                time.sleep(0.01)
        assert folder.is_dir()
        return real(folder, *arguments)

    monkeypatch.setattr(build, "write_graphs", write_graphs)
    with second:
        first = build_engines(models("tiny"), tmp_path / "new", precision="fp32")
        assert first.rebuilt
        assert not started[0].result().rebuilt
    assert f"another build is at work in {format_path(tmp_path / 'new')}: waiting for it" in caplog.text
    assert builds(tmp_path / "new") == [first.manifest.build]


def test_up_to_date_engines_need_no_lock(models: MakeModels, own: Path) -> None:
    with only_build(own), ThreadPoolExecutor(1) as other:  # the thread that holds the lock may take it again
        building = other.submit(build_engines, models("tiny"), own, precision="fp32")
        assert not building.result(timeout=60).rebuilt


def test_another_user_may_build_where_the_folder_allows_it(tmp_path: Path) -> None:
    old = os.umask(0o077)
    try:
        with only_build(tmp_path):
            assert stat.S_IMODE((tmp_path / LOCK).stat().st_mode) == 0o666
    finally:
        os.umask(old)


def test_progress_ends_at_its_total(models: MakeModels, own: Path) -> None:
    told: list[tuple[str, int, int]] = []
    report: Report = lambda *facts: told.append(facts)  # noqa: E731
    build_engines(models("tiny"), own, precision="int8", force=True, report=report)
    assert [total for _, _, total in told] == [told[-1][1]] * len(told)
    assert [done for _, done, _ in told] == sorted(done for _, done, _ in told)


@pytest.mark.parametrize(
    ("precision", "last"), [("int8", "exporting adapter"), ("fp8", "exporting adapter for the CPU")]
)
def test_a_report_may_stop_the_build_after_any_graph(
    models: MakeModels, own: Path, monkeypatch: pytest.MonkeyPatch, precision: str, last: str
) -> None:
    before, exported, seen = times(own), [0], set()

    def export(spec: Spec, kept: Precision) -> Iterator[tuple[str, onnx.ModelProto]]:
        for named in graphs_once(spec, kept):  # type: ignore[arg-type]  # frozen, so it has a hash
            exported[0] += 1
            yield named

    class Stopped(Exception):
        pass

    def report(stage: str, done: int, total: int) -> None:  # noqa: ARG001 - a Report
        seen.add(exported[0])
        if stage == last:
            raise Stopped

    for module in (build, cpuplan):
        monkeypatch.setattr(module, "export_graphs", export)
    with pytest.raises(Stopped):
        build_engines(models("tiny"), own, precision=precision, force=True, report=report)
    assert exported[0] >= 6  # both encoders' at least
    assert seen == set(range(exported[0] + 1))
    assert times(own) == before


def test_checkpoints_that_do_not_fit_together(models: MakeModels, tmp_path: Path) -> None:
    shutil.copytree(models("tiny"), tmp_path / "models")
    dinov3 = "CLIPS/DINOv3-7B.safetensors"
    shutil.copy(models("small") / dinov3, tmp_path / "models" / dinov3)
    with pytest.raises(CheckpointsUnfit, match=r"embeddings of 192 values, but .* give 64 \+ 512 = 576: put three"):
        build_engines(tmp_path / "models", tmp_path / "new")
    assert not (tmp_path / "new").exists()


def test_a_full_disk_is_found_before_any_work(models: MakeModels, own: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    manifest, before = read_manifest(own), times(own)
    needed = sum(manifest.files[model.pack].nbytes for model in manifest.models.values())
    monkeypatch.setattr(files, "free_bytes", lambda _: 1000)
    with pytest.raises(DiskFull) as caught:
        build_engines(models("tiny"), own, precision="fp32", force=True)
    assert f"{format_bytes(needed)} needed, 1000 B free" in str(caught.value)
    assert times(own).keys() == before.keys()


def test_leftovers_of_dead_builds_go_before_space_is_asked_for(
    models: MakeModels, own: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    current = builds(own)
    shutil.copytree(own / current[0], own / "build-dead")
    seen: list[list[str]] = []
    monkeypatch.setattr(build_folder, "require_free", lambda directory, _: seen.append(builds(directory)))
    build_engines(models("tiny"), own, precision="fp32", force=True)
    assert seen == [current]


def test_folders_of_other_people_stay(models: MakeModels, own: Path) -> None:
    (own / "build-linux").mkdir()
    (own / "build-linux" / "program").write_bytes(b"work of a year")
    build_engines(models("tiny"), own, precision="fp32", force=True)
    assert (own / "build-linux" / "program").read_bytes() == b"work of a year"


def test_the_engines_directory_is_a_file(models: MakeModels, photo: Path, tmp_path: Path) -> None:
    path = Path(shutil.copy(photo, tmp_path))
    with pytest.raises(OutputUnwritable, match="File exists"):
        build_engines(models("tiny"), path, precision="fp32")
    assert path.read_bytes() == photo.read_bytes()


# --- what is in the directory ------------------------------------------------------------------------------------


@pytest.fixture(params=PRECISIONS)
def built(engines: MakeEngines, request: pytest.FixtureRequest) -> tuple[Path, Manifest]:
    """The build folder and the manifest of tiny engines in each precision."""
    directory = engines("tiny", request.param)
    manifest = read_manifest(directory)
    return directory / manifest.build, manifest


def test_the_manifest_knows_every_file(built: tuple[Path, Manifest]) -> None:
    folder, manifest = built

    def tree_hash(data: bytes) -> str:
        regions = [hashlib.sha256(data[i : i + REGION_BYTES]) for i in range(0, len(data), REGION_BYTES)]
        digests = b"".join(region.digest() for region in regions)
        return regions[0].hexdigest() if len(regions) == 1 else hashlib.sha256(digests).hexdigest()

    paths = [path for path in folder.rglob("*") if path.is_file()]
    found = {path.relative_to(folder).as_posix(): tree_hash(path.read_bytes()) for path in paths}
    assert {name: facts.sha256 for name, facts in manifest.files.items()} == found


def steps(manifest: Manifest) -> list[tuple[Family, Step]]:
    """Every step with its model, in the order of running."""
    return [(family, step) for family, m in manifest.models.items() for chunk in m.chunks for step in chunk.steps]


def shape_of(value: onnx.ValueInfoProto) -> list[int | str]:
    return [dim.dim_param or dim.dim_value for dim in value.type.tensor_type.shape.dim]


def documented(graph: str) -> tuple[dict[str, list[int | str]], dict[str, list[int | str]]]:
    """The activations that go in and come out of a tiny graph, with their shapes."""
    if graph.startswith("adapter."):
        spec = TINY.adapter
        targets = spec.attention_targets if graph == "adapter.attention" else spec.feed_forward_targets
        outputs: dict[str, list[int | str]] = {}
        for target, in_features, out_features in targets:
            outputs[f"{target}.A"] = ["batch", spec.rank, in_features]
            outputs[f"{target}.B"] = ["batch", out_features, spec.rank]
        return {"embedding": ["batch", spec.embedding]}, outputs
    family, kind = graph.split(".")
    encoder = TINY.siglip2 if family == "siglip2" else TINY.dinov3
    hidden: list[int | str] = ["batch", encoder.tokens, encoder.hidden]
    pixels: list[int | str] = ["batch", 3, encoder.image_size, encoder.image_size]
    return (
        {"pixel_values": pixels} if kind == "embed" else {"hidden_in": hidden},
        {"embedding": ["batch", encoder.hidden]} if kind == "head" else {"hidden_out": hidden},
    )


@pytest.mark.parametrize("graph", GRAPHS)
def test_a_graph_takes_and_gives_what_is_documented(built: tuple[Path, Manifest], graph: str) -> None:
    folder, manifest = built
    model = onnx.load(folder / manifest.graphs[graph])
    inputs, outputs = documented(graph)
    assert {value.name: shape_of(value) for value in model.graph.input[:1]} == inputs
    assert {value.name: shape_of(value) for value in model.graph.output} == outputs


@pytest.mark.parametrize("graph", GRAPHS)
def test_a_graphs_weights_are_the_packs_tensors(built: tuple[Path, Manifest], graph: str) -> None:
    """Names, shapes and dtypes, for every step of the graph; the pack as the safetensors library reads it."""
    folder, manifest = built
    wanted = {
        value.name: (onnx.TensorProto.DataType.Name(value.type.tensor_type.elem_type), shape_of(value))
        for value in onnx.load(folder / manifest.graphs[graph]).graph.input[1:]
    }
    assert wanted
    names = [step.name for _, step in steps(manifest) if step.graph == graph]
    assert names
    with safe_open(folder / manifest.models[GRAPHS[graph]].pack, framework="numpy") as pack:
        for name in names:
            slices = {key: pack.get_slice(key) for key in pack.keys() if key.startswith(f"{name}.")}  # noqa: SIM118
            found = {key: (ELEMENTS[part.get_dtype()], part.get_shape()) for key, part in slices.items()}
            assert {key.removeprefix(f"{name}."): facts for key, facts in found.items()} == wanted


def test_every_onnx_file_passes_the_checker(built: tuple[Path, Manifest]) -> None:
    folder, manifest = built
    paths = sorted(folder.rglob("*.onnx"))
    for_plugins = [path for path in paths if PLUGIN_FOLDER in path.parts]  # two forms where there is attention
    for_the_cpu = len(manifest.graphs) if manifest.precision == "fp8" else 0
    assert len(paths) == len(manifest.graphs) + len(steps(manifest)) + for_the_cpu + len(for_plugins)
    assert bool(for_plugins) == (manifest.precision in {"int8", "fp32"})
    for path in paths:
        onnx.checker.check_model(str(path), full_check=True)


def test_onnx_files_do_not_tell_where_they_were_made(built: tuple[Path, Manifest]) -> None:
    folder, _ = built
    places = [str(Path(module.__file__ or "").parent.parent).encode() for module in (i2l, torch)]
    assert not [path.name for path in folder.rglob("*.onnx") for place in places if place in path.read_bytes()]


@pytest.mark.parametrize("graph", GRAPHS)
def test_a_standalone_form_computes_what_the_graph_computes(built: tuple[Path, Manifest], graph: str) -> None:
    folder, manifest = built
    family = GRAPHS[graph]
    step = [step for _, step in steps(manifest) if step.graph == graph][-1]
    (shape,) = documented(graph)[0].values()
    x = np.random.default_rng(0).standard_normal([2, *map(int, shape[1:])], np.float32)
    backend = CpuBackend(folder.parent, manifest)
    engine = backend.engine(graph)
    wanted = {
        name: backend.array(value)
        for name, value in engine.run(backend.value(x), backend.store(family).weights(step)).items()
    }
    backend.close()
    session = ort.InferenceSession(folder / family / f"{step.name}.onnx", providers=["CPUExecutionProvider"])
    (activation,) = session.get_inputs()
    names = [output.name for output in session.get_outputs()]
    assert names == list(wanted)
    for name, found in zip(names, session.run(names, {activation.name: x}), strict=True):
        scale = float(np.abs(wanted[name]).max())
        np.testing.assert_allclose(found, wanted[name], rtol=0, atol=1e-5 * scale)  # constant folding reorders sums


def test_standalone_forms_of_a_graph_differ_in_their_weights(engines: MakeEngines) -> None:
    """Else a wrong offset could hide: every block pointing at the first one's bytes."""
    manifest = read_manifest(engines("tiny", "fp32"))
    folder = engines("tiny", "fp32") / manifest.build
    x = np.random.default_rng(0).standard_normal((1, TINY.dinov3.tokens, TINY.dinov3.hidden), np.float32)
    results = []
    for index in range(TINY.dinov3.depth):
        session = ort.InferenceSession(folder / "dinov3" / f"dinov3.block.{index}.onnx")
        results.append(session.run(None, {"hidden_in": x})[0])
    assert all(not np.allclose(results[0], other) for other in results[1:])


def test_no_bytes_are_copied_into_standalone_forms(built: tuple[Path, Manifest]) -> None:
    folder, manifest = built
    for family, step in steps(manifest):
        model = onnx.load(folder / family / f"{step.name}.onnx", load_external_data=False)
        graph = folder / manifest.graphs[step.graph]
        inside = {tensor.name for tensor in model.graph.initializer if not tensor.external_data}
        assert inside == {tensor.name for tensor in onnx.load(graph).graph.initializer}
        found = {
            tensor.name: {entry.key: entry.value for entry in tensor.external_data}
            for tensor in model.graph.initializer
            if tensor.external_data
        }
        prefix = f"{step.name}."
        assert found == {
            name.removeprefix(prefix): {
                "location": "weights.safetensors",
                "offset": str(info.offset),
                "length": str(info.nbytes),
            }
            for name, info in manifest.models[family].tensors.items()
            if name.startswith(prefix)
        }


def test_polygraphy_runs_a_standalone_form(engines: MakeEngines) -> None:
    manifest = read_manifest(engines("tiny", "int8"))
    path = engines("tiny", "int8") / manifest.build / "dinov3" / "dinov3.block.1.onnx"
    command = [str(Path(sys.executable).with_name("polygraphy")), "run", "--onnxrt", str(path)]
    run = subprocess.run(command, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
    assert "hidden_out [dtype=float32, shape=(1, 21, 128)]" in run.stdout


# --- planning ----------------------------------------------------------------------------------------------------

encoder_specs = st.builds(
    EncoderSpec,
    family=st.sampled_from(["siglip2", "dinov3"]),
    hidden=st.sampled_from([32, 96]),
    depth=st.integers(1, 13),
    heads=st.just(4),
    intermediate=st.sampled_from([40, 64]),
    image_size=st.just(32),
    registers=st.just(4),
)
adapter_specs = st.builds(
    AdapterSpec,
    family=st.just("adapter"),
    embedding=st.sampled_from([48, 64]),
    compress=st.just(8),
    rank=st.just(4),
    hidden=st.just(32),
    feed_forward=st.just(40),
    layers=st.integers(1, 12),
    refiners=st.integers(1, 3),
)


@settings(max_examples=40, deadline=None)
@given(st.one_of(encoder_specs, adapter_specs), st.sampled_from(PRECISIONS), st.integers(1, 15))
def test_chunks_are_the_pack_in_running_order(spec: Spec, precision: str, blocks_per_chunk: int) -> None:
    plan = plan_pack(spec, precision_for(precision, spec), blocks_per_chunk)
    in_chunks = [step.name for chunk in plan.chunks for step in chunk.steps]
    assert in_chunks == [step.name for step in plan.steps]
    end = 0
    for chunk in plan.chunks:
        assert chunk.offset % 4096 == 0
        assert chunk.offset >= end
        end = chunk.offset + chunk.nbytes
        names = {step.name for step in chunk.steps}
        for name, info in plan.layout.tensors.items():
            mine = any(name.startswith(f"{step}.") for step in names)
            assert mine == (chunk.offset <= info.offset < end and not name.startswith(".pad."))
            assert not mine or (info.offset + info.nbytes <= end and info.offset % 256 == 0)
    assert end == plan.layout.nbytes


@settings(max_examples=40, deadline=None)
@given(encoder_specs, st.integers(1, 15))
def test_chunks_hold_as_many_blocks_as_asked(spec: EncoderSpec, blocks_per_chunk: int) -> None:
    plan = plan_pack(spec, precision_for("fp32", spec), blocks_per_chunk)
    counts = [len(chunk.steps) for chunk in plan.chunks]
    full, rest = divmod(spec.depth, blocks_per_chunk)
    assert counts == [1, *[blocks_per_chunk] * full, *([rest] if rest else []), 1]  # embed and head stay alone


# --- the manifest ------------------------------------------------------------------------------------------------


def test_a_manifest_comes_back_as_it_was(engines: MakeEngines, tmp_path: Path) -> None:
    manifest = replace(read_manifest(engines("tiny", "int8")), created="2000-01-01T00:00:00+00:00", blocks_per_chunk=7)
    (tmp_path / MANIFEST).write_text(manifest_to_json(manifest), encoding="utf-8")
    assert read_manifest(tmp_path) == manifest


@pytest.fixture
def manifest_values(engines: MakeEngines) -> dict[str, Any]:
    """The JSON of a good manifest."""
    values: dict[str, Any] = json.loads((engines("tiny", "fp32") / MANIFEST).read_text(encoding="utf-8"))
    return values


FIELDS = ["format", "build", "build_key", "precision", "models", "graphs", "files", "blocks_per_chunk", "versions"]


@pytest.mark.parametrize("field", FIELDS)
def test_a_manifest_without_a_field_is_invalid(manifest_values: dict[str, Any], tmp_path: Path, field: str) -> None:
    del manifest_values[field]
    (tmp_path / MANIFEST).write_text(json.dumps(manifest_values), encoding="utf-8")
    with pytest.raises(ManifestInvalid):
        read_manifest(tmp_path)


@pytest.mark.parametrize("version", [0, 2, 99, "1", None])
def test_a_manifest_of_another_format_is_invalid(
    manifest_values: dict[str, Any], tmp_path: Path, version: object
) -> None:
    (tmp_path / MANIFEST).write_text(json.dumps(manifest_values | {"format": version}), encoding="utf-8")
    with pytest.raises(ManifestInvalid, match="i2l build-engines"):
        read_manifest(tmp_path)


@pytest.mark.parametrize(
    "content",
    [b"", b"{", b"[]", b"null", b"7", b"\x00", b"\xff\xfe\x00\x80", b"[" * 100_000, b'{"format": 1}', b'"' * 3],
    ids=range(10),
)
def test_garbage_is_an_invalid_manifest(tmp_path: Path, content: bytes) -> None:
    (tmp_path / MANIFEST).write_bytes(content)
    with pytest.raises(ManifestInvalid, match="i2l build-engines"):
        read_manifest(tmp_path)


def test_a_folder_is_an_invalid_manifest(tmp_path: Path) -> None:
    (tmp_path / MANIFEST).mkdir()
    with pytest.raises(ManifestInvalid, match="Is a directory"):
        read_manifest(tmp_path)


@pytest.mark.parametrize("path", ["absent", "photo.jpg", "photo.jpg/below"])
def test_no_manifest_is_a_missing_engines_directory(tmp_path: Path, photo: Path, path: str) -> None:
    shutil.copy(photo, tmp_path / "photo.jpg")
    with pytest.raises(EnginesMissing, match="i2l build-engines"):
        read_manifest(tmp_path / path)


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=5,
)


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_a_manifest_with_a_foreign_value_is_read_or_invalid(
    data: st.DataObject, engines: MakeEngines, tmp_path_factory: pytest.TempPathFactory
) -> None:
    values = json.loads((engines("tiny", "fp32") / MANIFEST).read_text(encoding="utf-8"))
    parent, key = values, data.draw(st.sampled_from(sorted(values)))
    while isinstance(parent[key], dict | list) and parent[key] and data.draw(st.booleans()):
        parent = parent[key]
        key = data.draw(st.sampled_from(sorted(parent) if isinstance(parent, dict) else range(len(parent))))
    parent[key] = data.draw(json_values)
    directory = tmp_path_factory.mktemp("manifest")
    (directory / MANIFEST).write_text(json.dumps(values), encoding="utf-8")
    try:
        manifest = read_manifest(directory)
    except ManifestInvalid:
        return
    assert isinstance(manifest, Manifest)
