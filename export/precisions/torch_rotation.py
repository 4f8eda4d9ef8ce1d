"""The rotations of :mod:`..engines.rotation` for torch: in the quantisers and in the graphs."""

import torch
from torch import Tensor

from ...engines.cpu import rotation as arrays


def rotation(width: int) -> Tensor:
    """The rotation ``[b, b]`` of every ``b`` channels of ``width``, float32."""
    return torch.from_numpy(arrays.rotation(width))


def balanced_rotation(width: int) -> Tensor:
    """The balanced rotation ``[b, b']`` of every ``b`` channels of ``width``, float32."""
    return torch.from_numpy(arrays.balanced_rotation(width))


def rotate(x: Tensor, matrix: Tensor) -> Tensor:
    """Rotate the last dimension of ``x``, block by block."""
    size, after = matrix.shape
    return (x.reshape(-1, size) @ matrix).view(*x.shape[:-1], x.shape[-1] // size * after)
