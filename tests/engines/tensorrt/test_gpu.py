"""What only a GPU shows; skipped with a reason where there is none. ``make test-gpu`` runs it."""

import shutil
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner

from conftest import MakeEngines, picture
from i2l.cli import main
from i2l.engines.backends import detect_backends
from i2l.engines.tensorrt.backend import TensorRTBackend
from i2l.engines.tensorrt.layers import products
from i2l.engines.tensorrt.library import current_sm
from i2l.errors import BudgetTooSmall, PrecisionUnsupported
from i2l.export.backends.cuda import build_cuda_graphs
from i2l.export.backends.tensorrt import build_plans
from i2l.runtime.pipeline import Pipeline

pytestmark = pytest.mark.gpu
STATUSES = {status.name: status for status in detect_backends()}
PICTURES = [picture(90, 70, seed=1), picture(64, 64, seed=2)]


@pytest.fixture(scope="module", params=["cuda", "tensorrt"])
def backend(request: pytest.FixtureRequest) -> str:
    status = STATUSES[request.param]
    if not status.works:
        pytest.skip(f"no {status.name} backend: {status.reason}")
    return str(status.name)


@pytest.fixture(scope="module", params=["int8", "fp8", "bf16"])
def directory(
    request: pytest.FixtureRequest, backend: str, engines: MakeEngines, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    copy = tmp_path_factory.mktemp("gpu") / request.param
    shutil.copytree(engines("tiny", request.param), copy)
    try:
        build_cuda_graphs(copy) if backend == "cuda" else build_plans(copy, [current_sm()])
    except PrecisionUnsupported as error:
        pytest.skip(str(error))
    return copy


def test_the_card_proves_itself(directory: Path, backend: str) -> None:
    result = CliRunner().invoke(main, ["prove", "--engines", str(directory), "--backend", backend, "--report", "-"])
    assert result.exit_code == 0, result.output


def test_the_cpus_lora_at_every_budget(directory: Path, backend: str) -> None:
    """Two ways to round: 2 % of int8's activations on the CPU, 16 or 8 bits on the GPU. Between budgets: not a bit."""
    with Pipeline(directory, backend="cpu") as pipeline:
        wanted = pipeline.lora_from_images(PICTURES)
    with pytest.raises(BudgetTooSmall) as caught:
        Pipeline(directory, backend=backend, vram_budget_bytes=1)
    first = None
    for spare in (0, 400_000, 1 << 30):
        budget = caught.value.needed_bytes + spare
        with Pipeline(directory, backend=backend, vram_budget_bytes=budget) as pipeline:
            found = [pipeline.lora_from_images(PICTURES) for _ in range(2)]
            assert pipeline.vram is not None
            assert pipeline.vram["measured_peak_bytes"] <= budget
        first = first or found[0]
        for lora in found:
            for module, (a, b) in wanted.factors.items():
                x, y = lora.factors[module]
                error = np.linalg.norm(y @ x - b @ a) / np.linalg.norm(b @ a)
                assert error < 0.15, (module, error)
                np.testing.assert_array_equal(x, first.factors[module][0])
                np.testing.assert_array_equal(y, first.factors[module][1])


def test_fp8_plans_multiply_fp8(directory: Path, backend: str) -> None:
    if (backend, directory.name) != ("tensorrt", "fp8"):
        pytest.skip("of TensorRT's FP8 plans")
    with Pipeline(directory, backend=backend) as pipeline:
        pipeline.lora_from_images(PICTURES)
        assert isinstance(pipeline._open.backend, TensorRTBackend)
        for graph in ("siglip2.block", "dinov3.block", "adapter.attention", "adapter.feed_forward"):
            found = products(pipeline._open.backend.opened[graph].layers)
            assert found.fp8 > 0, (graph, found)


def test_tensorrt_rtx_keeps_what_it_compiled(directory: Path, backend: str) -> None:
    if backend != "tensorrt" or "tensorrt_rtx" not in STATUSES[backend].reason:
        pytest.skip("of TensorRT-RTX")
    with Pipeline(directory, backend=backend) as pipeline:
        first = pipeline.lora_from_images(PICTURES)
    (kept,) = directory.rglob("*.jit")
    assert kept.stat().st_size > 0
    with Pipeline(directory, backend=backend) as pipeline:
        again = pipeline.lora_from_images(PICTURES)
    for module, factors in first.factors.items():
        for x, y in zip(again.factors[module], factors, strict=True):
            np.testing.assert_array_equal(x, y)
