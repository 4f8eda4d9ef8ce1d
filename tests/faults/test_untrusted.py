"""An engines directory is untrusted input (faults 2, 7 to 13, 21 of the first injection)."""

import json
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from conftest import MakeEngines, MakeModels, picture
from i2l.engines.cpu.converted import PLAN_FOLDER
from i2l.engines.directory import hashing, integrity
from i2l.engines.directory.integrity import CHECKED, file_facts
from i2l.engines.directory.manifest import MANIFEST, read_manifest
from i2l.errors import (
    CheckpointNotFinite,
    ComparisonNotFinite,
    EmbeddingNotFinite,
    EngineFailed,
    EngineFileChanged,
    EngineFileDamaged,
    EngineFileUnreadable,
    EnginesError,
    ManifestInvalid,
)
from i2l.export.build import build_engines
from i2l.look import verification
from i2l.look.checkup import check_engines
from i2l.runtime import opening
from i2l.runtime.pipeline import open_engines
from injectors import doctored, flip, i2l_process, names, no_traceback, rebuilt

PACKS = ("siglip2", "dinov3", "adapter")
PICTURE = picture(64, 64)


@pytest.fixture
def own(engines: MakeEngines, tmp_path: Path) -> Path:
    """A tiny int8 engines directory that a test may damage, noted as good."""
    directory = Path(shutil.copytree(engines("tiny", "int8"), tmp_path / "engines"))
    open_engines(directory).close()
    return directory


def build_of(directory: Path) -> Path:
    return directory / read_manifest(directory).build


def pack_of(directory: Path, family: str) -> Path:
    return build_of(directory) / family / "weights.safetensors"


# --- 2: names that lead out --------------------------------------------------------------------------------------

HOSTILE: dict[str, Callable[[dict[str, Any], Path], None]] = {
    "absolute build": lambda m, out: m.update(build=str(out)),
    "build above": lambda m, _: m.update(build="../../etc"),
    "file above": lambda m, _: m["files"].update({"../.bashrc": {"nbytes": 1, "sha256": "0" * 64, "regions": ""}}),
    "absolute file": lambda m, out: m["files"].update(
        {str(out / ".bashrc"): {"nbytes": 1, "sha256": "0" * 64, "regions": ""}}
    ),
    "hidden file": lambda m, _: m["files"].update({".bashrc": {"nbytes": 1, "sha256": "0" * 64, "regions": ""}}),
    "backslashes": lambda m, _: m["files"].update({"a\\..\\b": {"nbytes": 1, "sha256": "0" * 64, "regions": ""}}),
    "pack above": lambda m, _: m["models"]["dinov3"].update(pack="../../weights.safetensors"),
    "graph above": lambda m, _: m["graphs"].update({"dinov3.block": "../../x.onnx"}),
    "graph with a separator": lambda m, _: m["graphs"].update({"a/b": next(iter(m["graphs"].values()))}),
    "precision above": lambda m, _: m.update(precision="../../x"),
}


@pytest.mark.parametrize("what", HOSTILE)
def test_a_manifest_that_leads_out_is_refused(own: Path, tmp_path: Path, what: str) -> None:
    doctored(own, lambda manifest: HOSTILE[what](manifest, tmp_path / "home"))
    with pytest.raises(ManifestInvalid):
        open_engines(own)
    assert check_engines(own)["problem"]


