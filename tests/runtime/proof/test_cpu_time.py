"""The CPU's time, of engines that it runs and of those that it would first convert."""

from pathlib import Path

import numpy as np
import pytest

from conftest import MakeEngines
from i2l.engines.base import Limits
from i2l.engines.cpu.converted import CPU_FOLDER, convert_part, cpu_engines
from i2l.engines.directory.manifest import PROOFS, inputs_of, read_manifest
from i2l.runtime.proof.judging import stretch
from i2l.runtime.proof.proving import Prover


@pytest.mark.parametrize("precision", ["int8", "fp8"])
def test_the_cpu_is_timed_and_nothing_is_left(engines: MakeEngines, precision: str) -> None:
    directory = engines("tiny", precision)
    before = sorted(path.name for path in directory.iterdir())
    outcome = Prover(directory, Limits(1, threads=1)).cpu_time()
    assert not outcome.failure
    assert outcome.ms_per_image
    assert outcome.estimated == (precision == "fp8" and CPU_FOLDER not in before)
    assert sorted(path.name for path in directory.iterdir()) == before
    assert PROOFS not in before


def test_a_part_is_what_a_whole_conversion_holds_there(engines: MakeEngines, tmp_path: Path) -> None:
    directory = engines("tiny", "fp8")
    manifest = read_manifest(directory)
    part = convert_part(directory, manifest, lambda chunks: stretch(chunks, 2), tmp_path)
    folder, whole = cpu_engines(directory, manifest, threads=1)
    for family, model in part.models.items():
        assert len(model.chunks) == 2
        found = np.fromfile(tmp_path / part.build / model.pack, np.uint8)
        wanted = np.fromfile(folder / whole.build / model.pack, np.uint8)
        for chunk in model.chunks:
            for step in chunk.steps:
                theirs = inputs_of(step, whole.models[family])
                for name, info in inputs_of(step, model).items():
                    at = theirs[name].offset
                    assert (chunk.offset, info.shape) <= (info.offset, theirs[name].shape)
                    ours = found[info.offset : info.offset + info.nbytes]
                    np.testing.assert_array_equal(ours, wanted[at : at + info.nbytes])
