"""Which chunks are kept in the host's memory, how much of the link that fills, and how pipelines share the memory."""

import logging
import threading
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import count, pairwise

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from i2l.engines.device.pinned import kept, staging
from i2l.engines.device.pinned.host_cache import (
    PAGE_BYTES,
    RING_BYTES,
    HostCache,
    link_share,
    pages,
    plan_host_cache,
    values_pinned,
)
from i2l.engines.device.pinned.kept import KeptChunks
from i2l.engines.device.predict import graph_memory
from i2l.engines.directory.manifest import Chunk
from i2l.errors import OutOfDeviceMemory
from i2l.export.packs.planning import planned_model
from i2l.machine.wording import GIB
from i2l.specs import FAMILIES, PRESETS, Family

MIB = 1 << 20
Chunks = dict[Family, tuple[Chunk, ...]]


def chunk_row(sizes: Sequence[int]) -> tuple[Chunk, ...]:
    return tuple(Chunk(index << 32, size, ()) for index, size in enumerate(sizes))


rows = st.fixed_dictionaries(
    {family: st.lists(st.tuples(st.integers(1, 900 * MIB), st.booleans()), max_size=12) for family in FAMILIES}
)
"""Of each model's chunks the size, and whether it stays on the card."""


@given(rows, st.none() | st.integers(0, 64 * GIB), st.integers(1, GIB), st.integers(0, GIB))
def test_no_more_than_half_is_pinned_and_nothing_that_fits_is_left_out(
    made: dict[Family, list[tuple[int, bool]]], available: int | None, ring_bytes: int, values_bytes: int
) -> None:
    chunks: Chunks = {family: chunk_row([size for size, _ in row]) for family, row in made.items()}
    resident = {family: [i for i, (_, stays) in enumerate(row) if stays] for family, row in made.items()}
    plan = plan_host_cache(chunks, resident, available, ring_bytes, values_bytes=values_bytes)
    assert plan == plan_host_cache(chunks, resident, available, ring_bytes, values_bytes=values_bytes)
    streamed = {(f, i): row[i].nbytes for f, row in chunks.items() for i in range(len(row)) if i not in resident[f]}
    assert plan.streamed_bytes == sum(streamed.values())
    assert (plan.ring_bytes, plan.values_bytes) == (ring_bytes, values_bytes)
    assert len(set(plan.kept)) == len(plan.kept)
    assert set(plan.kept) <= streamed.keys()
    assert plan.cache_bytes == sum(pages(streamed[place]) for place in plan.kept)
    assert plan.cache_bytes == 0 or 2 * (plan.cache_bytes + ring_bytes + values_bytes) <= (available or 0)
    assert 2 * plan.floor_bytes >= (available or 0)
    left = (available or 0) // 2 - ring_bytes - values_bytes - plan.cache_bytes
    assert all(pages(size) > left for place, size in streamed.items() if place not in plan.kept)


def test_the_first_of_every_model_then_an_even_spread() -> None:
    """Of equal chunks: no stretch without a kept one is longer than twice another."""
    chunks: Chunks = {family: chunk_row([PAGE_BYTES] * 20) for family in FAMILIES}
    resident: dict[Family, tuple[int, ...]] = {"siglip2": (0,), "dinov3": (0, 7), "adapter": ()}
    plan = plan_host_cache(chunks, resident, 2 * (15 * PAGE_BYTES + 100), 90, values_bytes=10)
    assert plan.kept[:3] == (("siglip2", 1), ("dinov3", 1), ("adapter", 0))
    order = [(family, i) for family in FAMILIES for i in range(20) if i not in resident[family]]
    others = [place for place in order if place not in plan.kept[:3]]
    at = [others.index(place) for place in sorted(plan.kept[3:], key=others.index)]
    gaps = [b - a for a, b in pairwise(at)]
    assert len(at) == 12
    assert 1 < max(gaps) <= 2 * min(gaps)


