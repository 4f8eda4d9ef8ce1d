"""Random damage in numbers, in a process whose memory is bounded: ``python fuzzers.py KIND COUNT SEED FOLDER``.

Prints one JSON object, outcome -> how often. What must not happen is called ``bad:`` and what it was.
"""

import json
import os
import resource
import shutil
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from i2l.engines.directory.manifest import MANIFEST, read_manifest
from i2l.errors import I2LError
from i2l.export.checkpoints.recognise import recognise
from i2l.look.inspection import inspect_path
from i2l.lora.reading import read_lora
from i2l.runtime.pictures.images import load_image
from i2l.runtime.pipeline import open_engines
from injectors import flip, seal

ADDRESS_SPACE = 6 << 30
"""onnxruntime and torch reserve some 3 GiB that they never touch."""
SEEN_BYTES = 300 << 20
"""By which the resident memory may grow over all cases."""
VALUES: list[Any] = [None, -1, 0, 1, 7, 2**31, 2**63, 10**30, 1.5, float("nan"), "", "x", "../x", "/etc/passwd", "F64"]
VALUES += [[], {}, [[]], [1, 2, 3], "\x1b[2J", "a" * 5000, True]
Generator = np.random.Generator


def pick(generator: Generator, items: list[Any]) -> Any:
    return items[int(generator.integers(len(items)))]


def mutated_tree(generator: Generator, tree: Any) -> None:
    """Change one place of a JSON value, anywhere in it."""
    while True:
        keys = list(tree) if isinstance(tree, dict) else list(range(len(tree)))
        key = pick(generator, keys)
        inside = tree[key]
        if isinstance(inside, dict | list) and inside and generator.random() < 0.9:
            tree = inside
            continue
        if isinstance(tree, dict) and generator.random() < 0.15:
            del tree[key]
        elif isinstance(inside, int) and generator.random() < 0.5:
            tree[key] = inside + int(generator.integers(-4096, 4097))
        else:
            tree[key] = pick(generator, VALUES)
        return


def mutated_bytes(generator: Generator, data: bytes) -> bytes:
    """Flip, cut, repeat or overwrite some of the bytes."""
    bad = bytearray(data)
    start = int(generator.integers(len(bad)))
    count = int(generator.integers(1, 64))
    kind = generator.integers(5)
    if kind == 0:
        for _ in range(count):
            bad[int(generator.integers(len(bad)))] ^= 1 << int(generator.integers(8))
    elif kind == 1:
        del bad[start:]
    elif kind == 2:
        del bad[start : start + count]
    elif kind == 3:
        bad[start:start] = generator.bytes(count)
    else:
        bad[start : start + count] = generator.bytes(count)
    return bytes(bad)


def lora_of(engines: Path) -> bytes:
    with open_engines(engines, threads=1) as pipeline:
        lora = pipeline.lora_from_images([Image.new("RGB", (64, 64), "red")])
    return b"".join(factor.tobytes() for pair in lora.factors.values() for factor in pair)


def judged(work: Callable[[], bytes], wanted: bytes) -> str:
    """``refused`` with a sentence, ``right``, or ``bad``."""
    try:
        return "right" if work() == wanted else "bad: another LoRA"
    except I2LError as error:
        return f"refused: {type(error).__name__}"
    except Exception as error:  # noqa: BLE001 - what is looked for
        return f"bad: {type(error).__name__}: {error}"[:200]


def fuzz_manifests(count: int, generator: Generator, folder: Path) -> Counter[str]:
    """Half are bytes changed at random, half a value changed and the manifest sealed again."""
    wanted, text = lora_of(folder), (folder / MANIFEST).read_bytes()
    outcomes: Counter[str] = Counter()
    for index in range(count):
        if index % 2:
            values = json.loads(text)
            mutated_tree(generator, values)
            if "format" not in values:
                values["format"] = 2
            seal(folder / MANIFEST, values)
        else:
            (folder / MANIFEST).write_bytes(mutated_bytes(generator, text))
        outcome = judged(lambda: lora_of(folder), wanted)
        outcomes[outcome] += 1
        if outcome.startswith("bad"):
            shutil.copy(folder / MANIFEST, f"/tmp/fuzz-bad-manifest-{index}.json")
    (folder / MANIFEST).write_bytes(text)
    return outcomes