@pytest.mark.parametrize("change", ["build", "file", "graphs"])
def test_a_hostile_plan_writes_nothing_outside(engines: MakeEngines, tmp_path: Path, change: str) -> None:
    """What wrote ``.bashrc`` once: the plan of an fp8 build names the folder that the conversion writes into."""
    home = tmp_path / "home"
    directory = Path(shutil.copytree(engines("tiny", "fp8"), home / "engines"))
    (home / ".bashrc").write_text("mine")
    shutil.rmtree(directory / "cpu-int8", ignore_errors=True)
    plan = build_of(directory) / PLAN_FOLDER
    (plan / "graphs" / "x").write_text("hostile")

    def hostile(values: dict[str, Any]) -> None:
        facts = {"nbytes": 7, "sha256": file_facts(plan / "graphs" / "x").sha256, "regions": ""}
        if change == "build":
            values["build"] = str(home)
        if change == "file":
            values["files"]["../../../.bashrc"] = facts
        if change == "graphs":
            values["models"]["siglip2"]["chunks"][0]["offset"] += 4096

    doctored(plan, hostile)
    name, facts = f"{PLAN_FOLDER}/{MANIFEST}", file_facts(plan / MANIFEST)
    doctored(directory, lambda m: m["files"][name].update(nbytes=facts.nbytes, sha256=facts.sha256))
    with pytest.raises(ManifestInvalid):
        open_engines(directory, backend="cpu")
    assert (home / ".bashrc").read_text() == "mine"
    assert names(home) == [".bashrc", "engines"]


def test_links_out_of_the_directory_are_refused(own: Path, engines: MakeEngines, tmp_path: Path) -> None:
    pack, aside = pack_of(own, "dinov3"), tmp_path / "aside"
    shutil.move(pack, aside)
    pack.symlink_to(aside)
    with pytest.raises(EngineFileDamaged, match="a link"):
        open_engines(own)
    shutil.move(build_of(own), tmp_path / "build")
    (own / read_manifest(own).build).symlink_to(tmp_path / "build")
    with pytest.raises(EngineFileDamaged, match="a link"):
        open_engines(own)
    fp8 = Path(shutil.copytree(engines("tiny", "fp8"), tmp_path / "fp8"))
    shutil.rmtree(fp8 / "cpu-int8", ignore_errors=True)
    (tmp_path / "elsewhere").mkdir()
    (fp8 / "cpu-int8").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(EnginesError, match="a link"):
        open_engines(fp8, backend="cpu")
    assert names(tmp_path / "elsewhere") == []


# --- 9: rows that are not those of the pack, or of the graph -------------------------------------------------------


def test_a_flipped_bit_of_the_manifest_is_found(own: Path) -> None:
    text = (own / MANIFEST).read_bytes()
    generator = np.random.default_rng(0)
    for position in generator.integers(0, len(text), 60):
        bad = bytearray(text)
        bad[position] ^= 1 << generator.integers(8)
        (own / MANIFEST).write_bytes(bad)
        with pytest.raises(ManifestInvalid):
            read_manifest(own)


ROWS = st.tuples(st.sampled_from(PACKS), st.integers(0, 1 << 16), st.sampled_from(["dtype", "shape", "offset", "gone"]))


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(row=ROWS, value=st.integers(-4, 1 << 20), dtype=st.sampled_from(["F32", "I8", "U8", "BF16", "F64", "x"]))
def test_a_doctored_row_is_never_usable(own: Path, row: tuple[str, int, str], value: int, dtype: str) -> None:
    """Sealed again, as somebody does who knows how: every row is compared with the pack's header."""
    text = (own / MANIFEST).read_bytes()
    family, index, what = row
    tensors = [name for name in json.loads(text)["models"][family]["tensors"] if not name.startswith(".pad")]
    name = tensors[index % len(tensors)]

    def change(manifest: dict[str, Any]) -> None:
        rows = manifest["models"][family]["tensors"]
        before = json.dumps(rows[name])
        if what == "gone":
            del rows[name]
        elif what == "shape":
            rows[name][1] = [value, *rows[name][1][1:]]
        else:
            rows[name][{"dtype": 0, "offset": 2}[what]] = dtype if what == "dtype" else value
        if json.dumps(rows.get(name)) == before:
            del rows[name]

    doctored(own, change)
    try:
        with pytest.raises(EnginesError):
            open_engines(own)
        assert check_engines(own)["problem"]
    finally:
        (own / MANIFEST).write_bytes(text)


def test_a_graph_that_wants_other_weights_is_refused_before_it_computes(own: Path) -> None:
    def swap(manifest: dict[str, Any]) -> None:
        graphs = manifest["graphs"]
        one, other = "adapter.attention", "adapter.feed_forward"
        graphs[one], graphs[other] = graphs[other], graphs[one]

    doctored(own, swap)
    assert "does not run" in check_engines(own)["problem"]
    with open_engines(own) as pipeline, pytest.raises(EngineFailed):
        pipeline.lora_from_images([PICTURE])


