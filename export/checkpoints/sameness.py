"""Two checkpoints of one model: the same content under two names, or not?"""

from pathlib import Path
from typing import BinaryIO

from ...engines.directory.tensorfile import TensorInfo
from .recognise import Checkpoint

PIECE = 16 << 20


def same_content(first: Checkpoint, second: Checkpoint) -> bool:
    """Do two checkpoints hold the same values? Small tensors first: other weights differ there already."""
    if first.spec != second.spec or first.tensors.keys() != second.tensors.keys():
        return False
    if first.scales.keys() != second.scales.keys():
        return False
    pairs = [
        ((first.file_of(name), info), (second.file_of(name), second.tensors[name]))
        for name, info in first.tensors.items()
    ]
    pairs += [(scale, second.scales[name]) for name, scale in first.scales.items()]
    if any((a.dtype, a.shape) != (b.dtype, b.shape) for (_, a), (_, b) in pairs):
        return False
    if all(path.samefile(other) and a.offset == b.offset for (path, a), (other, b) in pairs):
        return True
    return all(_same_bytes(a, b) for a, b in sorted(pairs, key=lambda pair: pair[0][1].nbytes))


def _same_bytes(first: tuple[Path, TensorInfo], second: tuple[Path, TensorInfo]) -> bool:
    (path, info), (other_path, other) = first, second
    with path.open("rb") as file, other_path.open("rb") as other_file:
        file.seek(info.offset)
        other_file.seek(other.offset)
        return _same_pieces(file, other_file, info.nbytes)


def _same_pieces(file: BinaryIO, other: BinaryIO, nbytes: int) -> bool:
    while nbytes > 0:
        count = min(nbytes, PIECE)
        if file.read(count) != other.read(count):
            return False
        nbytes -= count
    return True
