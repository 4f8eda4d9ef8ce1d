"""Runs a Python script as if the CPU were an older one: libraries see fewer instructions, and run at full speed.

Libraries choose their kernels by the instruction `cpuid`, which few systems let a process intercept. So the libraries
of this Python are searched for it, and while they are loaded each is replaced by an illegal instruction whose signal
handler answers with fewer features (as_cpu.c). The hard thing is to find it: its two bytes also occur inside other
instructions, some hundred times in a large library. The code before each place is disassembled from several starts; x86
code decoded from a wrong start soon falls into step, so most starts agree on whether an instruction begins there.

What the mask cannot change is the CPU behind it: caches, clocks, how wide its adders are. Say so with each number:
"Zen 4 with AVX-512 masked".
Usage: python benchmarks/as_cpu.py avx2|avx512|avx512-vnni|avx512-bf16 SCRIPT [ARGUMENT ...]. Wants gcc, objdump, glibc.
"""

import os
import re
import struct
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

CPUID = b"\x0f\xa2"
BEFORE, STARTS = 48, 16
"""Bytes of code that are disassembled before a place, and from how many successive starts."""
PADDING = b"\x90" * 16
EXECUTABLE = 4
"""SHF_EXECINSTR: a section's flag."""


def bits(*numbers: int) -> int:
    """A word with these bits."""
    return sum(1 << number for number in numbers)


Clears = dict[tuple[int, str], int]
"""``(subleaf, register) -> bits`` of cpuid's leaf 7 that are reported as 0."""
AMX: Clears = {(0, "d"): bits(22, 24, 25), (1, "a"): bits(21), (1, "d"): bits(8)}
NEWER: Clears = {(0, "d"): bits(23), (1, "a"): bits(23), (1, "d"): bits(4, 5, 10, 19)}
"""AVX512-FP16, AVX-IFMA, AVX-VNNI-INT8, AVX-NE-CONVERT, AVX-VNNI-INT16, AVX10."""
BF16: Clears = {(1, "a"): bits(5)}
VNNI: Clears = {(0, "c"): bits(11), (1, "a"): bits(4)}
"""AVX512-VNNI and AVX-VNNI."""
ICE_LAKE: Clears = {(0, "b"): bits(21), (0, "c"): bits(1, 6, 12, 14), (0, "d"): bits(8)}
"""IFMA, VBMI, VBMI2, BITALG, VPOPCNTDQ, VP2INTERSECT."""
AVX512: Clears = {(0, "b"): bits(16, 17, 26, 27, 28, 30, 31), (0, "d"): bits(2, 3)}
CPUS: dict[str, tuple[Clears, ...]] = {
    "avx512-bf16": (AMX, NEWER),
    "avx512-vnni": (AMX, NEWER, BF16),
    "avx512": (AMX, NEWER, BF16, VNNI, ICE_LAKE),
    "avx2": (AMX, NEWER, BF16, VNNI, ICE_LAKE, AVX512),
}
"""For example Zen 4; Ice Lake; Skylake-X; Zen 3 and Haswell."""


def main() -> None:
    """Prepare the environment and become the script."""
    if len(sys.argv) < 3 or sys.argv[1] not in CPUS:
        raise SystemExit(__doc__)
    os.execve(sys.executable, [sys.executable, *sys.argv[2:]], os.environ | environment(sys.argv[1]))  # noqa: S606


def environment(cpu: str) -> dict[str, str]:
    """The variables under which this Python, and what it starts, sees such a CPU."""
    folder = Path(tempfile.mkdtemp(prefix="i2l-as-cpu-"))
    library, places = folder / "as_cpu.so", folder / "places"
    source = Path(__file__).with_suffix(".c")
    subprocess.run(["gcc", "-O1", "-shared", "-fPIC", "-o", library, source], check=True)  # noqa: S607
    libraries = sorted({path.resolve() for path in Path(sys.prefix).rglob("*.so*") if path.is_file()})
    lines = [f"{address:x} {path}\n" for path in libraries for address in cpuid_addresses(path)]
    places.write_text("".join(lines), encoding="utf-8")
    clears: Clears = {}
    for more in CPUS[cpu]:
        clears |= {register: clears.get(register, 0) | word for register, word in more.items()}
    words = [f"{clears.get((subleaf, register), 0):x}" for subleaf in (0, 1) for register in "abcd"]
    return {"LD_AUDIT": str(library), "AS_CPU_PLACES": str(places), "AS_CPU_CLEARS": ",".join(words)}


def cpuid_addresses(path: Path) -> list[int]:
    """Where a library has the instruction, as addresses of its own."""
    code = path.read_bytes()
    candidates: list[tuple[int, bytes]] = []
    for address, offset, size in executable_sections(code):
        place = code.find(CPUID, offset, offset + size)
        while place >= 0:
            if place - offset >= BEFORE + STARTS:
                candidates.append((address + place - offset, code[place - BEFORE - STARTS : place + 2]))
            place = code.find(CPUID, place + 1, offset + size)
    windows = [window[start:] for _, window in candidates for start in range(STARTS)]
    with tempfile.NamedTemporaryFile() as file:
        ends, end = [], 0
        for window in windows:
            file.write(window + PADDING)
            ends.append(end + len(window) - len(CPUID))
            end += len(window) + len(PADDING)
        file.flush()
        command = ["objdump", "-D", "-b", "binary", "-m", "i386:x86-64", file.name]
        text = subprocess.run(command, capture_output=True, text=True, check=True).stdout if windows else ""
    found = {int(address, 16) for address in re.findall(r"^ *([0-9a-f]+):\t0f a2 +\tcpuid", text, re.MULTILINE)}
    votes = [sum(place in found for place in ends[i : i + STARTS]) for i in range(0, len(ends), STARTS)]
    return [address for (address, _), agree in zip(candidates, votes, strict=True) if agree > STARTS // 2]


def executable_sections(code: bytes) -> Iterator[tuple[int, int, int]]:
    """``(address, offset, bytes)`` of the sections of a 64-bit ELF file that hold code."""
    if code[:5] != b"\x7fELF\x02":
        return
    (table,) = struct.unpack_from("<Q", code, 40)
    size, count = struct.unpack_from("<HH", code, 58)
    for index in range(count):
        _, _, flags, address, offset, nbytes = struct.unpack_from("<IIQQQQ", code, table + index * size)
        if flags & EXECUTABLE:
            yield address, offset, nbytes


if __name__ == "__main__":
    main()
