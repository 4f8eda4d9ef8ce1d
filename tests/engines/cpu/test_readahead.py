"""What is read ahead, in which pieces, and what the process keeps of it."""

import mmap
import os
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import Event

import pytest
from hypothesis import given
from hypothesis import strategies as st

from i2l.engines.cpu import readahead
from i2l.engines.cpu.backend import AHEAD_BYTES, bytes_ahead
from i2l.engines.cpu.readahead import PIECE_BYTES, ReadAhead
from i2l.machine.memory import available_bytes
from i2l.machine.platforms.mapping import is_cached, open_mapped, populate

PIECES = 5
Region = tuple[int, int]
linux = pytest.mark.skipif(sys.platform != "linux", reason="other systems get advice, not a thread")


class Reads:
    """A reader of a file of five pieces, whose touches are written down instead of made."""

    def __init__(self, path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        path.write_bytes(bytes(PIECES * PIECE_BYTES))
        self.populated: list[Region] = []
        self.given_back: list[Region] = []
        self.cached: set[int] = set()
        self.go_on = Event()
        self.go_on.set()
        self.began = Event()
        self.thread = ThreadPoolExecutor(1)
        self.map = open_mapped(path)
        self.reader = ReadAhead(path, self.map, self.thread)
        monkeypatch.setattr(readahead, "populate", self.populate)
        monkeypatch.setattr(readahead, "give_back", lambda _, offset, nbytes: self.given_back.append((offset, nbytes)))
        monkeypatch.setattr(readahead, "is_cached", lambda _, offset: offset // PIECE_BYTES in self.cached)

    def populate(self, _: mmap.mmap, offset: int, nbytes: int) -> None:
        self.began.set()
        assert self.go_on.wait(10)
        self.populated.append((offset, nbytes))


@pytest.fixture
def reads(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Reads]:
    made = Reads(tmp_path / "pack", monkeypatch)
    yield made
    made.go_on.set()
    made.reader.close()
    made.thread.shutdown()
    made.map.close()


@linux
def test_a_region_comes_piece_by_piece_and_leaves_the_process(reads: Reads) -> None:
    start, nbytes = PIECE_BYTES // 2, 3 * PIECE_BYTES
    reads.reader.begin(start, nbytes)
    reads.reader.wait(start)
    half = PIECE_BYTES // 2
    whole = [(half, half), (PIECE_BYTES, PIECE_BYTES), (2 * PIECE_BYTES, PIECE_BYTES), (3 * PIECE_BYTES, half)]
    assert reads.populated == reads.given_back == whole


@linux
def test_cached_pieces_are_not_touched(reads: Reads) -> None:
    reads.cached = {0, 2, 4}
    reads.reader.begin(0, PIECES * PIECE_BYTES)
    reads.reader.wait(0)
    assert [offset // PIECE_BYTES for offset, _ in reads.populated] == [1, 3]


@linux
def test_a_region_is_asked_for_once(reads: Reads) -> None:
    reads.go_on.clear()
    for _ in range(3):
        reads.reader.begin(0, PIECE_BYTES)
    reads.go_on.set()
    reads.reader.wait(0)
    reads.reader.wait(0)  # nothing to wait for
    assert len(reads.populated) == 1


@linux
def test_what_is_not_needed_is_not_read(reads: Reads) -> None:
    reads.go_on.clear()
    for piece in range(3):
        reads.reader.begin(piece * PIECE_BYTES, PIECE_BYTES)
    assert reads.began.wait(10)
    reads.reader.forget(PIECE_BYTES)
    reads.go_on.set()
    reads.reader.wait(2 * PIECE_BYTES)
    assert [offset // PIECE_BYTES for offset, _ in reads.populated] == [0, 2]


@linux
def test_closing_waits_for_one_piece_and_no_more(reads: Reads) -> None:
    reads.go_on.clear()
    reads.reader.begin(0, 4 * PIECE_BYTES)
    reads.reader.begin(4 * PIECE_BYTES, PIECE_BYTES)
    assert reads.began.wait(10)
    with ThreadPoolExecutor(1) as other:
        closing = other.submit(reads.reader.close)
        while not reads.reader._closing:  # else the piece could be read, and the next, before anybody closes
            assert not closing.done()
            time.sleep(0.001)
        assert not closing.done()
        reads.go_on.set()
        closing.result(10)
    assert len(reads.populated) < PIECES


@linux
def test_cached_or_not_is_asked_of_the_system(tmp_path: Path) -> None:
    """A file just written is cached; once its pages are dropped it is not, if the file system can say so."""
    path = tmp_path / "pack"
    with path.open("wb") as file:
        file.write(bytes(PIECE_BYTES))
        os.fsync(file.fileno())
    mapped = open_mapped(path)
    with ThreadPoolExecutor(1) as thread:
        reader = ReadAhead(path, mapped, thread)
        if not is_cached(reader._file, 0):
            pytest.skip("this file system does not tell")
        with path.open("rb") as file:
            if sys.platform != "linux":
                pytest.skip("Linux alone has this call")
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        dropped = not is_cached(reader._file, PIECE_BYTES - 1)
        reader.begin(0, PIECE_BYTES)
        reader.wait(0)
        assert is_cached(reader._file, PIECE_BYTES - 1)
        reader.close()
    mapped.close()
    if not dropped:
        pytest.skip("this file system keeps its pages")


@linux
def test_a_kernel_without_huge_pages(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("i2l.machine.platforms.mapping.HUGEPAGE", 12345)  # EINVAL, as where they are not built in
    path = tmp_path / "pack"
    path.write_bytes(b"abc")
    mapped = open_mapped(path)
    populate(mapped, 0, 3)
    assert mapped[:] == b"abc"
    mapped.close()


@given(st.none() | st.integers(0, 1 << 40))
def test_how_far_ahead(available: int | None) -> None:
    least, most = AHEAD_BYTES
    ahead = bytes_ahead(available)
    assert least <= ahead <= most
    if available is not None and least <= available // 4 <= most:
        assert ahead == available // 4


@linux
def test_available_memory() -> None:
    found = available_bytes()
    assert found is not None
    assert 1 << 20 < found < 1 << 46
