"""Synthetic checkpoints: repeatable, whole or absent, and with outliers where real encoders have them."""

import errno
import shutil
import subprocess
import sys
from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from safetensors import safe_open
from safetensors.torch import load_file

from conftest import picture
from i2l.engines.directory.tensorfile import LayoutWriter
from i2l.errors import DiskFull
from i2l.export.checkpoints import synthetic
from i2l.export.checkpoints.finding import find_checkpoints
from i2l.export.checkpoints.recognise import recognise
from i2l.export.checkpoints.shapes import tensor_shapes
from i2l.export.checkpoints.synthetic import make_checkpoints, synthetic_pieces
from i2l.export.precisions import base as precision
from i2l.export.reference import reference_steps
from i2l.machine.wording import format_bytes
from i2l.runtime.pictures.images import load_image
from i2l.runtime.pictures.pixels import pixels_dinov3, pixels_siglip2, square_image
from i2l.specs import PRESETS, Family

Array = NDArray[np.float32]
Models = Callable[..., Path]

LAYOUT = ["CLIPS/DINOv3-7B.safetensors", "CLIPS/SigLIP2-G384.safetensors", "Z-Image/Z-Image-i2L.safetensors"]
ENCODERS = ("siglip2", "dinov3")
GIB = 1 << 30


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    """torch's threads wait for each other after every operator: on a busy machine that took seven times as long."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def made(models: Models, preset: str, *, outliers: bool) -> Path:
    """The session's checkpoints."""
    return models(preset, outliers=True) if outliers else models(preset)


def files(directory: Path) -> dict[str, bytes]:
    return {
        path.relative_to(directory).as_posix(): path.read_bytes()
        for path in sorted(directory.rglob("*"))
        if path.is_file()
    }


# --- files ------------------------------------------------------------------------------------------------------


def test_the_folders_are_those_of_the_comfyui_node(models: Models) -> None:
    assert list(files(models("tiny"))) == LAYOUT


@pytest.mark.parametrize("outliers", [False, True])
def test_the_same_seed_gives_the_same_bytes(models: Models, tmp_path: Path, outliers: bool) -> None:
    make_checkpoints(tmp_path, "tiny", outliers=outliers)
    assert files(tmp_path) == files(made(models, "tiny", outliers=outliers))


def test_another_seed_changes_every_tensor(models: Models, tmp_path: Path) -> None:
    for path in make_checkpoints(tmp_path, "tiny", seed=1):
        other = load_file(models("tiny") / path.relative_to(tmp_path))
        same = [name for name, tensor in load_file(path).items() if torch.equal(tensor, other[name])]
        assert same == []


def test_every_tensor_has_values_of_its_own(models: Models) -> None:
    for path in models("tiny").rglob("*.safetensors"):
        tensors = load_file(path)
        assert len({tensor.reshape(-1)[:8].float().numpy().tobytes() for tensor in tensors.values()}) == len(tensors)


def test_the_published_dtypes_by_default(models: Models) -> None:
    found = find_checkpoints(models("tiny"))
    kinds = {family: {info.dtype for info in checkpoint.tensors.values()} for family, checkpoint in found.items()}
    assert kinds == {"siglip2": {"F32"}, "dinov3": {"BF16"}, "adapter": {"BF16"}}


@pytest.mark.parametrize("dtype", ["F16", "BF16"])
def test_another_dtype_holds_the_same_values_rounded(tmp_path: Path, dtype: str) -> None:
    exact = [load_file(path) for path in make_checkpoints(tmp_path / "exact", "tiny", dtype="F32")]
    rounded = [load_file(path) for path in make_checkpoints(tmp_path / "rounded", "tiny", dtype=dtype)]
    kind = {"F16": torch.float16, "BF16": torch.bfloat16}[dtype]
    for wanted, found in zip(exact, rounded, strict=True):
        assert all(torch.equal(found[name], tensor.to(kind)) for name, tensor in wanted.items())


