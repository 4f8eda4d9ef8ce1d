"""FP8 packs to int8 packs, without torch: what makes engines built for a GPU run on a CPU at the CPU's speed.

onnxruntime's CPU has no FP8 product, and its DequantizeLinear decodes one value at a time. So a pack is converted once,
matrix by matrix, into what the int8 build of the same checkpoint would hold but for the rounding that FP8 has done
already; norms and biases are copied. Decoding is a table: numpy looks two codes up at once in 65536 pairs (512 KiB,
which stay in the cache), 1.5 times as fast as one by one and twice as fast as shifting the bits into place.
"""

from collections import deque
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from mmap import mmap
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from ...machine.platforms.mapping import give_back, open_mapped, read_ahead
from ..base import Array
from ..directory.hashing import FileFacts
from ..directory.manifest import Model
from ..directory.tensorfile import PAD_PREFIX, TENSOR_ALIGN, Layout, LayoutWriter, TensorInfo, plan_layout
from .rotation import balanced_rotation, rotate, rotation
from .sums import LARGEST_PAIR, WEIGHT_LEVELS

Codes: TypeAlias = NDArray[np.uint8]
Job: TypeAlias = Callable[[], NDArray[Any]]
"""Makes the next bytes of a tensor."""
SMALLEST = 1e-30
"""Keeps the scale of a row of zeros from being zero, as in export/precisions/base.py."""
PIECE_VALUES = 1 << 19
"""Values handled at a time where no panel says it: 2 MiB of float32 stay in the cache."""
PIECES_AHEAD = 4
"""Converted pieces per thread, of half a MiB to 5 MiB, that may wait for the disk."""


class PairTable:
    """A function of one byte, applied to many: pairs of bytes are looked up together."""

    def __init__(self, values: NDArray[Any]) -> None:
        """``values [256]``, of one or four bytes each."""
        self._values = values
        pairs = np.empty((256, 256, 2), values.dtype)  # [second code, first code]: the first is the low byte
        pairs[..., 0], pairs[..., 1] = values[None, :], values[:, None]
        self._pairs = pairs.reshape(-1).view(f"u{2 * values.itemsize}")

    def look_up(self, codes: Codes) -> NDArray[Any]:
        """``values[codes]``, of the same shape."""
        flat = codes.reshape(-1)
        if flat.size % 2:
            return np.take(self._values, codes)
        return np.take(self._pairs, flat.view("<u2")).view(self._values.dtype).reshape(codes.shape)


def e4m3_values() -> Array:
    """The value of every e4m3 code, float32 ``[256]``; NaN for 0x7F and 0xFF.

    Shifted into place, sign, exponent and mantissa are a float16 whose exponent counts from 8 lower.
    """
    codes = np.arange(256, dtype=np.uint16)
    values = ((codes & 0x80) << 8 | (codes & 0x7F) << 7).view(np.float16).astype(np.float32) * 256
    values[[0x7F, 0xFF]] = np.nan
    return values


VALUES = PairTable(e4m3_values())


def rotated_panel(codes: Codes, matrix: Array) -> tuple[NDArray[np.int8], Array]:
    """One panel of the encoders' int8 form.

    Args:
        codes: e4m3 ``[p, in]``.
        matrix: the rotation ``[b, b]``.

    Returns:
        int8 ``[in, p]``, and the scales ``[p]`` in units of the FP8 matrix's own.
    """
    values = rotate(VALUES.look_up(codes), matrix)
    scale = exact_scales(values)
    values /= scale[:, None]
    np.rint(values, out=values)
    return np.ascontiguousarray(values.astype(np.int8).T), scale


