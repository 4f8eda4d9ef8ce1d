"""safetensors files: planned layouts, streamed writing, and reading headers, against the safetensors library."""

import hashlib
import math
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors
import safetensors.numpy
import safetensors.torch
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from safetensors import SafetensorError

from i2l.engines.directory.tensorfile import (
    DTYPE_BYTES,
    PAD_PREFIX,
    PAGE,
    Layout,
    LayoutWriter,
    plan_layout,
    read_header,
)

Entry = tuple[str, str, tuple[int, ...]]
Pieces = list[tuple[str, bytes]]

texts = st.text(min_size=1, max_size=12)
names = texts.filter(lambda name: not name.startswith(PAD_PREFIX) and name != "__metadata__")
shapes = st.lists(st.integers(1, 9), max_size=4).map(tuple)
entries = st.lists(
    st.tuples(names, st.sampled_from(sorted(DTYPE_BYTES)), shapes), max_size=12, unique_by=lambda entry: entry[0]
)
aligns = st.integers(0, 13).map(lambda power: 1 << power)  # up to two pages
metadata = st.dictionaries(texts, st.text(max_size=12), max_size=3)
on_disk = settings(max_examples=50, deadline=None)


@st.composite
def layouts(draw: st.DrawFn, at_least: int = 0) -> tuple[Layout, list[Entry], int, frozenset[str]]:
    """``(layout, entries, align, page_starts)``."""
    tensors: list[Entry] = draw(entries.filter(lambda found: len(found) >= at_least))
    starts = frozenset(draw(st.sets(st.sampled_from([name for name, _, _ in tensors])))) if tensors else frozenset()
    align = draw(aligns)
    return plan_layout(tensors, draw(metadata), align=align, page_starts=starts), tensors, align, starts


def contents(tensors: Iterable[Entry]) -> Pieces:
    """Bytes of every tensor, seeded by its name; booleans hold zeros and ones."""
    made = []
    for name, dtype, shape in tensors:
        generator = np.random.default_rng([*name.encode()])
        values = generator.integers(0, 2 if dtype == "BOOL" else 256, math.prod(shape) * DTYPE_BYTES[dtype], np.uint8)
        made.append((name, values.tobytes()))
    return made


def write(path: Path, layout: Layout, pieces: Pieces) -> LayoutWriter:
    with LayoutWriter(path, layout) as writer:
        for name, piece in pieces:
            writer.write(name, piece)
    return writer