def fuzz_flips(count: int, generator: Generator, folder: Path) -> Counter[str]:
    """One bit of one file, its time and size as they were; mended after each."""
    wanted, build = lora_of(folder), folder / read_manifest(folder).build
    files = sorted(path for path in build.rglob("*") if path.is_file())
    outcomes: Counter[str] = Counter()
    for _ in range(count):
        path = pick(generator, files)
        position, bit = int(generator.integers(path.stat().st_size)), int(generator.integers(8))
        flip(path, position, bit)
        kind = "graph" if path.parent.name == "graphs" else "pack" if path.suffix == ".safetensors" else "standalone"
        outcomes[f"{kind}, {judged(lambda: lora_of(folder), wanted)}"] += 1
        flip(path, position, bit)
    return outcomes


def fuzz_headers(count: int, generator: Generator, folder: Path) -> Counter[str]:
    """LoRA files and checkpoints whose header or data is changed, read by everything that reads them."""
    sources = sorted(folder.glob("*.safetensors"))
    outcomes: Counter[str] = Counter()
    target = folder / "case" / "x.safetensors"
    target.parent.mkdir()
    for index in range(count):
        data = pick(generator, [path.read_bytes() for path in sources])
        length = int.from_bytes(data[:8], "little")
        if index % 2:
            values = json.loads(data[8 : 8 + length])
            mutated_tree(generator, values)
            header = json.dumps(values).encode()
            target.write_bytes(len(header).to_bytes(8, "little") + header + data[8 + length :])
        else:
            target.write_bytes(mutated_bytes(generator, data[: 8 + length]) + data[8 + length :])
        for read in (read_lora, recognise, inspect_path):
            try:
                read(target)
                outcomes["read"] += 1
            except I2LError:
                outcomes["refused"] += 1
            except Exception as error:  # noqa: BLE001 - what is looked for
                outcomes[f"bad: {read.__name__}: {type(error).__name__}: {error}"[:200]] += 1
                shutil.copy(target, f"/tmp/fuzz-bad-header-{index}.safetensors")
    return outcomes


def fuzz_pictures(count: int, generator: Generator, folder: Path) -> Counter[str]:
    """Pictures of every format that Pillow writes here, changed."""
    y, x = np.mgrid[0:48, 0:64]
    image = Image.fromarray(np.stack([x * 4, y * 5, (x * y) % 256], -1).astype(np.uint8))
    kinds = ["JPEG", "PNG", "WEBP", "AVIF", "GIF", "BMP", "TIFF", "JPEG2000", "PPM"]
    sources = []
    for kind in kinds:
        for form in ("RGB", "RGBA", "L"):
            try:
                image.convert(form).save(folder / "source", kind)
            except (OSError, ValueError):
                continue  # the format has no such mode
            sources.append((folder / "source").read_bytes())
    outcomes: Counter[str] = Counter()
    for index in range(count):
        (folder / "x").write_bytes(mutated_bytes(generator, pick(generator, sources)))
        try:
            load_image(folder / "x")
            outcomes["read"] += 1
        except I2LError:
            outcomes["refused"] += 1
        except Exception as error:  # noqa: BLE001 - what is looked for
            outcomes[f"bad: {type(error).__name__}: {error}"[:200]] += 1
            shutil.copy(folder / "x", f"/tmp/fuzz-bad-picture-{index}")
    return outcomes


def resident_bytes() -> int:
    return int(Path("/proc/self/statm").read_text(encoding="ascii").split()[1]) * os.sysconf("SC_PAGE_SIZE")


def main() -> None:
    kind, count, seed, folder = sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), Path(sys.argv[4])
    fuzz = {
        "manifests": fuzz_manifests,
        "flips": fuzz_flips,
        "headers": fuzz_headers,
        "pictures": fuzz_pictures,
    }[kind]
    generator = np.random.default_rng(seed)
    resource.setrlimit(resource.RLIMIT_AS, (ADDRESS_SPACE, ADDRESS_SPACE))
    before = resident_bytes()
    outcomes = fuzz(count, generator, folder)
    if (grown := resident_bytes() - before) > SEEN_BYTES:
        outcomes[f"bad: {grown >> 20} MiB more resident"] = 1
    sys.stdout.write(json.dumps(dict(sorted(outcomes.items()))))


if __name__ == "__main__":
    main()
