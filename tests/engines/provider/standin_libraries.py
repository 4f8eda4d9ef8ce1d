"""CUDA's libraries as onnxruntime's provider loads them, compiled from cudart.c over the stand-in for the driver.

What the provider imports is read from the provider itself: whatever cudart.c does not have becomes a function that says
so and fails. Only the names of the versions must be right, and the linker takes those from the same list.
"""

import re
import subprocess
from collections import defaultdict
from pathlib import Path

HERE = Path(__file__).parent
IMPORTED = re.compile(r"\*UND\*\s+\S+\s+\(?(lib\w+\.so\.\d+)\)?\s+(\w+)$", re.MULTILINE)
DEFINED = re.compile(r"^[\w *]*?\b\*?\*?(_*cu\w+)\([^;{]*\{", re.MULTILINE)
NEEDED = re.compile(r"NEEDED\s+(libcu\w+\.so\.\d+)")
WARNINGS = ("-Wall", "-Wextra", "-Werror")


def compile_libraries(packages: Path, headers: Path, folder: Path) -> None:
    """Fill a folder for ``LD_LIBRARY_PATH``.

    Args:
        packages: site-packages with onnxruntime-gpu.
        headers: the folder with driver_types.h.
        folder: exists.
    """
    provider = packages / "onnxruntime" / "capi" / "libonnxruntime_providers_cuda.so"
    imports = defaultdict(list)
    for library, name in IMPORTED.findall(_said("objdump", "-T", str(provider))):
        imports[library].append(name)
    source = HERE / "cudart.c"
    ours = set(DEFINED.findall(source.read_text()))
    _shared(folder, "libcuda.so.1", str(HERE.parent / "standin" / "driver.c"), *WARNINGS, "-lpthread")
    for library in sorted(set(NEEDED.findall(_said("objdump", "-p", str(provider)))) - {"libcuda.so.1"}):
        names = imports[library]
        lacking = "\n".join(
            f'int {name}(void) {{ standin_problem("{name} is not played"); return 1; }}'
            for name in names
            if name not in ours
        )
        (folder / "lacking.c").write_text(f"void standin_problem(const char *);\n{lacking}\n")
        (folder / "versions").write_text(
            f"{library} {{ global: {' '.join(f'{name};' for name in names)} local: *; }};\n"
        )
        script = f"-Wl,--version-script={folder / 'versions'}"
        more = (script, f"-I{headers}", str(source), f"-L{folder}", "-l:libcuda.so.1", *WARNINGS) if names else ()
        _shared(folder, library, str(folder / "lacking.c"), *more)


def _shared(folder: Path, library: str, *more: str) -> None:
    command = ["cc", "-shared", "-fPIC", "-O1", f"-Wl,-soname,{library}", "-o", str(folder / library), *more]
    subprocess.run(command, check=True)


def _said(*command: str) -> str:
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout
