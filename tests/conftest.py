"""Shared fixtures: synthetic checkpoints, engines built from them once per session, and pictures.

torch and onnx are imported inside functions: processes that tests start take pictures from here, and need neither.
"""

import hashlib
import os
import pickle
import signal
import struct
import uuid
from collections.abc import Callable, Iterator, Sequence
from functools import cache
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pytest
from filelock import FileLock
from numpy.typing import NDArray
from PIL import Image

from i2l.engines.base import CardFacts
from i2l.engines.cpu import backend as cpu_backend
from i2l.engines.plugin.loading import library_of
from i2l.engines.plugin.presence import find_plugin
from i2l.engines.plugin.providers import WEBGPU
from i2l.engines.tensorrt.library import build_plan
from i2l.lora.lora import Lora
from i2l.runtime.pipeline import Pipeline
from i2l.specs import Spec

if TYPE_CHECKING:
    import onnx

    from i2l.export.precisions.base import Precision

MakeModels = Callable[..., Path]
MakeEngines = Callable[..., Path]
EXPORTED: list[Path] = []
"""The folder of this session's graphs, which its processes share."""


@pytest.fixture(autouse=True)
def own_cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every test has an embedding cache of its own: a hit would hide what the encoders do."""
    monkeypatch.setenv("I2L_CACHE_DIR", str(tmp_path_factory.getbasetemp() / "caches" / uuid.uuid4().hex))


def pytest_configure() -> None:
    """A shell's background job ignores Ctrl-C, and so would the processes that tests start to interrupt."""
    signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_report_header() -> str:
    import onnxruntime

    versions = ", ".join(f"{name} {version(name)}" for name in ("torch", "onnx", "transformers", "onnxruntime"))
    return f"{versions} ({', '.join(onnxruntime.get_available_providers())})"


@pytest.fixture(scope="session")
def webgpu_card() -> Iterator[CardFacts]:
    """The card behind WebGPU, or the reason why the test is skipped.

    Its library stays loaded between the tests: compiling shaders takes a software renderer ten seconds and more.
    """
    status = find_plugin(WEBGPU)
    if not status.works:
        pytest.skip(f"{status.reason}: make test-webgpu runs this on a software device")
    library = library_of(WEBGPU)
    library.begin()
    yield status.cards[0]
    library.end()


@pytest.fixture(autouse=True)
def card_for_the_marked(request: pytest.FixtureRequest) -> None:
    if request.node.get_closest_marker("webgpu"):
        request.getfixturevalue("webgpu_card")


@pytest.fixture(scope="session")
def models(tmp_path_factory: pytest.TempPathFactory) -> MakeModels:
    """``models("tiny", outliers=True) -> folder`` of synthetic checkpoints; read-only for the tests."""
    made: dict[tuple[object, ...], Path] = {}

    def make(preset: str = "tiny", **options: object) -> Path:
        key = (preset, *sorted(options.items()))
        if key not in made:
            from i2l.export.checkpoints.synthetic import make_checkpoints

            made[key] = tmp_path_factory.mktemp(f"models-{preset}")
            make_checkpoints(made[key], preset, **options)  # type: ignore[arg-type]
        return made[key]

    return make


@pytest.fixture(scope="session")
def engines(models: MakeModels, tmp_path_factory: pytest.TempPathFactory) -> MakeEngines:
    """``engines("tiny", "fp32", outliers=True) -> engines directory``; read-only for the tests."""
    made: dict[tuple[object, ...], Path] = {}

    def make(preset: str = "tiny", precision: str = "fp32", blocks_per_chunk: int = 1, **options: object) -> Path:
        key = (preset, precision, blocks_per_chunk, *sorted(options.items()))
        if key not in made:
            from i2l.export.build import build_engines

            made[key] = tmp_path_factory.mktemp(f"engines-{preset}-{precision}")
            source = models(preset, **options)
            with pytest.MonkeyPatch.context() as patch:
                if preset == "small":  # nobody opens these: tiny's go through the same steps, and exporting takes 10 s
                    patch.setattr("i2l.export.build.write_plugin_graphs", lambda *_: None)
                build_engines(source, made[key], precision=precision, blocks_per_chunk=blocks_per_chunk)
        return made[key]

    return make


