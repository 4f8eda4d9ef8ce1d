"""FP8 to int8 without torch: every code, against the torch quantiser, and the directory that comes of it."""

import errno
import logging
import os
import shutil
import threading
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from conftest import MakeEngines, picture
from i2l.engines.cpu import converted, transcode
from i2l.engines.cpu.converted import CPU_FOLDER, LOCK, cpu_engines, remove_cpu_engines
from i2l.engines.cpu.rotation import balanced_rotation, rotate, rotation
from i2l.engines.cpu.sums import LARGEST_PAIR, WEIGHT_LEVELS
from i2l.engines.cpu.transcode import VALUES, PairTable, balanced_panels, e4m3_values, rotated_panel
from i2l.engines.directory.hashing import FileFacts
from i2l.engines.directory.manifest import MANIFEST, Manifest, manifest_to_json, read_manifest
from i2l.engines.directory.tensorfile import PAD_PREFIX, LayoutWriter, TensorInfo
from i2l.errors import CpuPacksUnwritable, DiskFull, EnginesMissing, ManifestInvalid
from i2l.export.precisions import storing
from i2l.export.precisions.balanced_int8 import BalancedInt8
from i2l.export.precisions.base import Precision
from i2l.export.precisions.rotated_int8 import RotatedInt8
from i2l.lora.lowrank import product_error
from i2l.runtime.pipeline import Pipeline

CODES = np.arange(256, dtype=np.uint8)


# --- codes -------------------------------------------------------------------------------------------------------


def test_every_code_is_decoded_as_torch_does() -> None:
    wanted = torch.from_numpy(CODES).view(torch.float8_e4m3fn).float().numpy()
    np.testing.assert_array_equal(e4m3_values(), wanted)  # equal NaN count as equal
    assert np.signbit(e4m3_values()[0x80])


@pytest.mark.parametrize("shape", [(0,), (1,), (3, 5), (4, 7), (256,)])
def test_pairs_are_looked_up_as_single_codes(shape: tuple[int, ...]) -> None:
    codes = np.random.default_rng(0).integers(0, 256, shape, np.uint8)
    for values in (np.arange(256, dtype=np.uint8)[::-1].copy(), np.random.default_rng(1).random(256, np.float32)):
        found = PairTable(values).look_up(codes)
        assert found.dtype == values.dtype
        np.testing.assert_array_equal(found, values[codes])


def test_a_panel_of_nan_is_not_taken_for_numbers() -> None:
    codes = np.full((2, 64), 0x7F, np.uint8)
    with np.errstate(invalid="ignore"):
        assert np.isnan(rotated_panel(codes, rotation(64))[1]).all()


@pytest.mark.parametrize("shape", [(1, 64), (128, 96), (7, 54), (3, 1536)])
def test_stacks_rotate_as_one_product_does(shape: tuple[int, int]) -> None:
    x = np.random.default_rng(0).standard_normal(shape).astype(np.float32)
    matrix = rotation(shape[1])
    wanted = (x.astype(np.float64).reshape(-1, len(matrix)) @ matrix.astype(np.float64)).reshape(shape)
    np.testing.assert_allclose(rotate(x, matrix), wanted, atol=1e-5)  # sums of at most 64 float32 products


def test_outputs_are_cut_into_panels_as_the_quantiser_cuts_them(monkeypatch: pytest.MonkeyPatch) -> None:
    """Three panels of outputs; a step apart where float32 rounds otherwise, and so is what balances a block."""
    monkeypatch.setattr(storing, "WIDEST_ROW", 8)
    random = np.random.default_rng(0)
    codes = random.permutation(np.resize(np.delete(CODES, [0x7F, 0xFF]), (24, 128)))
    scale, found_scale = random.random(24, np.float32) + 1, np.empty(24, np.float32)
    found = balanced_panels(codes, balanced_rotation(128), scale, found_scale, row=8)
    wanted = quantised(BalancedInt8(), torch.from_numpy(VALUES.look_up(codes) * scale[:, None]), None)
    np.testing.assert_allclose(found_scale, wanted["scale"].numpy().ravel(), rtol=1e-6)
    difference = np.abs(found[None, :, None].astype(int) - wanted["weight"].numpy().astype(int))
    assert difference.max() <= 1
    assert (difference > 0).mean() < 0.01


# --- packs -------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def fp8(engines: MakeEngines) -> Path:
    """A tiny fp8 engines directory, its int8 form made."""
    directory = engines("tiny", "fp8")
    Pipeline(directory, backend="cpu").close()
    return directory


def tensor(directory: Path, pack: str, info: TensorInfo) -> torch.Tensor:
    raw = np.fromfile(directory / pack, np.uint8, info.nbytes, offset=info.offset)
    dtypes = {"F8_E4M3": torch.float8_e4m3fn, "F32": torch.float32, "I8": torch.int8, "U8": torch.uint8}
    return torch.from_numpy(raw).view(dtypes[info.dtype]).reshape(info.shape)