def test_what_onnxruntime_says_is_no_traceback(own: Path, photo: Path, tmp_path: Path) -> None:
    graph = build_of(own) / "graphs" / "dinov3.block.onnx"
    graph.write_bytes(graph.read_bytes()[: graph.stat().st_size // 2])
    facts = file_facts(graph)
    doctored(own, lambda m: m["files"]["graphs/dinov3.block.onnx"].update(nbytes=facts.nbytes, sha256=facts.sha256))
    run = i2l_process("run", photo, "--engines", own, "--output", tmp_path / "x.safetensors", "--no-cache")
    assert run.returncode == 1
    assert no_traceback(run.stderr)
    assert "error: the graph dinov3.block does not run" in run.stderr


# --- 8, 10: rot --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["graphs/dinov3.block.onnx", *(f"{family}/weights.safetensors" for family in PACKS)])
def test_a_rotten_bit_of_the_same_time_is_found_at_the_opening(own: Path, name: str) -> None:
    path = build_of(own) / name
    flip(path, path.stat().st_size // 2)
    for _ in range(2):
        with pytest.raises(EngineFileDamaged):
            open_engines(own)
    assert check_engines(own)["problem"]


def test_a_large_pack_is_sampled_and_its_rot_found_after_some_openings(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(hashing, "REGION_BYTES", 4096)
    monkeypatch.setattr(integrity, "REGION_BYTES", 4096)
    path = tmp_path / "pack"
    path.write_bytes(np.random.default_rng(0).bytes(20 * 4096 + 17))
    wanted = file_facts(path)
    assert len(wanted.regions) == 21 * hashing.MARK_DIGITS
    for _ in range(20):
        integrity._check_samples(path, tmp_path, wanted)
    flip(path, 20 * 4096 + 3)
    found = 0
    for _ in range(200):  # each finds it with 2 / 21: that all 200 miss has a chance of 2e-9
        try:
            integrity._check_samples(path, tmp_path, wanted)
        except EngineFileDamaged:
            found += 1
    assert 0 < found < 200


def test_doctor_hashes_all_again_on_request(own: Path) -> None:
    standalone = next((build_of(own) / "adapter").glob("*.onnx"))
    flip(standalone, 100)  # no run uses it, so no opening looks
    assert check_engines(own)["problem"] is None
    shown = i2l_process("doctor", "--engines", own, "--full")
    assert shown.returncode == 1
    assert "its content hash differs" in shown.stderr
    flip(standalone, 100)
    shown = i2l_process("doctor", "--engines", own, "--full")
    assert shown.returncode == 0, shown.stderr
    assert "GiB/s" in shown.stdout


def test_what_a_rotten_pack_gave_is_not_taken_from_the_cache(
    own: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def embedding() -> tuple[Any, bool]:
        with open_engines(own, cache=tmp_path / "cache") as pipeline:
            return pipeline.embed([PICTURE])[0], pipeline.from_cache[0]

    right, _ = embedding()
    shutil.rmtree(tmp_path / "cache")
    pack = pack_of(own, "siglip2")
    infos = read_manifest(own).models["siglip2"].tensors
    place = next(info.offset for name, info in infos.items() if name.startswith("siglip2.block.0.") and "norm" in name)
    flip(pack, place + 2, 7)  # twice or half the value
    with monkeypatch.context() as patch:
        patch.setattr(integrity, "SAMPLES", 0)  # the samples miss it
        wrong, _ = embedding()
    assert not np.array_equal(wrong, right)
    with pytest.raises(EngineFileDamaged):  # now they do not
        embedding()
    flip(pack, place + 2, 7)  # mended in place: same size, time and inode
    again, from_cache = embedding()
    assert not from_cache
    assert np.array_equal(again, right)


def test_a_rebuild_after_unseen_rot_computes_anew(own: Path, tmp_path: Path) -> None:
    with open_engines(own, cache=tmp_path / "cache") as pipeline:
        pipeline.embed([PICTURE])
    rebuilt(own)
    with open_engines(own, cache=tmp_path / "cache") as pipeline:
        pipeline.embed([PICTURE])
        assert pipeline.from_cache == [False]


# --- 11, 12: changed under an open pipeline ------------------------------------------------------------------------

CHANGED = """
import os, sys
from pathlib import Path
import i2l
from PIL import Image
pack, change = Path(sys.argv[2]), sys.argv[3]
with i2l.open_engines(sys.argv[1]) as pipeline:
    image = Image.new("RGB", (64, 64), "red")
    pipeline.lora_from_images([image])
    if change == "cut":
        os.truncate(pack, 5000)
    else:
        data = pack.read_bytes()
        pack.write_bytes(data[:-4096] + bytes(4096))
    try:
        pipeline.lora_from_images([image])
    except i2l.I2LError as error:
        print(type(error).__name__)
"""


@pytest.mark.parametrize("change", ["cut", "written over"])
@pytest.mark.parametrize("family", ["siglip2", "adapter"])
def test_a_pack_that_changes_under_an_open_pipeline_ends_the_run(own: Path, change: str, family: str) -> None:
    from injectors import run_python

    run = run_python(CHANGED, own, pack_of(own, family), change)
    assert (run.returncode, run.stdout) == (0, "EngineFileChanged\n"), run.stderr


def test_a_pack_that_changes_in_the_middle_is_not_computed_with(own: Path) -> None:
    """The last chunk is asked once more before anything is made of it."""
    with open_engines(own) as pipeline:
        last = read_manifest(own).models["siglip2"].chunks[-1].steps[-1].name

        def change(step: str, _: object) -> None:
            if step == last:
                pack = pack_of(own, "siglip2")
                os.utime(pack, ns=(0, 0))

        with pytest.raises(EngineFileChanged):
            pipeline.embed_pixels(pipeline.pixels([PICTURE]), observe=change)


# --- 7: not finite ------------------------------------------------------------------------------------------------

PLACES = {
    "siglip2": "encoder.layers.1.mlp.fc1.weight",
    "dinov3": "layer.1.attention.q_proj.weight",
    "adapter": "proj_out.weight",
}


def poisoned(models: Path, target: Path, family: str, ending: str, value: float) -> tuple[Path, str]:
    folder = Path(shutil.copytree(models, target))
    for path in sorted(folder.rglob("*.safetensors")):
        tensors = load_file(path)
        keys = [key for key in tensors if key.endswith(ending)]
        if keys and (family in path.name.lower() or (family == "adapter" and "i2L" in path.name)):
            tensors[keys[0]].view(-1)[3] = value
            from safetensors import safe_open

            with safe_open(path, "pt") as file:
                metadata = file.metadata()
            save_file(tensors, path, metadata)
            return folder, keys[0]
    raise AssertionError(family)


@pytest.fixture
def quick_export(monkeypatch: pytest.MonkeyPatch) -> None:
    """Exported graphs play no part in what is tested here."""
    from i2l.export import build

    def write_graphs(folder: Path, checkpoints: dict[str, Any], *_: Any) -> dict[str, str]:
        for family in checkpoints:
            (folder / family).mkdir()
        return {}

    monkeypatch.setattr(build, "write_graphs", write_graphs)
    monkeypatch.setattr(build, "write_cpu_plan", lambda *_: None)


@pytest.mark.usefixtures("quick_export")
@pytest.mark.parametrize("precision", ["int8", "fp8", "bf16"])
@pytest.mark.parametrize("family", PACKS)
@pytest.mark.parametrize("value", [float("nan"), float("-inf")])
def test_a_weight_that_is_no_number_is_named_at_the_build(
    models: MakeModels, tmp_path: Path, family: str, precision: str, value: float
) -> None:
    folder, name = poisoned(models("tiny"), tmp_path / "models", family, PLACES[family], value)
    with pytest.raises(CheckpointNotFinite) as caught:
        build_engines(folder, tmp_path / "engines", precision=precision)
    assert f"{name} (1 value)" in str(caught.value)
    assert not list((tmp_path / "engines").glob("build-*"))


@pytest.mark.usefixtures("quick_export")
def test_a_norm_that_is_no_number_is_named(models: MakeModels, tmp_path: Path) -> None:
    folder, name = poisoned(models("tiny"), tmp_path / "models", "dinov3", "layer.2.norm1.weight", float("nan"))
    with pytest.raises(CheckpointNotFinite, match=name):
        build_engines(folder, tmp_path / "engines", precision="int8")


def test_embeddings_that_are_no_numbers_end_the_run_and_are_not_kept(
    own: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with open_engines(own, cache=tmp_path / "cache") as pipeline:
        pixels = pipeline.pixels([PICTURE])
        pixels["dinov3"][0, 0, 0, 0] = np.nan
        with pytest.raises(EmbeddingNotFinite, match="dinov3 gave"):
            pipeline.embed_pixels(pixels)
        embedding = np.zeros((1, 192), np.float32)
        embedding[0, 5] = np.inf
        with pytest.raises(EmbeddingNotFinite, match="1 value that are"):
            pipeline.lora_from_embeddings(embedding)
        monkeypatch.setattr(pipeline, "pixels", lambda _: pixels)
        with pytest.raises(EmbeddingNotFinite):
            pipeline.lora_from_images([PICTURE])
    assert not (tmp_path / "cache").exists()


def test_verify_fails_where_a_reference_is_no_number(
    models: MakeModels, engines: MakeEngines, monkeypatch: pytest.MonkeyPatch
) -> None:
    from i2l.export import reference

    real = reference.reference_steps

    def steps(*arguments: Any) -> Iterator[Any]:
        for step, outputs in real(*arguments):
            if step.startswith("dinov3.block."):
                yield step, {name: values * np.float32("nan") for name, values in outputs.items()}
            else:
                yield step, outputs

    monkeypatch.setattr(reference, "reference_steps", steps)
    with pytest.raises(ComparisonNotFinite, match=r"dinov3\.block"):
        verification.verify_engines(models("tiny"), engines("tiny", "int8"), PICTURE)


# --- 13: a rebuild commits while a run opens -----------------------------------------------------------------------


@pytest.mark.parametrize("precision", ["int8", "fp8"])
@pytest.mark.parametrize("moment", ["check_files", "offer_of"])
def test_a_run_that_meets_a_rebuild_opens_the_new_build(
    engines: MakeEngines, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, precision: str, moment: str
) -> None:
    directory = Path(shutil.copytree(engines("tiny", precision), tmp_path / "engines"))
    real, left = getattr(opening, moment), [2]

    def meets(*arguments: Any) -> Any:
        if left[0]:
            left[0] -= 1
            rebuilt(directory)
        return real(*arguments)

    monkeypatch.setattr(opening, moment, meets)
    with open_engines(directory, backend="cpu") as pipeline:
        assert pipeline.manifest.build == read_manifest(directory).build
        assert pipeline.lora_from_images([PICTURE]).rank == 4


def test_damage_that_no_rebuild_explains_is_said_at_once(own: Path) -> None:
    pack_of(own, "adapter").unlink()
    with pytest.raises(EngineFileDamaged, match="it is gone"):
        open_engines(own)


# --- 21: unreadable ------------------------------------------------------------------------------------------------


def test_a_pack_that_may_not_be_read_is_said_by_run_and_doctor(own: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Root may read everything, so the system is made to refuse."""
    pack, real = pack_of(own, "dinov3"), Path.open

    def refusing(path: Path, *arguments: Any, **options: Any) -> Any:
        if path == pack:
            raise PermissionError(13, os.strerror(13), str(path))
        return real(path, *arguments, **options)

    monkeypatch.setattr(Path, "open", refusing)
    with pytest.raises(EngineFileUnreadable, match="Permission denied"):
        open_engines(own)
    assert "Permission denied" in check_engines(own)["problem"]


def test_notes_survive_in_any_form(own: Path) -> None:
    for content in ('{"files": [], "word": 1}', "[" * 100_000, '{"files": {}, "word": "x"}'):
        (own / CHECKED).write_text(content)
        open_engines(own).close()
