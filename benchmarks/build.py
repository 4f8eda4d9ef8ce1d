"""How long does a build take beside merely copying the same bytes?

The rival reads every checkpoint and writes as many bytes as the packs have, in 4 MiB pieces, one file after another:
what `cp` would do. Both start from a cold page cache where the machine lets us drop it, and are timed until they
return. Usage: python benchmarks/build.py --models DIR --engines DIR

It says what of the build was waiting for the disk (``fsync``) and hashing, and what an opening then spends on its
checks: all of it, and without the random regions of the packs.
"""

import argparse
import json
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

PIECE = 4 << 20
COUNTED = """
import atexit, json, os, sys, time
from i2l.engines.directory.hashing import Hasher
spent = {"sync_seconds": 0.0, "syncs": 0, "hashing_seconds": 0.0}
sync, update = os.fsync, Hasher.update
def counted_sync(descriptor):
    start = time.perf_counter()
    sync(descriptor)
    spent["sync_seconds"] += time.perf_counter() - start
    spent["syncs"] += 1
def counted_update(self, data):
    start = time.thread_time()
    update(self, data)
    spent["hashing_seconds"] += time.thread_time() - start
os.fsync, Hasher.update = counted_sync, counted_update
atexit.register(lambda: print(json.dumps(spent)))
from i2l.__main__ import main
main()
"""
"""The build's process, which counts the seconds of syncing by the clock, and of hashing by the CPU's time."""


def main() -> None:
    """Time copy and build in turn and print a table and one JSON line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--models", type=Path, required=True)
    parser.add_argument("--engines", type=Path, required=True, help="a scratch directory; is built anew")
    parser.add_argument("--precision", default="int8")
    arguments = parser.parse_args()
    build = [sys.executable, "-c", COUNTED, "build-engines", "--models", arguments.models, "--engines"]
    build += [arguments.engines, "--precision", arguments.precision, "--force"]

    cold = drop_page_cache()
    start = time.perf_counter()
    peak, spent = run(build)
    build_seconds = time.perf_counter() - start
    pack_bytes = sum(path.stat().st_size for path in arguments.engines.glob("build-*/*/weights.safetensors"))

    drop_page_cache()
    start = time.perf_counter()
    copied = copy_like(arguments.models, arguments.engines / "copy.tmp", pack_bytes)
    copy_seconds = time.perf_counter() - start

    facts = {
        "precision": arguments.precision,
        "page_cache": "cold" if cold else "as it was",
        "read_bytes": copied,
        "written_bytes": pack_bytes,
        "copy_seconds": round(copy_seconds, 1),
        "build_seconds": round(build_seconds, 1),
        "ratio": round(build_seconds / copy_seconds, 2),
        "build_peak_resident_bytes": peak,
        **spent,
        **opening_ms(arguments.engines),
    }
    for name, value in facts.items():
        print(f"{name:<28}{value}")
    print(json.dumps(facts))


def opening_ms(engines: Path) -> dict[str, float]:
    """Milliseconds of the manifest and of the checks at an opening, the median of 21; files in the page cache."""
    from i2l.engines.directory import integrity
    from i2l.engines.directory.manifest import read_manifest

    def median_ms(work: Callable[[], object]) -> float:
        times = []
        for _ in range(21):
            start = time.perf_counter()
            work()
            times.append(1000 * (time.perf_counter() - start))
        return round(sorted(times)[10], 2)

    manifest = read_manifest(engines)
    ms = {
        "manifest_ms": median_ms(lambda: read_manifest(engines)),
        "checks_ms": median_ms(lambda: integrity.check_files(engines, manifest)),
    }
    vars(integrity)["SAMPLES"] = 0
    return ms | {"checks_without_regions_ms": median_ms(lambda: integrity.check_files(engines, manifest))}


def drop_page_cache() -> bool:
    """Empty the page cache if this process may."""
    try:
        subprocess.run(["sync"], check=True)  # noqa: S607
        Path("/proc/sys/vm/drop_caches").write_text("3", encoding="ascii")
    except OSError:
        return False
    return True


def run(command: list[str | Path]) -> tuple[int, dict[str, float]]:
    """Run a command; its peak resident bytes, and what it counted."""
    if sys.platform == "win32":
        raise SystemExit("this asks POSIX for the child's memory")
    import resource

    said = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
    return resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * 1024, json.loads(said.splitlines()[-1])


def copy_like(models: Path, target: Path, write_bytes: int) -> int:
    """Read every checkpoint and write ``write_bytes`` bytes of what was read; return the bytes read."""
    done = written = 0
    with target.open("wb", buffering=0) as out:
        for path in sorted(models.rglob("*.safetensors")):
            with path.open("rb", buffering=0) as file:
                while piece := file.read(PIECE):
                    done += len(piece)
                    # Spread the writes over the reading, as a build does.
                    if written < write_bytes:
                        written += out.write(piece[: min(len(piece) // 2 + 1, write_bytes - written)])
        while written < write_bytes:
            written += out.write(bytes(min(PIECE, write_bytes - written)))
    target.unlink()
    return done


if __name__ == "__main__":
    main()