def quantised(form: Precision, matrix: torch.Tensor, group: int | None) -> dict[str, torch.Tensor]:
    """What the torch quantiser of a build makes of a float32 matrix; ``group``: rows that stay together."""
    out_features, in_features = matrix.shape
    pieces: dict[str, list[torch.Tensor]] = {}
    for suffix, piece in form.prepare(lambda a, n: matrix[a : a + n].clone(), out_features, in_features, group):
        pieces.setdefault(suffix, []).append(piece)
    shapes = {suffix: shape for suffix, _, shape in form.stored(out_features, in_features, group)}
    return {suffix: torch.cat(parts).reshape(shapes[suffix]) for suffix, parts in pieces.items()}


def exact_steps(codes: torch.Tensor, shape: torch.Size) -> torch.Tensor:
    """Where every value lies on its row's scale, float64, laid out as int8 is stored."""
    values = codes.double()
    if len(shape) == 5:
        panels, parts, _, width, _ = shape
        matrix = torch.from_numpy(balanced_rotation(codes.shape[1])).double()
        values = (values.reshape(-1, len(matrix)) @ matrix).reshape(len(codes), panels, width)
        scale = values.abs().amax(dim=2, keepdim=True) / WEIGHT_LEVELS
        return (values / scale).unflatten(0, (parts, -1)).permute(2, 0, 3, 1).unsqueeze(2)
    matrix = torch.from_numpy(rotation(codes.shape[1])).double()
    values = (values.reshape(-1, len(matrix)) @ matrix).reshape(codes.shape)
    pair = values.reshape(len(values), -1, 2).sum(dim=2).abs().amax(dim=1, keepdim=True) / LARGEST_PAIR
    scale = torch.maximum(values.abs().amax(dim=1, keepdim=True) / WEIGHT_LEVELS, pair)
    return (values / scale).reshape(shape[0], shape[2], shape[1]).transpose(1, 2)


def test_packs_are_what_the_quantiser_makes_of_the_same_values(fp8: Path) -> None:
    source, made = read_manifest(fp8), read_manifest(fp8 / CPU_FOLDER)
    old_folder, new_folder = fp8 / source.build, fp8 / CPU_FOLDER / made.build
    matrices = 0
    for family, model in made.models.items():
        old = source.models[family].tensors
        names = [name for name in model.tensors if not name.startswith(PAD_PREFIX)]
        assert names == [name for name in old if not name.startswith(PAD_PREFIX)]
        form = BalancedInt8() if family == "adapter" else RotatedInt8()
        wanted: dict[str, torch.Tensor] = {}
        for name in names:
            stored = tensor(old_folder, source.models[family].pack, old[name])
            found = tensor(new_folder, model.pack, model.tensors[name])
            if old[name].dtype == "F8_E4M3":
                scale_name = name.removesuffix("weight") + "scale"
                scale = tensor(old_folder, source.models[family].pack, old[scale_name])
                panel = found.shape[2] if family != "adapter" else None
                values = quantised(form, stored.float() * scale[:, None], panel)
                wanted[scale_name] = values["scale"]
                difference = (found.int() - values["weight"].int()).abs()
                if family == "adapter":  # what balances a block takes up the differences of the others
                    size, after = balanced_rotation(stored.shape[1]).shape
                    assert (found.unflatten(3, (-1, after)).int().sum(dim=4) == 0).all()
                    difference.unflatten(3, (-1, after))[:, :, :, :, size + 1] = 0
                assert difference.max() <= 1
                # Values in the middle between two steps tip either way: only float32's rounding of the scale decides,
                # which comes earlier there than here.
                middle = (exact_steps(stored, found.shape) % 1 - 0.5).abs()
                assert (middle[difference > 0] < 1e-4).all()
                matrices += 1
            elif name in wanted:
                torch.testing.assert_close(found, wanted[name], rtol=1e-6, atol=0)
            else:
                assert torch.equal(found, stored)
    assert matrices > 20


def test_the_directory_is_the_plan_with_packs(fp8: Path) -> None:
    manifest = read_manifest(fp8)
    plan = read_manifest(fp8 / manifest.build / "cpu", planned=True)
    made = read_manifest(fp8 / CPU_FOLDER)
    assert (plan.precision, plan.build) == ("int8", manifest.build)
    assert replace(made, files=plan.files) == plan
    assert made.files.keys() - plan.files.keys() == {model.pack for model in made.models.values()}
    found = {p.relative_to(fp8 / CPU_FOLDER / made.build).as_posix() for p in (fp8 / CPU_FOLDER).glob("build-*/*/*")}
    assert found == made.files.keys()


