"""A matrix that is larger than a card lets one buffer be: pieces of it, each a graph input of its own.

Cards limit what one buffer, or one binding of it, may hold; WebGPU promises 128 MiB. A matrix is cut along its first
dimension longer than one. There the pieces lie one after another in the pack, so they are read without being copied.
The build cuts by :data:`LARGEST_BYTES`; whoever feeds the graph reads from the graph's own inputs how it was cut.
"""

import math
from collections.abc import Mapping, Sequence

from .tensorfile import TensorInfo

LARGEST_BYTES = 128 << 20
"""``maxStorageBufferBindingSize`` that every WebGPU device has."""
Shape = tuple[int, ...]


def cut_shapes(shape: Shape, value_bytes: int, largest_bytes: int = LARGEST_BYTES) -> list[Shape]:
    """The shapes of the fewest pieces within ``largest_bytes``, as equal as can be; one piece if the whole fits.

    Args:
        shape: of the matrix as it is stored.
        value_bytes: bytes of a value where it is widest: 4 for a matrix that is dequantised to float32.
        largest_bytes: for one piece. A single row is never cut, even if it is longer.
    """
    axis = cut_axis(shape)
    rows = shape[axis]
    row_bytes = value_bytes * math.prod(shape) // rows
    count = min(rows, max(1, math.ceil(rows / max(1, largest_bytes // row_bytes))))
    ends = [rows * (i + 1) // count for i in range(count)]
    return [(*shape[:axis], end - start, *shape[axis + 1 :]) for start, end in zip([0, *ends[:-1]], ends, strict=True)]


def cut_axis(shape: Shape) -> int:
    """Along which dimension a matrix is cut: the first that is longer than one."""
    return next((axis for axis, size in enumerate(shape) if size > 1), 0)


def piece_names(name: str, count: int) -> list[str]:
    """The graph inputs of a matrix: its own name, or one for each piece."""
    return [name] if count == 1 else [f"{name}.{i}" for i in range(count)]


def placed(tensors: Mapping[str, TensorInfo], inputs: Mapping[str, Sequence[int]]) -> dict[str, TensorInfo]:
    """Where each input of a graph lies in the pack.

    Args:
        tensors: a step's tensors by name, without the step's prefix.
        inputs: the graph's inputs but for the activation, with their shapes, pieces in order.

    Raises:
        ValueError: the inputs are not exactly the tensors, whole or in pieces.
    """
    found: dict[str, TensorInfo] = {}
    used = dict.fromkeys(tensors, 0)
    for name, shape in inputs.items():
        whole = name if name in tensors else name.rpartition(".")[0]
        if whole not in tensors:
            raise ValueError(f"the pack has no {name}")
        tensor = tensors[whole]
        nbytes = tensor.nbytes * math.prod(shape) // math.prod(tensor.shape)
        found[name] = TensorInfo(tensor.dtype, tuple(shape), tensor.offset + used[whole])
        used[whole] += nbytes
    wrong = [name for name, nbytes in used.items() if nbytes != tensors[name].nbytes]
    if wrong:
        raise ValueError(f"the graph does not take all of {', '.join(wrong)}")
    return found
