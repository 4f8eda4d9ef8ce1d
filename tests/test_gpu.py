"""What only a GPU shows; skipped with a reason where there is none. ``make test-gpu`` runs it."""

import shutil
from pathlib import Path

import numpy as np
import pytest

from conftest import MakeEngines, picture
from i2l.engines.detect import detect_backends
from i2l.errors import BudgetTooSmall
from i2l.export.cuda_graphs import build_cuda_graphs
from i2l.runtime.pipeline import Pipeline

CUDA = next(status for status in detect_backends() if status.name == "cuda")
pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not CUDA.works, reason=f"no cuda backend: {CUDA.reason}")]
PICTURES = [picture(90, 70, seed=1), picture(64, 64, seed=2)]


@pytest.fixture(scope="module", params=["int8", "fp8", "bf16"])
def directory(request: pytest.FixtureRequest, engines: MakeEngines, tmp_path_factory: pytest.TempPathFactory) -> Path:
    copy = tmp_path_factory.mktemp("gpu") / request.param
    shutil.copytree(engines("tiny", request.param), copy)
    build_cuda_graphs(copy)
    return copy


def test_the_cpus_lora_at_every_budget(directory: Path) -> None:
    """Two ways to round: 2 % of int8's activations on the CPU, bfloat16 on the GPU. Between budgets: not a bit."""
    with Pipeline(directory, backend="cpu") as pipeline:
        wanted = pipeline.lora_from_images(PICTURES)
    with pytest.raises(BudgetTooSmall) as caught:
        Pipeline(directory, backend="cuda", vram_budget_bytes=1)
    first = None
    for spare in (0, 400_000, 1 << 30):
        budget = caught.value.needed_bytes + spare
        with Pipeline(directory, backend="cuda", vram_budget_bytes=budget) as pipeline:
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
