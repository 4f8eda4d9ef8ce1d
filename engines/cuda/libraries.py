"""CUDA's libraries that onnxruntime's provider wants: from pip's packages, from a PyTorch beside it, or the system's.

onnxruntime looks for them itself, in this order: on Windows those of a PyTorch of the same major CUDA (where that is
imported already, as in ComfyUI, nothing is loaded); pip's packages of NVIDIA, which on Linux are PyTorch's, too; the
system's. That is its default: with ``directory=""`` pip's would come beside PyTorch's on Windows. It says on standard
output what it lacks, where a command's JSON may go.
"""

import io
import re
from contextlib import redirect_stdout
from functools import cache

LACKS = re.compile(r"^Failed to load ([^\s:/\\]+):", re.MULTILINE)
"""Where the last place did not have it either: a file that is named by its path is looked for once more."""


@cache
def missing_libraries() -> tuple[str, ...]:
    """Load them, once; the names of those that are not there. cuDNN is none of them: our graphs do not use it."""
    import onnxruntime  # noqa: PLC0415 - the leaf

    said = io.StringIO()
    with redirect_stdout(said):
        onnxruntime.preload_dlls(cudnn=False)
    return tuple(LACKS.findall(said.getvalue()))