def balanced_panels(codes: Codes, matrix: Array, scale: Array, out: Array, row: int) -> NDArray[np.int8]:
    """The panels of the adapter's int8 form that share input channels, int8 ``[out / q, p', q]``.

    Args:
        codes: e4m3 ``[out, p]``.
        matrix: the balanced rotation ``[b, b']``.
        scale: of the FP8 matrix ``[out]``.
        out: the panels' scales ``[out]`` are written there.
        row: output channels of a panel, ``q``.
    """
    size, after = matrix.shape
    width = codes.shape[1] // size * after
    panel = np.empty((width, len(codes)), np.int8)
    step = max(1, PIECE_VALUES // width)
    for start in range(0, len(codes), step):
        rows = slice(start, start + step)
        values = rotate(VALUES.look_up(np.ascontiguousarray(codes[rows])), matrix)
        blocks = values.reshape(len(values), -1, after)
        relative = np.maximum(largest_of(values) / np.float32(WEIGHT_LEVELS), np.float32(SMALLEST))
        values /= relative[:, None]
        np.rint(values, out=values)
        blocks[:, :, size + 1] = -blocks.sum(axis=2)
        panel[:, rows] = values.astype(np.int8).T
        np.maximum(relative * scale[rows], np.float32(SMALLEST), out=out[rows])
    return np.ascontiguousarray(panel.reshape(width, -1, row).swapaxes(0, 1))


def largest_of(values: Array) -> Array:
    """The largest size in each row, without the copy that ``abs`` makes."""
    return np.asarray(np.maximum(values.max(axis=1), -values.min(axis=1)))


def exact_scales(values: Array) -> Array:
    """The scale ``[rows]`` of int8 weights whose products every CPU adds exactly (sums.py)."""
    even = values[:, : values.shape[1] // 2 * 2]
    pair = np.abs(even.reshape(len(values), -1, 2).sum(axis=2)).max(axis=1, initial=0)
    scale = np.maximum(largest_of(values) / np.float32(WEIGHT_LEVELS), pair / np.float32(LARGEST_PAIR))
    return np.asarray(np.maximum(scale, np.float32(SMALLEST)))


def transcode_pack(
    source: Path, model: Model, path: Path, wanted: Model, *, threads: int, advance: Callable[[int], None]
) -> FileFacts:
    """Convert an FP8 pack and return the facts of the new file.

    Args:
        source: the FP8 pack.
        model: its facts.
        path: the new pack.
        wanted: the facts of the int8 pack.
        threads: that convert; another one hashes and writes.
        advance: told the bytes handed to the disk.
    """
    mapped = open_mapped(source)  # goes with the last array that looks at it
    jobs = _jobs(mapped, model.tensors, wanted.tensors)
    with LayoutWriter(path, layout_of(wanted)) as writer, ThreadPoolExecutor(threads, "i2l-transcode") as pool:
        for name, data in _in_order(pool, jobs, PIECES_AHEAD * threads):
            writer.write(name, data.reshape(-1).view(np.uint8).data)
            advance(data.nbytes)
    return writer.facts


def layout_of(model: Model) -> Layout:
    """The layout that a model's pack was planned with, header included."""
    starts = {chunk.offset for chunk in model.chunks}
    tensors = {name: info for name, info in model.tensors.items() if not name.startswith(PAD_PREFIX)}
    return plan_layout(
        ((name, info.dtype, info.shape) for name, info in tensors.items()),
        {"format": "pt"},
        align=TENSOR_ALIGN,
        page_starts=frozenset(name for name, info in tensors.items() if info.offset in starts),
    )


def _jobs(
    mapped: mmap, stored: Mapping[str, TensorInfo], wanted: Mapping[str, TensorInfo]
) -> Iterator[tuple[str, Job]]:
    """Every piece of the new pack in file order; pages of the old one come in ahead and go behind.

    A matrix's scales are collected while its panels are made and are whole once these have been taken in order.
    """
    scales: dict[str, Array] = {}
    names = [name for name in wanted if not name.startswith(PAD_PREFIX)]
    before = 0
    for name, following in zip(names, [*names[1:], names[-1]], strict=True):
        old, new = stored[name], wanted[name]
        give_back(mapped, 0, before)
        before = old.offset
        read_ahead(mapped, stored[following].offset, stored[following].nbytes)
        if name in scales:
            yield name, partial(np.asarray, scales.pop(name))
            continue
        values = np.frombuffer(mapped, np.uint8, old.nbytes, old.offset)
        if old.dtype != "F8_E4M3":
            yield name, partial(np.asarray, values)
            continue
        codes = values.reshape(old.shape)
        scale_info = stored[scale_name := f"{name.removesuffix('weight')}scale"]
        scale = np.frombuffer(mapped, np.float32, scale_info.shape[0], scale_info.offset)
        if len(new.shape) == 5:  # the adapter's
            matrix = balanced_rotation(old.shape[1])
            scales[scale_name] = collected = np.empty((new.shape[0], old.shape[0]), np.float32)
            for index, columns in enumerate(np.split(codes, new.shape[0], axis=1)):
                yield name, partial(balanced_panels, columns, matrix, scale, collected[index], new.shape[4])
        else:
            panels, in_features, width = new.shape
            matrix = rotation(in_features)
            scales[scale_name] = collected = np.empty((panels, width), np.float32)
            for index in range(panels):
                panel = slice(index * width, (index + 1) * width)
                yield name, partial(_panel, codes[panel], matrix, scale[panel], collected[index])


def _panel(codes: Codes, matrix: Array, scale: Array, out: Array) -> NDArray[np.int8]:
    """:func:`rotated_panel`, its scales written to ``out``."""
    values, relative = rotated_panel(codes, matrix)
    np.maximum(relative * scale, np.float32(SMALLEST), out=out)
    return values


def _in_order(
    pool: ThreadPoolExecutor, jobs: Iterator[tuple[str, Job]], ahead: int
) -> Iterator[tuple[str, NDArray[Any]]]:
    """The results of ``jobs`` in their order, at most ``ahead`` of them waiting."""
    waiting: deque[tuple[str, Future[NDArray[Any]]]] = deque()
    for name, job in jobs:
        waiting.append((name, pool.submit(job)))
        if len(waiting) > ahead:
            first, future = waiting.popleft()
            yield first, future.result()
    for first, future in waiting:
        yield first, future.result()