# --- the link ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("sizes", "kept_indices", "link", "fill", "seconds"),
    [
        ([64], [], 32, 16, 5),  # a piece is filled in 2, copied in 1: fill, fill, copy
        ([64], [0], 32, 16, 2),
        ([32, 32], [1], 32, 16, 4),  # fill, copy, copy
        ([32, 64, 32], [1], 32, 16, 6),  # 2 filled and copied by 3; kept 2 copied by 5; the last, filled by 4, by 6
        ([320], [], 16, 32, 21),  # the link is slower: but the first piece, always busy
        ([256, 64], [0], 16, 1e9, 20),
        (
            [640, 320],
            [0],
            32,
            16,
            34,
        ),  # kept 20; four are filled by then, the fifth from 21 on
        ([], [], 16, 16, 0),
    ],
)
def test_a_pass_by_hand(sizes: list[int], kept_indices: list[int], link: float, fill: float, seconds: float) -> None:
    """Sizes in MiB, rates in MiB a second."""
    chunks: Chunks = {"dinov3": chunk_row([size * MIB for size in sizes])}
    places = [("dinov3", i) for i in kept_indices]
    share = link_share(chunks, {"dinov3": ()}, places, link_gbps=link * MIB / 1e9, fill_gbps=fill * MIB / 1e9)  # type: ignore[arg-type]
    assert share == pytest.approx(sum(sizes) / link / seconds if sizes else 1, rel=1e-6)


@given(
    st.lists(st.tuples(st.integers(1, 300 * MIB), st.booleans()), min_size=1, max_size=20),
    st.floats(1, 60),
    st.floats(1, 60),
)
def test_the_share_is_between_its_bounds_and_grows_with_the_cache(
    made: list[tuple[int, bool]], link: float, fill: float
) -> None:
    chunks: Chunks = {"dinov3": chunk_row([size for size, _ in made])}
    places: list[tuple[Family, int]] = [("dinov3", i) for i, (_, stays) in enumerate(made) if stays]

    def share(kept_places: Sequence[tuple[Family, int]]) -> float:
        return link_share(chunks, {"dinov3": ()}, kept_places, link_gbps=link, fill_gbps=fill)

    found = share(places)
    passing = sum(size for size, stays in made if not stays) / sum(size for size, _ in made)
    assert 1 / (1 + link / fill) <= found * (1 + 1e-9)
    assert found <= min(1, fill / link / passing if passing else 1) * (1 + 1e-9)
    assert share([]) <= found * (1 + 1e-9)
    assert share([("dinov3", i) for i in range(len(made))]) == pytest.approx(1)


def test_full_size() -> None:
    """8.2 GiB are streamed at 2 GiB of VRAM: with 24 GiB available all of them are kept, with 8 not half."""
    models = {spec.family: planned_model(spec, "int8") for spec in PRESETS["full"]}
    chunks: Chunks = {family: model.chunks for family, model in models.items()}
    resident: dict[Family, tuple[int, ...]] = dict.fromkeys(chunks, ())
    values = values_pinned(models["adapter"], graph_memory(models, 4))

    def planned(gib: int) -> tuple[HostCache, float]:
        plan = plan_host_cache(chunks, resident, gib * GIB, values_bytes=values)
        return plan, link_share(chunks, resident, plan.kept, link_gbps=25, fill_gbps=10)

    (all_kept, best), (some, better), (none, least) = map(planned, (24, 8, 0))
    assert len(all_kept.kept) == sum(map(len, chunks.values()))
    assert 3.5 * GIB < some.cache_bytes <= 4 * GIB - RING_BYTES - values
    assert none.cache_bytes == 0
    assert best == pytest.approx(1)
    assert least == pytest.approx(0.4, rel=0.02)
    assert 160 * MIB < values < 200 * MIB  # 40 MB an image, and a block that is not full
    assert least / (1 - some.cache_bytes / some.streamed_bytes) == pytest.approx(better, rel=0.05)


# --- pinning -----------------------------------------------------------------------------------------------------


