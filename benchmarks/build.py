"""How long does a build take beside merely copying the same bytes?

The rival reads every checkpoint and writes as many bytes as the packs have, in 4 MiB pieces, one file after another:
what `cp` would do. Both start from a cold page cache where the machine lets us drop it, and are timed until they
return. Usage: python benchmarks/build.py --models DIR --engines DIR
"""

import argparse
import json
import subprocess
import sys
import time
from pathlib import Path

PIECE = 4 << 20


def main() -> None:
    """Time copy and build in turn and print a table and one JSON line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--models", type=Path, required=True)
    parser.add_argument("--engines", type=Path, required=True, help="a scratch directory; is built anew")
    parser.add_argument("--precision", default="int8")
    arguments = parser.parse_args()
    build = [sys.executable, "-m", "i2l.cli", "build-engines", "--models", arguments.models, "--engines"]
    build += [arguments.engines, "--precision", arguments.precision, "--force"]

    cold = drop_page_cache()
    start = time.perf_counter()
    peak = peak_of(build)
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
    }
    for name, value in facts.items():
        print(f"{name:<28}{value}")
    print(json.dumps(facts))


def drop_page_cache() -> bool:
    """Empty the page cache if this process may."""
    try:
        subprocess.run(["sync"], check=True)  # noqa: S607
        Path("/proc/sys/vm/drop_caches").write_text("3", encoding="ascii")
    except OSError:
        return False
    return True


def peak_of(command: list[str | Path]) -> int:
    """Run a command and return its peak resident bytes."""
    if sys.platform == "win32":
        raise SystemExit("this asks POSIX for the child's memory")
    import resource

    subprocess.run(command, check=True)
    return resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * 1024


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