def test_float32_is_more_than_bfloat16_widened(models: Models) -> None:
    for name, tensor in load_file(models("tiny") / "CLIPS/SigLIP2-G384.safetensors").items():
        assert (tensor.bfloat16().float() != tensor).float().mean() > 0.9, name  # by chance one in 65536 is the same


def test_the_spec_is_carried(models: Models) -> None:
    found = {checkpoint.spec for checkpoint in find_checkpoints(models("tiny")).values()}
    assert found == set(PRESETS["tiny"])


def test_a_file_says_that_it_is_synthetic(models: Models) -> None:
    for path in models("tiny").rglob("*.safetensors"):
        with safe_open(path, framework="numpy") as file:
            assert file.metadata()["i2l_synthetic"].startswith("preset tiny, seed 0")


def test_progress_ends_at_the_total(tmp_path: Path) -> None:
    told: list[tuple[int, int]] = []
    make_checkpoints(tmp_path, "tiny", report=lambda _, done, total: told.append((done, total)))
    assert told[-1] == (told[-1][1], sum(len(data) for data in files(tmp_path).values()))


# --- failures ---------------------------------------------------------------------------------------------------


def test_an_interrupted_write_leaves_nothing(tmp_path: Path) -> None:
    def interrupt(stage: str, done: int, total: int) -> None:
        del stage, total
        if done > 100_000:  # inside the first file, which is SigLIP2
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        make_checkpoints(tmp_path, "tiny", report=interrupt)
    assert files(tmp_path) == {}


def test_an_interrupted_write_keeps_what_was_there(tmp_path: Path) -> None:
    make_checkpoints(tmp_path, "tiny")
    before = files(tmp_path)
    sizes = [len(before[name]) for name in LAYOUT]

    def interrupt(stage: str, done: int, total: int) -> None:
        del stage
        if done > total - sizes[2] // 2:  # inside the last file
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        make_checkpoints(tmp_path, "tiny", seed=1, report=interrupt)
    after = files(tmp_path)
    assert list(after) == LAYOUT
    assert [after[name] == before[name] for name in LAYOUT] == [False, False, True]
    assert all(recognise(tmp_path / name) for name in LAYOUT)


@pytest.mark.parametrize(("spare", "fits"), [(0, True), (-1, False)])
def test_the_room_on_the_disk_is_asked_for_first(
    models: Models, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, spare: int, fits: bool
) -> None:
    needed = sum(len(data) for data in files(models("tiny")).values())
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=needed + spare))
    if fits:
        make_checkpoints(tmp_path, "tiny")
        return
    with pytest.raises(DiskFull, match=f"{format_bytes(needed)} needed, {format_bytes(needed - 1)} free"):
        make_checkpoints(tmp_path, "tiny")
    assert files(tmp_path) == {}


