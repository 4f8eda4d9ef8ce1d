"""Qwen-Image-i2L Style: the other adapter, through the same graphs."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from safetensors import safe_open

from conftest import picture
from i2l.cli import main
from i2l.engines.manifest import read_manifest
from i2l.errors import AdapterAmbiguous, CheckpointMissing
from i2l.export.build import build_engines
from i2l.export.checkpoints import find_checkpoints, recognise, shape_hash, tensor_shapes
from i2l.export.synthetic import QWEN_IMAGE_FILE, make_checkpoints
from i2l.runtime.lora import describe_lora
from i2l.runtime.lowrank import product_error
from i2l.runtime.pipeline import open_engines
from i2l.specs import PRESETS, QWEN_IMAGE_ADAPTERS, AdapterSpec
from oracles import adapter_oracle

PUBLISHED_HASH = "0aad514690602ecaff932c701cb4b0bb"
VALUES = 2_406_481_920
"""Both of shared/facts/checkpoints.md."""


@pytest.fixture(scope="module")
def qwen_models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("qwen-models")
    make_checkpoints(folder, "tiny", adapter="qwen-image")
    return folder


@pytest.fixture(scope="module")
def qwen_engines(qwen_models: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("qwen-engines")
    build_engines(qwen_models, folder, precision="fp32")
    return folder


def test_the_published_checkpoint_is_known_by_its_shapes() -> None:
    shapes = tensor_shapes(QWEN_IMAGE_ADAPTERS["full"])
    assert shape_hash(shapes) == PUBLISHED_HASH
    assert sum(int(np.prod(shape)) for shape in shapes.values()) == VALUES


def test_a_file_without_a_carried_spec_is_recognised(tmp_path: Path) -> None:
    """The published shapes in a file with a hole where the values would be: nothing of 5 GB is written."""
    shapes = tensor_shapes(QWEN_IMAGE_ADAPTERS["full"])
    header, end = {}, 0
    for name, shape in shapes.items():
        start, end = end, end + 2 * int(np.prod(shape))
        header[name] = {"dtype": "BF16", "shape": list(shape), "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    path = tmp_path / "model.safetensors"
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.truncate(8 + len(text) + end)
    assert recognise(path).spec == QWEN_IMAGE_ADAPTERS["full"]


def test_the_lora_is_what_diffsynth_makes(qwen_models: Path, qwen_engines: Path) -> None:
    pictures = [picture(90, 60, 1), picture(60, 90, 2)]
    checkpoint = find_checkpoints(qwen_models)["adapter"]
    with open_engines(qwen_engines) as pipeline:
        embeddings = pipeline.embed(pictures)
        lora = pipeline.lora_from_embeddings(embeddings)
    singles = [adapter_oracle(checkpoint.spec, checkpoint.path)(torch.from_numpy(e)) for e in embeddings]
    modules = {key.removesuffix(".lora_A.default.weight") for key in singles[0] if ".lora_A." in key}
    assert lora.factors.keys() == modules
    assert len(modules) == 2 * 12  # blocks times targets
    for module in modules:
        a = torch.cat([single[f"{module}.lora_A.default.weight"] for single in singles]) / 2
        b = torch.cat([single[f"{module}.lora_B.default.weight"] for single in singles], dim=1)
        # two float32 programs: the order of summation
        assert product_error(lora.factors[module], (a.numpy(), b.numpy())) < 1e-4


@pytest.mark.parametrize(
    ("precision", "limit"),
    [
        ("int8", 0.05),
        ("fp8", 0.15),  # 3 bits of mantissa in two matrices of each factor
    ],
)
def test_the_other_precisions_build_and_stay_near(
    qwen_models: Path, qwen_engines: Path, tmp_path: Path, precision: str, limit: float
) -> None:
    build_engines(qwen_models, tmp_path, precision=precision)
    with open_engines(qwen_engines) as exact, open_engines(tmp_path) as near:
        embeddings = exact.embed([picture(90, 60, 1)])
        wanted, found = exact.lora_from_embeddings(embeddings), near.lora_from_embeddings(embeddings)
    worst = max(product_error(found.factors[m], wanted.factors[m]) for m in wanted.factors)
    assert 0 < worst < limit


def test_the_file_says_what_it_is_for(qwen_engines: Path, photo: Path, tmp_path: Path) -> None:
    output = tmp_path / "x.safetensors"
    arguments = ["run", str(photo), "--engines", str(qwen_engines), "--output", str(output)]
    assert CliRunner().invoke(main, arguments, catch_exceptions=False).exit_code == 0
    metadata = describe_lora(output)["metadata"]
    assert isinstance(metadata, dict)
    assert metadata["modelspec.architecture"] == "Qwen-Image/lora"
    assert metadata["ss_base_model_version"] == "qwen_image"
    with safe_open(output, framework="numpy") as file:
        assert "diffusion_model.transformer_blocks.1.img_mod.1.lora_A.weight" in file.keys()  # noqa: SIM118


def test_two_adapters_want_a_choice(qwen_models: Path, tmp_path: Path) -> None:
    models = tmp_path / "models"
    make_checkpoints(models, "tiny")
    with pytest.raises(CheckpointMissing):
        find_checkpoints(models, adapter="qwen-image")
    (models / QWEN_IMAGE_FILE).parent.mkdir()
    (models / QWEN_IMAGE_FILE).write_bytes((qwen_models / QWEN_IMAGE_FILE).read_bytes())
    with pytest.raises(AdapterAmbiguous, match=r"\(for qwen-image\).*choose one with --adapter"):
        find_checkpoints(models)
    build = ["build-engines", "--models", str(models), "--engines", str(tmp_path / "engines"), "--precision", "fp32"]
    assert CliRunner().invoke(main, build).exit_code == 1
    for name, spec in (("z-image", PRESETS["tiny"].adapter), ("qwen-image", QWEN_IMAGE_ADAPTERS["tiny"])):
        assert CliRunner().invoke(main, [*build, "--adapter", name], catch_exceptions=False).exit_code == 0
        built = read_manifest(tmp_path / "engines").models["adapter"].spec
        assert isinstance(built, AdapterSpec)
        assert built == spec


def test_verify_takes_the_adapter_of_the_engines(qwen_models: Path, qwen_engines: Path, photo: Path) -> None:
    arguments = [
        "verify",
        "--models",
        str(qwen_models),
        "--engines",
        str(qwen_engines),
        "--image",
        str(photo),
        "--json",
    ]
    result = CliRunner().invoke(main, arguments, catch_exceptions=False)
    assert result.exit_code == 0
    assert json.loads(result.stdout)["lora_worst"] < 1e-4
