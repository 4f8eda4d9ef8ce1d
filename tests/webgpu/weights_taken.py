"""A process that streams known weights through a plan, and says what it grew by: ``weights grown planned`` bytes.

Planned are the chunks and one more: what is read comes through a buffer that the provider keeps, as a backend plans.

usage: weights_taken.py FOLDER SPARE_CHUNKS      the folder holds tiny.onnx; so many chunks more than the least budget
"""

import ctypes
import sys
from functools import partial
from mmap import mmap
from pathlib import Path

import numpy as np

from i2l.engines.device.residency import Slots, plan_residency
from i2l.engines.directory.manifest import Chunk, Model, Step
from i2l.engines.directory.tensorfile import TensorInfo
from i2l.engines.plugin.presence import seat_for
from i2l.engines.plugin.providers import WEBGPU
from i2l.engines.plugin.value_slots import open_stores
from i2l.machine.memory import anonymous_bytes
from i2l.machine.platforms.mapping import open_mapped
from i2l.runtime.streamer import stream
from i2l.specs import PRESETS, Family

BLOCKS, CHUNK_BYTES = 7, 16 << 20


def own_bytes() -> int:
    """Of this process, what the C library could give back left out."""
    ctypes.CDLL(None).malloc_trim(0)
    nbytes = anonymous_bytes()
    assert nbytes is not None
    return nbytes


def main(folder: Path, spare_chunks: int) -> None:
    steps = [Step(f"dinov3.block.{index}", "dinov3.block") for index in range(BLOCKS)]
    chunks = tuple(Chunk(CHUNK_BYTES * index, CHUNK_BYTES, (step,)) for index, step in enumerate(steps))
    infos = {chunk: TensorInfo("U8", (4, CHUNK_BYTES // 4), chunk.offset) for chunk in chunks}
    model = Model(PRESETS["tiny"].dinov3, "pack", chunks, {}, {})
    with (folder / "pack").open("wb") as file:
        for index in range(BLOCKS):
            file.write(bytes([index + 1]) * CHUNK_BYTES)
    slots = Slots(kinds={("dinov3", index): "one" for index in range(BLOCKS)}, staged=True)
    plan = partial(plan_residency, {"dinov3": chunks}, {}, slots=slots, reserved_bytes=0)
    planned = plan(plan(1 << 40).least_bytes + spare_chunks * CHUNK_BYTES)
    device = seat_for(WEBGPU, None).open()
    session = device.session("tiny", (folder / "tiny.onnx").read_bytes())
    device.open()
    warm = device.allocate(np.uint8, (1 << 20,))
    device.write(warm, np.ones(1 << 20, np.uint8))
    device.read(warm)
    before = own_bytes()
    packs: dict[Family, mmap] = {"dinov3": open_mapped(folder / "pack")}
    places = {chunk: ({"w": infos[chunk]},) for chunk in chunks}
    stores = open_stores(device, {"dinov3": model}, packs, {"dinov3": places}, planned.resident, planned.slots)
    for _ in range(2):
        for step, values in stream(stores["dinov3"], chunks):
            number = int(step.name.rpartition(".")[2])
            assert (device.read(values["w"]) == number + 1).all(), step.name
    sys.stdout.write(f"{planned.weight_bytes} {own_bytes() - before} {planned.peak_bytes + CHUNK_BYTES}\n")
    del session


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]))
