"""safetensors files, read by offset and written as a stream.

The safetensors library reads and writes whole tensors; we stream models that are larger than memory, copy regions of a
file as one piece, and need every tensor at an aligned address. So the layout is planned first (pure), the header is
written, and the bytes follow in order. The format allows no holes: alignment comes from blanks at the end of the header
and from filler tensors named ``.pad.N``.

Format: 8 bytes little-endian header length, a JSON header, the data. Offsets in the header count from the data's start;
offsets here count from the file's start, because that is what ``mmap``, ``pread`` and ONNX external data take.
"""

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import BinaryIO, Self

from safetensors import SafetensorError, safe_open

from ...machine.files import regular_file_problem
from .hashing import FileFacts, Hasher

DTYPE_BYTES: Mapping[str, int] = {
    "F64": 8, "F32": 4, "F16": 2, "BF16": 2, "F8_E4M3": 1, "F8_E5M2": 1,
    "I64": 8, "I32": 4, "I16": 2, "I8": 1, "U64": 8, "U32": 4, "U16": 2, "U8": 1, "BOOL": 1,
}  # fmt: skip
TENSOR_ALIGN = 256
"""TensorRT wants input addresses at multiples of 256 bytes; the same serves AVX-512 loads."""
PAGE = 4096
"""``madvise`` works on whole pages: chunks start on one."""
PAD_PREFIX = ".pad."
MAX_HEADER = 100_000_000
"""Bytes; what the safetensors library accepts."""


@dataclass(frozen=True)
class TensorInfo:
    """One tensor's place in a file."""

    dtype: str
    """safetensors name, such as ``BF16``."""
    shape: tuple[int, ...]
    offset: int
    """Bytes from the start of the file."""

    @property
    def nbytes(self) -> int:
        return tensor_bytes(self.dtype, self.shape)


@dataclass(frozen=True)
class Layout:
    """A planned file: the header as it will stand in the file, and every tensor's place."""

    header: bytes
    tensors: Mapping[str, TensorInfo]
    """In file order, fillers included."""
    nbytes: int
    """Size of the whole file."""


def tensor_bytes(dtype: str, shape: Sequence[int]) -> int:
    """Bytes of a tensor."""
    return DTYPE_BYTES[dtype] * math.prod(shape)


def plan_layout(
    tensors: Iterable[tuple[str, str, tuple[int, ...]]],
    metadata: Mapping[str, str] | None = None,
    *,
    align: int = 1,
    page_starts: frozenset[str] = frozenset(),
) -> Layout:
    """Place tensors one after another, in the given order.

    Args:
        tensors: ``(name, safetensors dtype, shape)``.
        metadata: the header's ``__metadata__``.
        align: every tensor starts at a multiple of this many bytes of the file.
        page_starts: names of tensors that start on a page.
    """
    placed: dict[str, tuple[str, tuple[int, ...], int]] = {}
    end = 0
    for name, dtype, shape in tensors:
        step = max(align, PAGE) if name in page_starts else align
        if gap := -end % step:
            placed[f"{PAD_PREFIX}{len(placed)}"] = ("U8", (gap,), end)
            end += gap
        placed[name] = (dtype, shape, end)
        end += tensor_bytes(dtype, shape)
    entries: dict[str, object] = {"__metadata__": dict(metadata)} if metadata else {}
    for name, (dtype, shape, start) in placed.items():
        entries[name] = {
            "dtype": dtype,
            "shape": list(shape),
            "data_offsets": [start, start + tensor_bytes(dtype, shape)],
        }
    text = json.dumps(entries, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-(8 + len(text)) % max(align, PAGE if page_starts else 8))
    header = len(text).to_bytes(8, "little") + text
    infos = {name: TensorInfo(dtype, shape, len(header) + start) for name, (dtype, shape, start) in placed.items()}
    return Layout(header, infos, len(header) + end)


class LayoutWriter:
    """Writes a planned file front to back and hashes it on the way.

    ``write`` takes the tensors' bytes in layout order, in as many pieces as is convenient; fillers are written by
    themselves. ``facts`` are right once the writer is closed.
    """

    def __init__(self, path: Path, layout: Layout) -> None:
        self._file: BinaryIO = path.open("wb")
        self._hash = Hasher()
        self._rest = iter(layout.tensors.items())
        self._name = ""
        self._missing = 0
        self._put(layout.header)

    def write(self, name: str, data: bytes | bytearray | memoryview) -> None:
        """Append ``data`` to tensor ``name``.

        Raises:
            ValueError: the bytes are out of order or too many: a defect of the caller.
        """
        while not self._missing:
            self._name, info = next(self._rest, ("the end of the file", None))
            if info is None:
                break
            self._missing = info.nbytes
            if self._name.startswith(PAD_PREFIX):
                self._put(bytes(self._missing))
                self._missing = 0
        if name != self._name or len(data) > self._missing:
            raise ValueError(f"{len(data)} bytes of {name}, but {self._missing} bytes of {self._name} come next")
        self._put(data)
        self._missing -= len(data)

    @property
    def facts(self) -> FileFacts:
        return self._hash.facts()

    def _put(self, data: bytes | bytearray | memoryview) -> None:
        self._file.write(data)
        self._hash.update(data)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._file.close()
        unwritten = [name for name, _ in self._rest]
        if kind is None and (self._missing or unwritten):
            raise ValueError(f"{self._missing} bytes of {self._name} and {len(unwritten)} tensors were not written")


def read_header(path: Path) -> tuple[dict[str, TensorInfo], dict[str, str]]:
    """The tensors (without fillers) and the metadata of a safetensors file.

    Raises:
        SafetensorError: the file is truncated or not safetensors.
        OSError: it cannot be read.
    """
    header = parse_header(path)
    with safe_open(path, framework="numpy"):  # checks the offsets and the size
        pass
    return header


def parse_header(path: Path) -> tuple[dict[str, TensorInfo], dict[str, str]]:
    """:func:`read_header` of a file that may end early: its header must be there, its data need not.

    Raises:
        SafetensorError: there is no header.
        OSError: it cannot be read.
    """
    if problem := regular_file_problem(path):
        raise OSError(None, problem)
    nbytes = path.stat().st_size
    if nbytes < 8:  # the length field
        raise SafetensorError("shorter than a header")
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if length > min(nbytes - 8, MAX_HEADER):
            raise SafetensorError("its header is not whole")
        text = file.read(length)
    try:
        entries = json.loads(text)
        metadata = {name: str(value) for name, value in (entries.pop("__metadata__", None) or {}).items()}
        tensors = {
            name: TensorInfo(entry["dtype"], tuple(entry["shape"]), 8 + length + entry["data_offsets"][0])
            for name, entry in entries.items()
            if not name.startswith(PAD_PREFIX)
        }
    except (ValueError, KeyError, IndexError, TypeError, AttributeError, RecursionError) as error:
        raise SafetensorError(f"its header does not parse: {error}") from error
    return tensors, metadata
