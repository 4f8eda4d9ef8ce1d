"""How fast is a ring of host buffers filled from a pack? That may bound chunks on their way to a card, not the link.

The ring is the one that CUDA's chunks pass through, of as many and as large buffers, each filled by some threads at
once, in plain memory instead of pinned. Ways: ``memmove`` out of the mapped file, and ``preadv``. Warm: the file is in
the page cache; mapped: in this process's memory too, as after a first pass. Cold: it is in neither. Beside them
"memory": ``memmove`` between plain buffers, what the machine can do at all. Rounds are interleaved. GB/s of a buffer's
filling by the clock, the median and the fastest tenth, as other work only makes it slower; and per second of CPU.
Usage: python benchmarks/fill.py [--mib 2048] [--rounds 5] [--folder DIR]; for Linux; the file must fit the page cache.
"""

import argparse
import ctypes
import mmap
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np

from i2l.engines.device.pinned.host_cache import BUFFERS, PIECE_BYTES
from i2l.machine.platforms.mapping import MappedFile, give_back, open_mapped

if sys.platform != "linux":
    raise SystemExit("only Linux forgets a file's pages when it is asked to")

THREADS = (1, 2, 4)
Fill = Callable[[memoryview, int], None]
"""Fill a buffer from this offset of the file on."""


def main() -> None:
    """Measure in rounds; a line for each way."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--mib", type=int, default=2048, help="of the file")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--folder", type=Path, help="where the file is made; by default where temporary files are")
    options = parser.parse_args()
    nbytes = options.mib << 20
    ring = [memoryview(bytearray(PIECE_BYTES)) for _ in range(BUFFERS)]
    with tempfile.TemporaryDirectory(prefix="i2l-fill-", dir=options.folder) as folder:
        path = Path(folder, "pack")
        make_file(path, nbytes)
        found: dict[str, list[tuple[list[float], float]]] = {}
        for _ in range(options.rounds):
            for threads in THREADS:
                with ThreadPoolExecutor(threads) as pool:
                    for name, seconds in measured(path, nbytes, ring, pool, threads):
                        found.setdefault(f"{name}, {threads} threads", []).append(seconds)
    for name, rounds in sorted(found.items()):
        pieces = sorted(seconds for row, _ in rounds for seconds in row)
        rates = [PIECE_BYTES / seconds / 1e9 for seconds in (statistics.median(pieces), pieces[len(pieces) // 10])]
        by_cpu = nbytes / statistics.median(cpu for _, cpu in rounds) / 1e9
        print(f"{name:28} median {rates[0]:6.2f}  fastest tenth {rates[1]:6.2f}  CPU {by_cpu:6.2f}")
    print(f"{options.rounds} rounds of {options.mib} MiB, load {os.getloadavg()[0]:.1f}")


def make_file(path: Path, nbytes: int) -> None:
    """Random bytes, on the disk."""
    block = np.random.default_rng(0).integers(0, 256, PIECE_BYTES, np.uint8).tobytes()
    with path.open("wb") as file:
        for _ in range(0, nbytes, PIECE_BYTES):
            file.write(block)
        file.flush()
        os.fsync(file.fileno())


def measured(
    path: Path, nbytes: int, ring: list[memoryview], pool: ThreadPoolExecutor, threads: int
) -> Iterator[tuple[str, tuple[list[float], float]]]:
    """``(way, seconds)`` of each, see :func:`passed`."""
    with path.open("rb", buffering=0) as file:
        descriptor = file.fileno()

        def read(target: memoryview, offset: int) -> None:
            while target:
                count = os.preadv(descriptor, [target], offset)
                target, offset = target[count:], offset + count

        forget(descriptor)
        yield "preadv, cold", passed(read, nbytes, ring, pool, threads)
        yield "preadv, warm", passed(read, nbytes, ring, pool, threads)
        with open_mapped(path) as mapped:
            move = mover(mapped)
            yield "memmove, warm", passed(move, nbytes, ring, pool, threads)
            yield "memmove, mapped", passed(move, nbytes, ring, pool, threads)
            give_back(mapped, 0, nbytes)
            forget(descriptor)
            yield "memmove, cold", passed(move, nbytes, ring, pool, threads)
    with mmap.mmap(-1, 8 * PIECE_BYTES) as plain:
        plain[:] = bytes(len(plain))
        copy = mover(plain)
        yield "memory", passed(lambda target, offset: copy(target, offset % len(plain)), nbytes, ring, pool, threads)


def mover(source: mmap.mmap | MappedFile) -> Fill:
    """Copies out of memory."""
    start = int(np.frombuffer(source, np.uint8).ctypes.data)

    def move(target: memoryview, offset: int) -> None:
        ctypes.memmove(ctypes.addressof(ctypes.c_char.from_buffer(target)), start + offset, len(target))

    return move


def forget(descriptor: int) -> None:
    """Take a file out of the page cache; nobody may have it mapped."""
    os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)


def passed(
    fill: Fill, nbytes: int, ring: list[memoryview], pool: ThreadPoolExecutor, threads: int
) -> tuple[list[float], float]:
    """Seconds by the clock of each piece and of CPU of all, in which a file passes through the ring."""
    part = -(-PIECE_BYTES // threads)
    seconds, cpu = [], time.process_time()
    for number in range(nbytes // PIECE_BYTES):
        buffer, offset = ring[number % len(ring)], number * PIECE_BYTES
        start = time.perf_counter()
        list(pool.map(lambda at, b=buffer, o=offset: fill(b[at : at + part], o + at), range(0, PIECE_BYTES, part)))
        seconds.append(time.perf_counter() - start)
    return seconds, time.process_time() - cpu


if __name__ == "__main__":
    main()
