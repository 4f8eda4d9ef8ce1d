"""Two at once (faults 6, 13, 19, 26 of the first injection)."""

import pickle
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from conftest import MakeEngines, picture
from i2l.engines.base import Array
from i2l.errors import PipelineBusy, PipelineNotPicklable
from i2l.runtime.pipeline import Pipeline, open_engines
from injectors import names, run_python

PICTURE = picture(64, 64)


@pytest.fixture
def pipeline(engines: MakeEngines) -> Iterator[Pipeline]:
    with open_engines(engines("tiny", "int8")) as opened:
        yield opened


def in_thread(work: Callable[[], object]) -> object:
    """What happens in another thread: its value or its error."""
    outcome: list[object] = []

    def call() -> None:
        try:
            outcome.append(work())
        except PipelineBusy as error:
            outcome.append(error)

    thread = threading.Thread(target=call)
    thread.start()
    thread.join(60)
    assert not thread.is_alive()
    return outcome[0]


@pytest.mark.parametrize("what", ["lora_from_images", "embed", "close"])
def test_a_second_thread_is_told_at_once(pipeline: Pipeline, what: str) -> None:
    seen: list[object] = []

    def other(_: str, __: dict[str, Array]) -> None:
        if not seen:
            work = {
                "lora_from_images": lambda: pipeline.lora_from_images([PICTURE]),
                "embed": lambda: pipeline.embed([PICTURE]),
                "close": pipeline.close,
            }[what]
            seen.append(in_thread(work))

    pipeline.embed_pixels(pipeline.pixels([PICTURE]), observe=other)
    assert isinstance(seen[0], PipelineBusy)
    assert in_thread(lambda: pipeline.lora_from_images([PICTURE]).rank) == 4  # free again, for any thread


def test_a_failed_call_leaves_the_pipeline_free(pipeline: Pipeline) -> None:
    with pytest.raises(ValueError, match="strength"):
        pipeline.lora_from_images([PICTURE], strength=float("nan"))
    assert in_thread(lambda: pipeline.lora_from_images([PICTURE]).rank) == 4


def test_threads_with_a_pipeline_each_share_a_cache(engines: MakeEngines, tmp_path: Path) -> None:
    pictures = [picture(40, 40, seed) for seed in range(3)]
    with open_engines(engines("tiny", "int8"), threads=1) as one:
        wanted = one.embed(pictures)
    found: list[Any] = []

    def work() -> None:
        with open_engines(engines("tiny", "int8"), cache=tmp_path / "cache", threads=1) as own:
            found.extend(own.embed(pictures) for _ in range(3))
            assert own.cache is not None
            assert own.cache._writable

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(120)
    assert len(found) == 12
    assert all(np.array_equal(wanted, each) for each in found)
    assert len(list((tmp_path / "cache").iterdir())) == 3


def test_a_pipeline_is_not_pickled(pipeline: Pipeline) -> None:
    with pytest.raises(PipelineNotPicklable, match="open one there"):
        pickle.dumps(pipeline)


FORKED = """
import os, sys, warnings
warnings.simplefilter("ignore")
import i2l
from PIL import Image
image = Image.new("RGB", (64, 64), "red")
with i2l.open_engines(sys.argv[1]) as pipeline:
    if sys.argv[2] == "used":
        pipeline.lora_from_images([image])
    child = os.fork()
    if not child:
        try:
            pipeline.lora_from_images([image])
        except i2l.I2LError as error:
            print(type(error).__name__, flush=True)
        pipeline.close()
        with i2l.open_engines(sys.argv[1]) as own:
            print(own.lora_from_images([image]).rank, flush=True)
        os._exit(0)
    print(os.waitpid(child, 0)[1], pipeline.lora_from_images([image]).rank)
"""


@pytest.mark.parametrize("state", ["used", "unused"])
def test_a_forked_child_is_told_and_opens_its_own(engines: MakeEngines, state: str) -> None:
    done = run_python(FORKED, engines("tiny", "int8"), state, timeout=60)
    assert done.stdout.split() == ["PipelineInChild", "4", "0", "4"], done.stderr


SAVING = """
import sys
from pathlib import Path
import numpy as np
from i2l.lora.lora import Lora
path, value, stop = Path(sys.argv[1]), float(sys.argv[2]), Path(sys.argv[3])
pair = np.full((4, 8), value, np.float32), np.full((8, 4), value, np.float32)
lora = Lora({f"layers.{i}.attention.to_q": pair for i in range(30)})
while not stop.exists():
    lora.save(path)
"""


def test_processes_that_save_to_one_path_leave_one_whole_file(tmp_path: Path) -> None:
    path, stop = tmp_path / "saved" / "x.safetensors", tmp_path / "stop"
    running = [subprocess.Popen([sys.executable, "-c", SAVING, path, str(value), stop]) for value in (1, 2)]
    seen: set[float] = set()
    deadline = time.monotonic() + 60
    looks = 0
    try:
        while looks < 50 or len(seen) < 2:  # both are at it
            assert time.monotonic() < deadline
            if path.exists():
                values = {float(tensor.reshape(-1)[0]) for tensor in load_bf16(path)}
                assert values in ({1.0}, {2.0})
                seen |= values
                looks += 1
            time.sleep(0.01)
    finally:
        stop.touch()
    assert [process.wait() for process in running] == [0, 0]
    assert names(path.parent) == ["x.safetensors"]


def load_bf16(path: Path) -> list[Array]:
    from i2l.lora.reading import read_lora

    return [factor for pair in read_lora(path).lora.factors.values() for factor in pair]