def as_bytes(tensor: torch.Tensor) -> bytes:
    flat: NDArray[np.uint8] = tensor.reshape(-1).view(torch.uint8).numpy()
    return flat.tobytes()


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One file that every example writes anew."""
    return tmp_path_factory.mktemp("tensorfile") / "file.safetensors"


# --- layouts ----------------------------------------------------------------------------------------------------


@given(layouts())
@settings(deadline=None)
def test_every_tensor_is_aligned(planned: tuple[Layout, list[Entry], int, frozenset[str]]) -> None:
    layout, tensors, align, _ = planned
    assert [layout.tensors[name].offset % align for name, _, _ in tensors] == [0] * len(tensors)


def test_alignment_beyond_a_page() -> None:
    layout = plan_layout([("a", "U8", (3,)), ("b", "U8", (2,))], align=2 * PAGE, page_starts=frozenset("b"))
    assert [layout.tensors[name].offset % (2 * PAGE) for name in "ab"] == [0, 0]


@given(layouts())
@settings(deadline=None)
def test_page_starts_are_on_pages(planned: tuple[Layout, list[Entry], int, frozenset[str]]) -> None:
    layout, _, _, starts = planned
    assert [layout.tensors[name].offset % PAGE for name in starts] == [0] * len(starts)


@given(layouts())
@settings(deadline=None)
def test_tensors_and_fillers_follow_each_other_without_hole_or_overlap(
    planned: tuple[Layout, list[Entry], int, frozenset[str]],
) -> None:
    layout, _, _, _ = planned
    end = len(layout.header)
    for info in layout.tensors.values():
        assert info.offset == end
        end += info.nbytes
    assert end == layout.nbytes


@given(layouts())
@settings(deadline=None)
def test_the_given_order_dtypes_and_shapes_are_kept(
    planned: tuple[Layout, list[Entry], int, frozenset[str]],
) -> None:
    layout, tensors, _, _ = planned
    placed = [(name, info.dtype, info.shape) for name, info in layout.tensors.items()]
    assert [entry for entry in placed if not entry[0].startswith(PAD_PREFIX)] == tensors


@given(layouts())
@settings(deadline=None)
def test_a_filler_stands_only_before_a_tensor_and_is_shorter_than_a_step(
    planned: tuple[Layout, list[Entry], int, frozenset[str]],
) -> None:
    layout, _, align, starts = planned
    placed = list(layout.tensors)
    for index, name in enumerate(placed):
        if name.startswith(PAD_PREFIX):
            following = placed[index + 1]  # IndexError: a filler was last
            assert not following.startswith(PAD_PREFIX)
            assert layout.tensors[name].nbytes < (max(align, PAGE) if following in starts else align)


# --- writing and reading ----------------------------------------------------------------------------------------


@given(layouts())
@on_disk
def test_the_library_reads_what_was_written(
    path: Path, planned: tuple[Layout, list[Entry], int, frozenset[str]]
) -> None:
    layout, tensors, _, _ = planned
    data = contents(tensors)
    write(path, layout, data)
    found = safetensors.torch.load_file(path)
    kept = {name: tensor for name, tensor in found.items() if not name.startswith(PAD_PREFIX)}
    assert {name: tuple(tensor.shape) for name, tensor in kept.items()} == {name: shape for name, _, shape in tensors}
    assert {name: as_bytes(tensor) for name, tensor in kept.items()} == dict(data)


def test_the_library_reads_numpy_values(path: Path) -> None:
    arrays: dict[str, NDArray[Any]] = {
        "a": np.arange(6, dtype=np.float32).reshape(2, 3),
        "b": np.arange(-3, 4, dtype=np.int8),
    }
    layout = plan_layout([("a", "F32", (2, 3)), ("b", "I8", (7,))], align=64)
    write(path, layout, [(name, array.tobytes()) for name, array in arrays.items()])
    found = safetensors.numpy.load_file(path)
    for name, array in arrays.items():
        np.testing.assert_array_equal(found[name], array, strict=True)


@given(layouts())
@on_disk
def test_fillers_are_zeros(path: Path, planned: tuple[Layout, list[Entry], int, frozenset[str]]) -> None:
    layout, tensors, _, _ = planned
    write(path, layout, contents(tensors))
    data = path.read_bytes()
    for name, info in layout.tensors.items():
        if name.startswith(PAD_PREFIX):
            assert not any(data[info.offset : info.offset + info.nbytes])


@given(entries, metadata)
@on_disk
def test_the_library_reads_the_metadata(path: Path, tensors: list[Entry], marks: dict[str, str]) -> None:
    write(path, plan_layout(tensors, marks), contents(tensors))
    with safetensors.safe_open(path, framework="numpy") as file:
        assert (file.metadata() or {}) == marks


@given(layouts())
@on_disk
def test_read_header_gives_the_layout_without_fillers(
    path: Path, planned: tuple[Layout, list[Entry], int, frozenset[str]]
) -> None:
    layout, tensors, _, _ = planned
    write(path, layout, contents(tensors))
    found, _ = read_header(path)
    assert found == {name: layout.tensors[name] for name, _, _ in tensors}


@given(
    st.dictionaries(names, st.tuples(st.sampled_from(["F32", "I64", "U8"]), shapes), min_size=1, max_size=8), metadata
)
@on_disk
def test_read_header_of_a_file_by_the_library(
    path: Path, tensors: dict[str, tuple[str, tuple[int, ...]]], marks: dict[str, str]
) -> None:
    kinds = {"F32": np.float32, "I64": np.int64, "U8": np.uint8}
    arrays: dict[str, NDArray[Any]] = {
        name: np.arange(math.prod(shape)).reshape(shape).astype(kinds[dtype])
        for name, (dtype, shape) in tensors.items()
    }
    safetensors.numpy.save_file(arrays, path, marks)
    found, found_marks = read_header(path)
    assert ({name: (info.dtype, info.shape) for name, info in found.items()}, found_marks) == (tensors, marks)
    data = path.read_bytes()
    for name, info in found.items():
        assert data[info.offset : info.offset + info.nbytes] == arrays[name].tobytes()


@given(layouts(at_least=1), st.data())
@on_disk
def test_pieces_of_any_length_make_the_same_file(
    path: Path, planned: tuple[Layout, list[Entry], int, frozenset[str]], draw: st.DataObject
) -> None:
    layout, tensors, _, _ = planned
    data = contents(tensors)
    write(path, layout, data)
    whole = path.read_bytes()
    with LayoutWriter(path, layout) as writer:
        for name, content in data:
            cut = draw.draw(st.integers(1, len(content)))
            for piece in (content[:cut], memoryview(content)[cut:]):
                if piece:
                    writer.write(name, piece)
    assert path.read_bytes() == whole


@given(layouts())
@on_disk
def test_sha256_is_that_of_the_file(path: Path, planned: tuple[Layout, list[Entry], int, frozenset[str]]) -> None:
    layout, tensors, _, _ = planned
    writer = write(path, layout, contents(tensors))
    assert writer.facts.sha256 == hashlib.sha256(path.read_bytes()).hexdigest()


# --- misuse and damage ------------------------------------------------------------------------------------------

TWO = plan_layout([("a", "U8", (3,)), ("b", "U8", (2,))], align=256)


def test_a_tensor_out_of_order_is_refused(path: Path) -> None:
    with pytest.raises(ValueError, match="2 bytes of b, but 3 bytes of a come next"):
        write(path, TWO, [("b", b"12")])


def test_a_tensor_begun_before_the_last_is_whole_is_refused(path: Path) -> None:
    with pytest.raises(ValueError, match="2 bytes of b, but 1 bytes of a come next"):
        write(path, TWO, [("a", b"12"), ("b", b"12")])


def test_too_many_bytes_are_refused(path: Path) -> None:
    with pytest.raises(ValueError, match="4 bytes of a, but 3 bytes of a come next"):
        write(path, TWO, [("a", b"1234")])


def test_bytes_after_the_last_tensor_are_refused(path: Path) -> None:
    with pytest.raises(ValueError, match="the end of the file"):
        write(path, TWO, [("a", b"123"), ("b", b"12"), ("b", b"1")])


@pytest.mark.parametrize(
    ("written", "message"),
    [
        ([], "3 tensors were not written"),  # a, the filler, b
        ([("a", b"12")], "1 bytes of a and 2 tensors were not written"),
        ([("a", b"123")], "2 tensors were not written"),
        ([("a", b"123"), ("b", b"1")], "1 bytes of b and 0 tensors were not written"),
    ],
)
def test_an_incomplete_file_is_refused(path: Path, written: Pieces, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        write(path, TWO, written)


def test_an_error_in_the_body_is_not_hidden_by_the_incomplete_file(path: Path) -> None:
    writer = LayoutWriter(path, TWO)
    with pytest.raises(KeyError), writer:
        raise KeyError


@given(layouts(at_least=1), st.data())
@on_disk
def test_a_truncated_file_is_refused(
    path: Path, planned: tuple[Layout, list[Entry], int, frozenset[str]], draw: st.DataObject
) -> None:
    layout, tensors, _, _ = planned
    write(path, layout, contents(tensors))
    whole = path.read_bytes()
    # Short cuts fall into the header, long ones into the data: try both, and the last byte.
    for cut in (
        draw.draw(st.integers(0, len(layout.header))),
        draw.draw(st.integers(len(layout.header), layout.nbytes - 1)),
        layout.nbytes - 1,
    ):
        path.write_bytes(whole[:cut])
        with pytest.raises(SafetensorError):
            read_header(path)


@pytest.mark.parametrize("content", [b"", b"\x08", b"<!DOCTYPE html>" * 40, bytes(64), b"\xff" * 64])
def test_other_files_are_refused(path: Path, content: bytes) -> None:
    path.write_bytes(content)
    with pytest.raises(SafetensorError):
        read_header(path)
