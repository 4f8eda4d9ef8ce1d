"""One pipeline for long: nothing grows. Signals at random moments, and a disk that is full. More by ``make soak``."""

import json
import os
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from conftest import MakeEngines, picture
from i2l.lora.reading import read_lora
from injectors import i2l_process, names, no_traceback, run_python

LONG = os.environ.get("I2L_FAULTS") == "long"

SOAK = """
import json, os, sys, time
from pathlib import Path
import i2l
import numpy as np
from PIL import Image
engines, count, bad = sys.argv[1], int(sys.argv[2]), sys.argv[3]
def now():
    resident = int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    threads = []
    for _ in range(5):  # one that has ended is still seen for a moment
        threads.append(len(os.listdir("/proc/self/task")))
        time.sleep(0.002)
    return [resident, min(threads), len(os.listdir("/proc/self/fd"))]
pictures = [Image.fromarray(np.random.default_rng(i).integers(0, 255, (80, 60 + i, 3), np.uint8)) for i in range(7)]
first, seen = {}, []
with i2l.open_engines(engines, threads=2) as pipeline:
    for call in range(count):
        which = call % len(pictures)
        lora = pipeline.lora_from_images([pictures[which]])
        value = [a.tobytes() for a, b in lora.factors.values()]
        assert first.setdefault(which, value) == value, "another LoRA"
        if call % 5 == 0:
            for wrong in (bad, "/nowhere.jpg"):
                try:
                    pipeline.lora_from_images([wrong])
                except i2l.I2LError:
                    pass
        seen.append(now())
print(json.dumps(seen))
"""


def test_nothing_grows_over_many_calls(
    engines: MakeEngines, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Resident memory, threads and descriptors stay within 5 % from the tenth part of the calls on."""
    count = 500 if LONG else 24
    (tmp_path / "bad.png").write_bytes(b"\x89PNG\r\n\x1a\n half of it")
    done = run_python(SOAK, engines("tiny", "int8"), count, tmp_path / "bad.png", timeout=1500)
    assert done.returncode == 0, done.stderr
    seen = np.array(json.loads(done.stdout))[max(10, count // 10) :]
    low, high = seen.min(axis=0), seen.max(axis=0)
    if LONG:
        with capsys.disabled():
            sys.stdout.write(f"\n{count} calls: resident, threads, descriptors from {low} to {high}\n")
    assert (high <= low * 1.05).all(), (low, high)


@pytest.mark.parametrize("command", ["run", "batch"])
def test_signals_at_random_moments_leave_whole_files(
    engines: MakeEngines, tmp_path: Path, command: str, capsys: pytest.CaptureFixture[str]
) -> None:
    generator = np.random.default_rng(0)
    folder, out = tmp_path / "pictures", tmp_path / "out"
    folder.mkdir()
    out.mkdir()
    for seed in range(4):
        picture(60, 50, seed).save(folder / f"{seed}.png")
    common = ["--engines", engines("tiny", "int8"), "--no-cache"]
    arguments = {
        "run": ["run", folder / "0.png", *common, "--output", out / "x.safetensors"],
        "batch": ["batch", folder, *common, "--output-dir", out],
    }[command]
    # The interpreter's own start, before any of our files, is not ours to quiet: so it says when ours begins.
    code = "from i2l import __main__; print(flush=True); __main__.main()"
    endings: Counter[str] = Counter()
    for _ in range(45 if LONG else 3):
        number = generator.choice([signal.SIGTERM, signal.SIGKILL, signal.SIGINT, signal.SIGHUP])
        running = subprocess.Popen(
            [sys.executable, "-c", code, *map(str, arguments)],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        assert running.stdout is not None
        running.stdout.readline()
        time.sleep(generator.uniform(0.02, 1.4))
        running.send_signal(signal.Signals(number))
        start = time.monotonic()
        _, stderr = running.communicate(timeout=60)
        assert time.monotonic() - start < 20
        assert no_traceback(stderr), stderr
        endings[f"{signal.Signals(number).name} {running.returncode}"] += 1
        for path in out.glob("*.safetensors"):
            assert read_lora(path).lora.rank == 4
    done = i2l_process(*arguments)
    assert done.returncode == 0, done.stderr
    assert len(names(out)) == (1 if command == "run" else 4)
    if LONG:
        with capsys.disabled():
            sys.stdout.write(f"\n{command}, signals: {json.dumps(dict(sorted(endings.items())))}\n")


@pytest.fixture
def small_disk(tmp_path: Path) -> object:
    """A disk of 1 MiB; making one takes root."""
    place = tmp_path / "disk"
    place.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=1m", "none", str(place)]
    if os.geteuid() or subprocess.run(mount, check=False, capture_output=True).returncode:
        pytest.skip("no small disk can be mounted here: that takes root")
    yield place
    subprocess.run(["umount", str(place)], check=True)


def test_a_full_disk_keeps_what_was_there(engines: MakeEngines, photo: Path, small_disk: Path) -> None:
    run = ("run", photo, "--engines", engines("tiny", "int8"), "--output", small_disk / "x.safetensors", "--no-cache")
    assert i2l_process(*run).returncode == 0
    before = (small_disk / "x.safetensors").read_bytes()
    filler = small_disk / "filler"
    for _ in range(8 if LONG else 1):
        with filler.open("wb", buffering=0) as file:
            try:
                while True:
                    file.write(bytes(4096))
            except OSError:
                pass
        done = i2l_process(*run)
        assert done.returncode == 1
        assert "no room on the disk" in done.stderr
        assert names(small_disk) == ["filler", "x.safetensors"]
        assert (small_disk / "x.safetensors").read_bytes() == before
        filler.unlink()
