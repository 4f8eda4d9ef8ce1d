"""Qwen-Image-i2L Style: the other adapter, through the same graphs."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from safetensors import safe_open

from conftest import MakeEngines, MakeModels, picture
from i2l.cli import main
from i2l.errors import AdapterAmbiguous, CheckpointMissing
from i2l.export.checkpoints.finding import find_checkpoints
from i2l.export.checkpoints.recognise import recognise
from i2l.export.checkpoints.shapes import shape_hash, tensor_shapes
from i2l.export.checkpoints.synthetic import QWEN_IMAGE_FILE, make_checkpoints
from i2l.lora.lowrank import product_error
from i2l.lora.reading import describe_lora
from i2l.runtime.pipeline import open_engines
from i2l.specs import PRESETS, QWEN_IMAGE_ADAPTERS, AdapterSpec, DiffusionModel
from oracles import adapter_oracle

PUBLISHED_HASH = "0aad514690602ecaff932c701cb4b0bb"
VALUES = 2_406_481_920
"""Both of shared/facts/checkpoints.md."""


@pytest.fixture(scope="module")
def qwen_models(models: MakeModels) -> Path:
    return models("tiny", adapter="qwen-image")


@pytest.fixture(scope="module")
def qwen_engines(engines: MakeEngines) -> Path:
    return engines("tiny", "fp32", adapter="qwen-image")


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


def test_int8_stays_near(engines: MakeEngines, qwen_engines: Path) -> None:
    with open_engines(qwen_engines) as exact, open_engines(engines("tiny", "int8", adapter="qwen-image")) as near:
        embeddings = exact.embed([picture(90, 60, 1)])
        wanted, found = exact.lora_from_embeddings(embeddings), near.lora_from_embeddings(embeddings)
    worst = max(product_error(found.factors[m], wanted.factors[m]) for m in wanted.factors)
    assert 0 < worst < 0.05  # 8 bits in two matrices of each factor


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
    specs: dict[DiffusionModel, AdapterSpec] = {
        "z-image": PRESETS["tiny"].adapter,
        "qwen-image": QWEN_IMAGE_ADAPTERS["tiny"],
    }
    for name, spec in specs.items():
        assert find_checkpoints(models, adapter=name)["adapter"].spec == spec
    build = ["build-engines", "--engines", str(tmp_path / "engines"), "--models"]
    result = CliRunner().invoke(main, [*build, str(models)])
    assert result.exit_code == 1
    assert "--adapter" in result.stderr
    result = CliRunner().invoke(main, [*build, str(qwen_models), "--adapter", "z-image"])  # the choice is heeded
    assert "no checkpoint for adapter" in result.stderr


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