def test_threads_change_no_bit(own: Path) -> None:
    def hashes(threads: int) -> dict[str, str]:
        shutil.rmtree(own / CPU_FOLDER, ignore_errors=True)
        _, made = cpu_engines(own, read_manifest(own), threads=threads)
        return {name: facts.sha256 for name, facts in made.files.items()}

    assert hashes(1) == hashes(5)


# --- LoRAs -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("outliers", [False, True])
def test_a_lora_of_fp8_engines_is_near_the_exact_one(engines: MakeEngines, outliers: bool) -> None:
    options = {"outliers": True} if outliers else {}
    pictures = [picture(320, 240)]
    with Pipeline(engines("tiny", "fp8", **options), backend="cpu") as pipeline:
        assert (pipeline.manifest.precision, pipeline.runs_as) == ("fp8", "int8")
        found = pipeline.lora_from_images(pictures)
    with Pipeline(engines("tiny", "fp32", **options)) as pipeline:
        assert pipeline.runs_as == "fp32"
        wanted = pipeline.lora_from_images(pictures)
    assert found.metadata["i2l.precision"] == "fp8"
    errors = [product_error(found.factors[module], wanted.factors[module]) for module in wanted.factors]
    # e4m3 is 2.6 % off per matrix and int8 1.5 %; some ten products in a row, uncorrelated, give three times that.
    assert np.median(errors) < 0.10
    assert max(errors) < 0.20


# --- the directory -----------------------------------------------------------------------------------------------


@pytest.fixture
def own(engines: MakeEngines, tmp_path: Path) -> Path:
    """A tiny fp8 engines directory that a test may change, without its int8 form."""
    directory = tmp_path / "engines"
    shutil.copytree(engines("tiny", "fp8"), directory, ignore=shutil.ignore_patterns(CPU_FOLDER))
    return directory


