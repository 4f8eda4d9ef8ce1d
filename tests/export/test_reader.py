"""Reading checkpoints past the page cache: whole blocks, every tensor, nothing stale."""

import os
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from conftest import MakeModels
from i2l.engines.directory.tensorfile import TensorInfo, read_header
from i2l.errors import CheckpointUnreadable
from i2l.export.checkpoints import reader
from i2l.export.checkpoints.finding import find_checkpoints
from i2l.export.checkpoints.reader import BLOCK, GAP, plan_ranges, stream_tensors
from i2l.export.checkpoints.recognise import Checkpoint
from i2l.specs import PRESETS, Family

placements = st.lists(st.tuples(st.integers(0, 3 * GAP), st.integers(1, 3 * BLOCK)), min_size=1, max_size=20)


@given(placements)
def test_ranges_are_whole_blocks_that_hold_every_tensor(placements: list[tuple[int, int]]) -> None:
    tensors: dict[str, TensorInfo] = {}
    end = 0
    for gap, nbytes in placements:
        tensors[str(len(tensors))] = TensorInfo("U8", (nbytes,), end + gap)
        end += gap + nbytes
    ranges, places = plan_ranges(tensors)
    assert all(value % BLOCK == 0 for part in ranges for value in (part.offset, part.nbytes, part.place))
    for name, info in tensors.items():
        assert any(
            part.place <= places[name]
            and places[name] + info.nbytes <= part.place + part.nbytes
            and info.offset - part.offset == places[name] - part.place
            for part in ranges
        )
    kept = sorted((part.place, part.place + part.nbytes) for part in ranges)
    assert all(first[1] <= second[0] for first, second in pairwise(kept))
    read = sorted((part.offset, part.offset + part.nbytes) for part in ranges)
    assert all(first[1] + GAP < second[0] for first, second in pairwise(read))


@pytest.mark.parametrize("direct", [True, False], ids=["past the page cache", "through the page cache"])
@pytest.mark.parametrize("family", ["siglip2", "dinov3", "adapter"])
def test_the_tensors_are_those_of_the_library(
    family: Family, models: MakeModels, monkeypatch: pytest.MonkeyPatch, *, direct: bool
) -> None:
    if not direct:
        monkeypatch.delattr(os, "O_DIRECT", raising=False)
    checkpoint = find_checkpoints(models("tiny"))[family]
    wanted = load_file(checkpoint.path)
    names = list(wanted)
    groups = [names[start : start + 7] for start in range(0, len(names), 7)]
    for group, tensors in zip(groups, stream_tensors(checkpoint, groups), strict=True):
        assert list(tensors) == group
        for name, tensor in tensors.items():
            assert torch.equal(tensor.contiguous().view(torch.uint8), wanted[name].contiguous().view(torch.uint8))


@pytest.mark.parametrize("buffers_bytes", [0, 1 << 30], ids=["one buffer", "two buffers"])
def test_a_group_stays_while_it_is_used(
    buffers_bytes: int, models: MakeModels, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(reader, "BUFFERS_BYTES", buffers_bytes)
    checkpoint = find_checkpoints(models("tiny"))["dinov3"]
    wanted = load_file(checkpoint.path)
    groups = [[name] for name in wanted] * 2
    for (name,), tensors in zip(groups, stream_tensors(checkpoint, groups), strict=True):
        assert torch.equal(tensors[name], wanted[name])
        assert torch.equal(tensors[name], wanted[name])  # the next group is being read meanwhile


def test_a_file_that_became_shorter_is_an_error(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    save_file({"first": torch.zeros(5000), "last": torch.zeros(5000)}, path)
    checkpoint = Checkpoint(path, PRESETS["tiny"].siglip2, read_header(path)[0])
    os.truncate(path, 3 * BLOCK)
    with pytest.raises(CheckpointUnreadable, match="became shorter"):
        list(stream_tensors(checkpoint, [["first", "last"]]))