@cache
def graphs_once(
    spec: Spec, precision: "Precision", *, but: frozenset[str] = frozenset()
) -> tuple[tuple[str, "onnx.ModelProto"], ...]:
    """Exporting takes most of a tiny build's time and depends on these alone: one worker of a session does it."""
    import onnx

    from i2l.export.graphs.graphs import export_graphs

    exported = EXPORTED[0] / hashlib.sha256(repr((spec, precision, sorted(but))).encode()).hexdigest()
    with FileLock(f"{exported}.lock"):
        if not exported.exists():
            graphs = [(name, model.SerializeToString()) for name, model in export_graphs(spec, precision, but=but)]
            exported.write_bytes(pickle.dumps(graphs))
    return tuple((name, onnx.load_from_string(data)) for name, data in pickle.loads(exported.read_bytes()))


@pytest.fixture(scope="session", autouse=True)
def export_once(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Every build of a session shares graphs, and in a process plans of equal ones, each of which takes a second.

    torch makes its table of operators anew at every export, 0.8 s each time; nothing here changes the table.
    """
    from torch.onnx._internal.exporter._registration import ONNXRegistry

    folder = tmp_path_factory.getbasetemp()
    EXPORTED.append(folder.parent if "PYTEST_XDIST_WORKER" in os.environ else folder)  # a worker's is in the session's
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ONNXRegistry, "from_torchlib", staticmethod(cache(ONNXRegistry.from_torchlib)))
        patch.setattr("i2l.export.backends.tensorrt.build_plan", cache(build_plan))
        for module in ("build", "backends.cpu", "backends.cuda", "backends.plugin", "backends.tensorrt"):
            patch.setattr(f"i2l.export.{module}.export_graphs", graphs_once)
        yield


def picture(width: int, height: int, seed: int = 0) -> Image.Image:
    """A seeded RGB picture: smooth areas, an edge and noise."""
    generator = np.random.default_rng(seed)
    y, x = np.mgrid[0:height, 0:width]
    smooth = np.stack([x / width, y / height, (x + y) % 97 / 97], axis=-1)
    smooth[(x - width / 2) ** 2 + (y - height / 3) ** 2 < (min(width, height) / 4) ** 2] = generator.random(3)
    noisy = smooth + generator.normal(0, 0.05, smooth.shape)
    return Image.fromarray((np.clip(noisy, 0, 1) * 255).astype(np.uint8))


@pytest.fixture(scope="session")
def photo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A JPEG on disk."""
    path = tmp_path_factory.mktemp("photos") / "photo.jpg"
    picture(320, 240).save(path, quality=95)
    return path


def lora_of_one_batch(directory: Path, pictures: Sequence[Image.Image]) -> Lora:
    """The cpu backend's LoRA with all pictures in one batch, which float graphs get on a device only.

    How float products are cut, and so the order of their additions, depends on the batch: this one can be compared with
    a device's to the bit.
    """
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cpu_backend, "takes_batches", lambda _: True)
        with Pipeline(directory, backend="cpu", threads=1) as pipeline:
            return pipeline.lora_from_images(pictures)


ADOBE = np.array([[0.60974, 0.20528, 0.14919], [0.31111, 0.62567, 0.06322], [0.01947, 0.06087, 0.74457]])
"""The colorants of Adobe RGB under D50."""


def s15(value: float) -> bytes:
    return struct.pack(">i", round(value * 65536))


def matrix_profile(kind: bytes, gamma: float, columns: NDArray[np.float64] | None) -> bytes:
    """An ICC profile made by hand: a gamma curve, and for RGB the colorants under D50."""
    white = np.array([0.9642, 1.0, 0.8249])
    tags = {b"desc": b"desc" + bytes(4) + struct.pack(">I", 5) + b"test\0" + bytes(78)}
    tags[b"wtpt"] = b"XYZ " + bytes(4) + b"".join(map(s15, white))
    curve = b"curv" + bytes(4) + struct.pack(">IH", 1, round(gamma * 256)) + bytes(2)
    if columns is None:
        tags[b"kTRC"] = curve
    else:
        for letter, column in zip("rgb", columns.T, strict=True):
            tags[f"{letter}XYZ".encode()] = b"XYZ " + bytes(4) + b"".join(map(s15, column))
            tags[f"{letter}TRC".encode()] = curve
    tags[b"cprt"] = b"text" + bytes(4) + b"none\0\0\0\0"
    table, body, start = b"", b"", 128 + 4 + 12 * len(tags)
    for name, data in tags.items():
        padded = data + bytes(-len(data) % 4)
        table += name + struct.pack(">II", start + len(body), len(data))
        body += padded
    size = start + len(body)
    head = struct.pack(">I4sI4s4s4s", size, bytes(4), 0x02100000, b"mntr", kind, b"XYZ ") + bytes(12) + b"acsp"
    head += bytes(28) + b"".join(map(s15, white)) + bytes(48)
    return head[:128] + struct.pack(">I", len(tags)) + table + body