@pytest.fixture
def transcoded(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The packs converted since the test began."""
    packs: list[str] = []
    real = transcode.transcode_pack

    def transcode_pack(source: Path, *arguments: Any, **options: Any) -> FileFacts:
        packs.append(source.parent.name)
        return real(source, *arguments, **options)

    monkeypatch.setattr(converted, "transcode_pack", transcode_pack)
    return packs


def open_and_close(directory: Path) -> None:
    Pipeline(directory, backend="cpu").close()


def test_other_precisions_run_as_they_are(engines: MakeEngines) -> None:
    directory = engines("tiny", "fp32")
    manifest = read_manifest(directory)
    assert cpu_engines(directory, manifest) == (directory, manifest)
    assert not (directory / CPU_FOLDER).exists()


def test_it_is_converted_once_and_said_once(own: Path, transcoded: list[str], caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, "i2l"):
        open_and_close(own)
        open_and_close(own)
    assert transcoded == ["siglip2", "dinov3", "adapter"]
    assert caplog.text.count("converting it to int8") == 1


def test_progress_goes_to_the_end(own: Path) -> None:
    told: list[tuple[str, int, int]] = []
    cpu_engines(own, read_manifest(own), report=lambda *report: told.append(report))
    assert {(stage, total) for stage, _, total in told} == {(converted.STAGE, told[-1][2])}
    assert [done for _, done, _ in told] == sorted(done for _, done, _ in told)
    assert told[-1][1] == told[-1][2] or told[-1][1] == told[-1][2] - 1  # headers and fillers are not counted


def renamed_build(directory: Path, name: str) -> Manifest:
    """The directory as another build of the same checkpoints would leave it, before the old int8 form is removed."""
    manifest = read_manifest(directory)
    (directory / manifest.build).rename(directory / name)
    plan = read_manifest(directory / name / "cpu", planned=True)
    (directory / name / "cpu" / MANIFEST).write_text(manifest_to_json(replace(plan, build=name)), encoding="utf-8")
    manifest = replace(manifest, build=name)
    (directory / MANIFEST).write_text(manifest_to_json(manifest), encoding="utf-8")
    return manifest


def test_another_build_is_converted_again(own: Path, transcoded: list[str]) -> None:
    open_and_close(own)
    manifest = renamed_build(own, "build-other")
    folder, made = cpu_engines(own, manifest)
    assert transcoded == 2 * ["siglip2", "dinov3", "adapter"]
    assert made.build == "build-other"
    assert [path.name for path in folder.glob("build-*")] == ["build-other"]


def test_a_build_removes_the_form_of_the_last_one(own: Path) -> None:
    open_and_close(own)
    remove_cpu_engines(own, but_of=read_manifest(own).build)
    assert (own / CPU_FOLDER / MANIFEST).is_file()
    remove_cpu_engines(own, but_of="build-other")
    assert not (own / CPU_FOLDER).exists()
    remove_cpu_engines(own, but_of="build-other")


def test_a_folder_of_somebody_else_stays(own: Path) -> None:
    (own / CPU_FOLDER).mkdir()
    (own / CPU_FOLDER / "notes.txt").write_text("work of a year", encoding="utf-8")
    remove_cpu_engines(own, but_of="build-other")
    assert (own / CPU_FOLDER / "notes.txt").is_file()


def test_damaged_packs_are_made_again(own: Path, transcoded: list[str], caplog: pytest.LogCaptureFixture) -> None:
    open_and_close(own)
    pack = next((own / CPU_FOLDER).rglob("dinov3/weights.safetensors"))
    os.truncate(pack, 1000)
    with caplog.at_level(logging.WARNING, "i2l"):
        open_and_close(own)
    assert len(transcoded) == 6
    assert "made again" in caplog.text


DEATHS = [
    pytest.param(OSError(errno.ENOSPC, "No space left on device"), DiskFull, id="disk full"),
    pytest.param(KeyboardInterrupt(), KeyboardInterrupt, id="Ctrl-C"),
]


@pytest.mark.parametrize(("error", "raised"), DEATHS)
def test_a_conversion_that_dies_leaves_nothing(
    own: Path, monkeypatch: pytest.MonkeyPatch, error: BaseException, raised: type[BaseException]
) -> None:
    real, count = LayoutWriter.write, iter(range(1000))

    def write(self: LayoutWriter, name: str, data: memoryview) -> None:
        if next(count) == 40:
            raise error
        real(self, name, data)

    with monkeypatch.context() as patch:
        patch.setattr(LayoutWriter, "write", write)
        with pytest.raises(raised):
            open_and_close(own)
    assert [path.name for path in (own / CPU_FOLDER).iterdir()] == [LOCK]
    open_and_close(own)


def test_a_conversion_that_was_killed_is_begun_again(own: Path, transcoded: list[str]) -> None:
    (own / CPU_FOLDER / "build-dead" / "siglip2").mkdir(parents=True)
    (own / CPU_FOLDER / "build-dead" / "siglip2" / "weights.safetensors").write_bytes(b"half")
    open_and_close(own)
    assert len(transcoded) == 3
    assert [path.name for path in (own / CPU_FOLDER).glob("build-*")] == [read_manifest(own).build]


def test_no_room_is_found_before_any_work(own: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("i2l.machine.files.free_bytes", lambda _: 1000)
    with pytest.raises(DiskFull, match="needed, 1000 B free"):
        open_and_close(own)
    with pytest.raises(EnginesMissing):
        read_manifest(own / CPU_FOLDER)


def test_a_read_only_directory_is_named_with_the_next_command(own: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def mkdir(path: Path, *_: object, **__: object) -> None:
        raise OSError(errno.EROFS, os.strerror(errno.EROFS), str(path))

    with monkeypatch.context() as patch:  # root may write anywhere, so the system is made to refuse
        patch.setattr(Path, "mkdir", mkdir)
        with pytest.raises(CpuPacksUnwritable) as caught:
            open_and_close(own)
    assert str(own) in str(caught.value)
    assert "Read-only file system" in str(caught.value)
    assert "--precision int8" in str(caught.value)


def test_a_converted_directory_needs_no_writing(own: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    open_and_close(own)

    def refuse(*_: object, **__: object) -> None:
        raise AssertionError

    monkeypatch.setattr(Path, "mkdir", refuse)
    monkeypatch.setattr(Path, "touch", refuse)
    open_and_close(own)


def test_a_build_without_a_plan_says_rebuild(own: Path) -> None:
    manifest = read_manifest(own)
    shutil.rmtree(own / manifest.build / "cpu")
    with pytest.raises(ManifestInvalid, match=r"no plan for the CPU.*i2l build-engines"):
        cpu_engines(own, manifest)


def test_two_at_once_convert_once(own: Path, transcoded: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """The lock belongs to an opening of the file, so threads meet it as processes do."""
    manifest = read_manifest(own)
    started, real = threading.Event(), vars(converted)["transcode_pack"]

    def slow(*arguments: Any, **options: Any) -> str:
        started.set()
        waited.wait(10)
        return real(*arguments, **options)

    waited = threading.Event()
    monkeypatch.setattr(converted, "transcode_pack", slow)
    monkeypatch.setattr(converted.log, "info", lambda text, *_: waited.set() if "waiting" in text else None)
    results: list[Manifest] = []
    make: Callable[[], None] = lambda: results.append(cpu_engines(own, manifest)[1])  # noqa: E731
    first, second = threading.Thread(target=make), threading.Thread(target=make)
    first.start()
    assert started.wait(10)
    second.start()
    first.join()
    second.join()
    assert waited.is_set()
    assert len(transcoded) == 3
    assert results[0] == results[1]