def test_a_disk_that_fills_up_on_the_way(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(_self: LayoutWriter, _name: str, _data: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(LayoutWriter, "write", full)
    with pytest.raises(DiskFull, match="no room on the disk"):
        make_checkpoints(tmp_path, "tiny")
    assert files(tmp_path) == {}


# --- memory -----------------------------------------------------------------------------------------------------


@pytest.mark.skipif(sys.platform != "linux", reason="/proc tells the peak")
def test_tensors_are_written_as_they_are_made(tmp_path: Path) -> None:
    program = f"""
from pathlib import Path
from i2l.export.checkpoints.synthetic import make_checkpoints
def peak():
    return 1024 * int(Path("/proc/self/status").read_text().split("VmHWM:")[1].split()[0])
folder = Path({str(tmp_path)!r})
make_checkpoints(folder / "tiny", "tiny")  # what torch sets up at first use
before = peak()
paths = make_checkpoints(folder / "small", "small")
print(before, peak(), sum(path.stat().st_size for path in paths))
"""
    ran = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    before, after, written = map(int, ran.stdout.split())
    assert after < GIB
    assert after - before < written / 4  # 4 of 140 MiB observed; the allocator may keep a few pieces


@pytest.mark.parametrize("outliers", [False, True])
@pytest.mark.parametrize("family", ENCODERS)
def test_a_large_tensor_comes_in_small_pieces(monkeypatch: pytest.MonkeyPatch, family: str, outliers: bool) -> None:
    spec = getattr(PRESETS["tiny"], family)
    for name, shape in tensor_shapes(spec).items():
        (whole,) = synthetic_pieces(spec, name, shape, seed=0, outliers=outliers)
        with monkeypatch.context() as patch:
            patch.setattr(synthetic, "PIECE_VALUES", 1000)
            pieces = list(synthetic_pieces(spec, name, shape, seed=0, outliers=outliers))
        assert max(map(len, pieces)) <= max(1000, len(whole) // shape[0])  # a row at least
        # torch draws other numbers in pieces, but what is large must be large in both: outliers have fixed places.
        large, also_large = (values.abs() > 20 * values.abs().median() for values in (whole, torch.cat(pieces)))
        if len(shape) == 1 and name.endswith(".bias"):
            continue  # of one planted number alone nobody knows that it is large
        rows = max(1, len(whole) // shape[-1])
        assert torch.equal(large.view(rows, -1).any(1), also_large.view(rows, -1).any(1)), name


# --- what the models compute ------------------------------------------------------------------------------------


@dataclass
class Trace:
    """What happened inside an encoder for two pictures, in float32."""

    hidden: dict[str, Array] = field(default_factory=dict)
    """Step name -> residual stream after it."""
    inputs: dict[str, list[Array]] = field(default_factory=lambda: defaultdict(list))
    """Matrix -> its inputs ``[tokens, channels]`` in every block."""
    embedding: Array = field(default_factory=lambda: np.zeros(0, np.float32))


@cache
def pixels(family: str, size: int) -> Array:
    """Two different pictures."""
    convert = {"siglip2": pixels_siglip2, "dinov3": pixels_dinov3}[family]
    squares = [
        square_image(load_image(picture(*shape, seed=seed))) for seed, shape in ((0, (320, 240)), (1, (200, 300)))
    ]
    return np.stack([np.asarray(convert(square, size)).reshape(3, size, size) for square in squares])


@pytest.fixture(scope="module")
def trace(models: Models) -> Callable[[str, str, bool], Trace]:
    @cache
    def run(preset: str, family: Family, outliers: bool) -> Trace:
        found = Trace()
        multiply = precision.FloatLinear.forward
        step_names: list[str] = []
        spec = getattr(PRESETS[preset], family)

        def spy(self: precision.FloatLinear, x: torch.Tensor, weights: precision.Weights) -> torch.Tensor:
            if step_names and len(step_names) <= spec.depth:
                found.inputs[self.name].append(x.numpy())
            return multiply(self, x, weights)

        checkpoint = find_checkpoints(made(models, preset, outliers=outliers))[family]
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(precision.FloatLinear, "forward", spy)
            for name, outputs in reference_steps(checkpoint, pixels(family, spec.image_size)):
                step_names.append(name)
                if "hidden_out" in outputs:
                    found.hidden[name] = outputs["hidden_out"]
                else:
                    found.embedding = outputs["embedding"]
        return found

    return run


CASES = [(preset, family) for preset in ("tiny", "small") for family in ENCODERS]


def channel_ratio(inputs: Array) -> float:
    """The largest channel over the median one; a channel's size is its median over tokens, as a few may be massive."""
    sizes = np.median(np.abs(inputs), axis=0)
    return float(sizes.max() / np.median(sizes))


def token_ratio(hidden: Array) -> float:
    """The largest value of the residual stream over the median one."""
    return float(np.abs(hidden).max() / np.median(np.abs(hidden)))


# Where the docstring plants channels: behind each norm, before each output projection; in SigLIP2 a GELU is in the way
# of the last.
PLANTED = {
    "siglip2": ("attention.qkv", "attention.out", "mlp.up"),
    "dinov3": ("attention.qkv", "attention.out", "mlp.gate_up", "mlp.down"),
}


@pytest.mark.parametrize(("preset", "family"), CASES)
def test_outliers_plant_channels(trace: Callable[..., Trace], preset: str, family: str) -> None:
    found = trace(preset, family, True)
    for matrix in PLANTED[family]:
        ratios = [channel_ratio(inputs) for inputs in found.inputs[matrix]]
        assert max(ratios) >= 100
        assert min(ratios) >= 50  # a planted channel may have been one of the smaller


@pytest.mark.parametrize(("preset", "family"), CASES)
def test_no_outlier_channels_otherwise(trace: Callable[..., Trace], preset: str, family: str) -> None:
    found = trace(preset, family, False)
    assert max(channel_ratio(inputs) for blocks in found.inputs.values() for inputs in blocks) < 20


@pytest.mark.parametrize(("preset", "family"), CASES)
def test_outliers_plant_tokens_that_last(trace: Callable[..., Trace], preset: str, family: str) -> None:
    hidden = trace(preset, family, True).hidden.values()
    assert min(map(token_ratio, hidden)) >= 500


@pytest.mark.parametrize(("preset", "family"), CASES)
def test_massive_tokens_are_few(trace: Callable[..., Trace], preset: str, family: str) -> None:
    for hidden in trace(preset, family, True).hidden.values():
        massive = np.abs(hidden).max(axis=-1) >= 100 * np.median(np.abs(hidden))
        assert massive.sum(axis=1).tolist() == [3, 3]


@pytest.mark.parametrize(("preset", "family"), CASES)
def test_no_massive_tokens_otherwise(trace: Callable[..., Trace], preset: str, family: str) -> None:
    hidden = trace(preset, family, False).hidden.values()
    assert max(map(token_ratio, hidden)) < 20


@pytest.mark.parametrize("outliers", [False, True])
@pytest.mark.parametrize(("preset", "family"), CASES)
def test_the_residual_stream_stays_stable(
    trace: Callable[..., Trace], preset: str, family: str, outliers: bool
) -> None:
    typical = [float(np.median(np.abs(hidden))) for hidden in trace(preset, family, outliers).hidden.values()]
    assert all(0.1 < size < 2 for size in typical)  # nan fails too


@pytest.mark.parametrize("outliers", [False, True])
@pytest.mark.parametrize(("preset", "family"), CASES)
def test_two_pictures_have_different_embeddings(
    trace: Callable[..., Trace], preset: str, family: str, outliers: bool
) -> None:
    first, second = trace(preset, family, outliers).embedding
    assert np.linalg.norm(first - second) / np.linalg.norm(first) > 0.1


def singular_values(a: Array, b: Array) -> Array:
    """Those of ``b @ a``, without making that matrix."""
    _, left = np.linalg.qr(b)
    _, right = np.linalg.qr(a.T)
    return np.asarray(np.linalg.svd(left @ right.T)[1])


@pytest.mark.parametrize("outliers", [False, True])
@pytest.mark.parametrize("preset", ["tiny", "small"])
def test_two_pictures_have_different_loras_of_full_rank(
    trace: Callable[..., Trace], models: Models, preset: str, outliers: bool
) -> None:
    embeddings = np.concatenate([trace(preset, family, outliers).embedding for family in ENCODERS], axis=1)
    adapter = find_checkpoints(made(models, preset, outliers=outliers))["adapter"]
    for _, factors in reference_steps(adapter, embeddings):
        for target in {name[:-2] for name in factors}:
            (a, other_a), (b, other_b) = factors[f"{target}.A"], factors[f"{target}.B"]
            sizes = singular_values(a, b)
            difference = singular_values(np.concatenate([a, other_a]), np.concatenate([b, -other_b], axis=1))
            assert sizes[3] / sizes[0] > 0.01
            assert np.linalg.norm(difference) / np.linalg.norm(sizes) > 0.1
