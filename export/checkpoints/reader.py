"""A checkpoint's tensors, read group by group past the page cache: 21 GB that are needed once.

Reading through the page cache makes the system find a fresh page for every 4 KiB, only to throw it away: on the virtual
machine of docs/adr/0003 that cost more than quantising. With ``O_DIRECT`` the disk writes into two buffers that are
used again and again, and no core is busy; the next group is read while the current one is worked on. Such reads must
start and end on a block of the disk, so tensors that lie side by side are read as one range. Where the system or the
file system knows no ``O_DIRECT``, the same reads go the usual way.
"""

import errno
import io
import mmap
import os
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from ...engines.directory.tensorfile import TensorInfo
from .errors import CheckpointUnreadable
from .recognise import Checkpoint
from .torch_dtypes import TORCH_DTYPES

BLOCK = 4096
"""A multiple of every disk's block."""
GAP = 64 << 10
"""Tensors nearer than this are read as one range: shorter than what a disk transfers while it seeks."""
PIECE = 4 << 20
"""Bytes of one read; larger ones were not faster."""
BUFFERS_BYTES = 768 << 20
"""Two buffers must fit, else there is one and nothing is read ahead: a float32 block of DINOv3-7B takes 0.6 GiB."""


@dataclass(frozen=True)
class Range:
    """Bytes ``[offset, offset + nbytes)`` of the file, kept at ``place`` of a buffer; all three whole blocks."""

    offset: int
    nbytes: int
    place: int


def stream_tensors(checkpoint: Checkpoint, groups: Sequence[Sequence[str]]) -> Iterator[dict[str, Tensor]]:
    """The tensors of every group in turn, as they lie in the file; valid until the next group is asked for.

    FP8 values that have a scale are float32, times it.

    Raises:
        CheckpointUnreadable: the file ends early; it was whole when its header was read.
    """
    plans = [_plan_group(checkpoint, group) for group in groups]
    largest = max(plan.nbytes for plan in plans)
    buffers = [memoryview(mmap.mmap(-1, largest)) for _ in range(2 if 2 * largest <= BUFFERS_BYTES else 1)]
    with ExitStack() as stack:
        files = {path: stack.enter_context(open_direct(path)) for path in _paths(checkpoint)}
        pool = stack.enter_context(ThreadPoolExecutor(1, "i2l-checkpoint-reader"))

        def fill(index: int) -> None:
            for path, ranges in plans[index].ranges:
                read_ranges(files[path], ranges, buffers[index % len(buffers)])

        def read(index: int) -> "Future[None]":
            return pool.submit(fill, index)

        coming = [read(index) for index in range(min(len(buffers) - 1, len(plans)))]
        for index, (group, plan) in enumerate(zip(groups, plans, strict=True)):
            if index + len(buffers) - 1 < len(plans):
                coming.append(read(index + len(buffers) - 1))
            coming.pop(0).result()
            buffer = buffers[index % len(buffers)]
            tensors = {name: _tensor(buffer, plan.places[name], checkpoint.tensors[name]) for name in group}
            for name in tensors.keys() & checkpoint.scales.keys():
                scale = _tensor(buffer, plan.places[name, "scale"], checkpoint.scales[name][1])
                tensors[name] = scaled_values(tensors[name], scale)
            yield tensors


@dataclass(frozen=True)
class _GroupPlan:
    """What is read of each file for a group, and where its tensors then are in the buffer."""

    ranges: Sequence[tuple[Path, Sequence[Range]]]
    places: Mapping[str | tuple[str, str], int]
    nbytes: int


def scaled_values(values: Tensor, scale: Tensor) -> Tensor:
    """FP8 values times their scale, float32: one for all, for each row, or for each block of 128 x 128."""
    factor = scale.float()
    if factor.numel() == 1:
        factor = factor.reshape(())
    elif factor.ndim == 2 and factor.shape != (len(values), 1):
        rows, columns = values.shape
        factor = factor.repeat_interleave(128, 0)[:rows].repeat_interleave(128, 1)[:, :columns]
    else:
        factor = factor.reshape(-1, *([1] * (values.ndim - 1)))
    return values.float() * factor


def _plan_group(checkpoint: Checkpoint, group: Sequence[str]) -> _GroupPlan:
    by_file: dict[Path, dict[str | tuple[str, str], TensorInfo]] = {}
    for name in group:
        by_file.setdefault(checkpoint.file_of(name), {})[name] = checkpoint.tensors[name]
        if name in checkpoint.scales:
            path, info = checkpoint.scales[name]
            by_file.setdefault(path, {})[name, "scale"] = info
    ranges: list[tuple[Path, Sequence[Range]]] = []
    places: dict[str | tuple[str, str], int] = {}
    nbytes = 0
    for path, tensors in by_file.items():
        keys = {str(index): key for index, key in enumerate(tensors)}
        parts, own = plan_ranges({index: tensors[key] for index, key in keys.items()})
        ranges.append((path, [Range(part.offset, part.nbytes, part.place + nbytes) for part in parts]))
        places |= {keys[index]: place + nbytes for index, place in own.items()}
        nbytes += _buffer_bytes(parts)
    return _GroupPlan(ranges, places, nbytes)


def _paths(checkpoint: Checkpoint) -> list[Path]:
    return list(dict.fromkeys([*checkpoint.paths, *(path for path, _ in checkpoint.scales.values())]))


def plan_ranges(tensors: Mapping[str, TensorInfo]) -> tuple[list[Range], dict[str, int]]:
    """``(ranges to read, tensor -> its place in the buffer)``; no two ranges share a block of the file."""
    ranges: list[Range] = []
    places = {}
    for name, info in sorted(tensors.items(), key=lambda item: item[1].offset):
        start = info.offset - info.offset % BLOCK
        end = -(-(info.offset + info.nbytes) // BLOCK) * BLOCK
        last = ranges[-1] if ranges else None
        if last and start <= last.offset + last.nbytes + GAP:
            ranges[-1] = Range(last.offset, max(end - last.offset, last.nbytes), last.place)
        else:
            ranges.append(Range(start, end - start, _buffer_bytes(ranges)))
        places[name] = ranges[-1].place + info.offset - ranges[-1].offset
    return ranges, places


def open_direct(path: Path) -> io.FileIO:
    """Open a file for reading past the page cache, where that is possible."""
    direct = getattr(os, "O_DIRECT", 0)
    try:
        return io.FileIO(path, opener=lambda name, flags: os.open(name, flags | direct))
    except OSError as error:
        if error.errno != errno.EINVAL:  # what a file system without O_DIRECT says
            raise
        return io.FileIO(path)


def read_ranges(file: io.FileIO, ranges: Sequence[Range], buffer: memoryview) -> None:
    """Read ranges into their places.

    Raises:
        CheckpointUnreadable: the file ends before the last block of a range begins.
    """
    for part in ranges:
        file.seek(part.offset)
        done = 0
        while done < part.nbytes:
            count = file.readinto(buffer[part.place + done : part.place + min(done + PIECE, part.nbytes)]) or 0
            done += count
            if count % BLOCK or not count:  # the end of the file
                break
        if done <= part.nbytes - BLOCK:
            raise CheckpointUnreadable(Path(os.fsdecode(file.name)), "it became shorter while it was read")


def _buffer_bytes(ranges: Sequence[Range]) -> int:
    return ranges[-1].place + ranges[-1].nbytes if ranges else 0


def _tensor(buffer: memoryview, place: int, info: TensorInfo) -> Tensor:
    data = buffer[place : place + info.nbytes]
    return torch.frombuffer(data, dtype=TORCH_DTYPES[info.dtype]).view(info.shape)