class Host:
    """The host's memory, and a driver that pins it."""

    name = "a card"

    def __init__(self, available: int, pinnable: int = 1 << 60) -> None:
        self.available, self.pinnable = available, pinnable
        self.pinned: dict[int, int] = {}
        self._addresses = count(1)

    def __call__(self, function: str, nbytes: int) -> int:
        assert function == "cuMemAllocHost"
        if sum(self.pinned.values()) + nbytes > self.pinnable:
            raise OutOfDeviceMemory(self.name, nbytes, 0)
        self.available -= nbytes
        self.pinned[address := next(self._addresses)] = nbytes
        return address

    def give_back(self, function: str, address: int) -> None:
        assert function == "cuMemFreeHost"
        self.available += self.pinned.pop(address)


@pytest.fixture
def host(monkeypatch: pytest.MonkeyPatch) -> Host:
    made = Host(1000)
    monkeypatch.setattr(kept, "available_bytes", lambda: made.available)
    return made


REGIONS = [(address, 100) for address in range(10)]


def comes(chunks: KeptChunks) -> None:
    """A pass over all chunks, in their order."""
    for address, _ in REGIONS:
        chunks.of(address)


def test_one_pass_pins_nothing_and_the_second_the_best_first(host: Host) -> None:
    chunks = KeptChunks(host)  # type: ignore[arg-type]
    chunks.keep(REGIONS[::-1], 0)
    comes(chunks)
    assert host.pinned == {}
    for address in (0, 1, 2):
        chunks.of(address)
    assert [address for address in range(10) if chunks._kept.get(address)] == [7, 8, 9]
    chunks.release()
    assert host.available == 1000


def test_two_that_open_at_once_share_the_half(host: Host, caplog: pytest.LogCaptureFixture) -> None:
    """Each planned half of the same memory; and a third program takes of it meanwhile."""
    pipelines = [KeptChunks(host), KeptChunks(host)]  # type: ignore[arg-type]
    for chunks in pipelines:
        chunks.keep(REGIONS[:5], 500)
    host.available -= 50
    with caplog.at_level(logging.INFO, "i2l"):
        for _ in range(4):
            for chunks in pipelines:
                comes(chunks)
    assert sum(host.pinned.values()) == 400
    assert host.available >= 500
    said = [record.message for record in caplog.records]
    assert len(said) == 4
    assert (
        said[0] == "a card: up to 500 B of the host's memory are pinned for chunks that come in every pass, half of "
        "what was available at most"
    )
    assert "of 5 chunks are kept in pinned host memory (550 B of the host's memory are left)" in caplog.text


def test_what_is_refused_is_said_once(host: Host, caplog: pytest.LogCaptureFixture) -> None:
    host.pinnable = 250
    chunks = KeptChunks(host)  # type: ignore[arg-type]
    chunks.keep(REGIONS, 0)
    with caplog.at_level(logging.WARNING, "i2l"):
        for _ in range(4):
            comes(chunks)
    (record,) = caplog.records
    assert record.message.startswith("a card: 2 of 10 chunks are kept in pinned host memory (the system does not let")
    assert host.available == 800


@pytest.mark.parametrize("threads", [1, 2, 3, 4])
@pytest.mark.parametrize("nbytes", [1, MIB, MIB + 1, 3 * MIB + 5])
def test_a_buffer_is_filled_whole_by_threads_that_come_late(
    host: Host, monkeypatch: pytest.MonkeyPatch, nbytes: int, threads: int
) -> None:
    monkeypatch.setattr(staging, "default_threads", lambda: threads)
    ring = staging.Staging(host)  # type: ignore[arg-type]
    ring._pool.shutdown()
    helpers: list[int] = []

    def begin() -> None:
        helpers.append(threading.get_ident())
        time.sleep(0.02)

    ring._pool = ThreadPoolExecutor(max(1, threads - 1), initializer=begin)
    source, target = np.random.default_rng(nbytes).integers(1, 256, nbytes, np.uint8), np.zeros(nbytes + 8, np.uint8)
    ring._fill(target.ctypes.data, source.ctypes.data, nbytes)
    assert np.array_equal(target, np.append(source, np.zeros(8, np.uint8)))
    assert bool(helpers) == (threads > 1 and nbytes > MIB)
    ring.close()
