"""The rotations of :mod:`..engines.rotation` for torch: in the quantisers and in the graphs."""

import torch
from torch import Tensor

from ...engines.cpu import rotation as arrays


def rotation(width: int) -> Tensor:
    """The rotation ``[b, b]`` of every ``b`` channels of ``width``, float32."""
    return torch.from_numpy(arrays.rotation(width))


def rotate(x: Tensor, matrix: Tensor) -> Tensor:
    """Rotate the rows of ``x [rows, width]``, block by block."""
    return (x.reshape(-1, len(matrix)) @ matrix).view(x.shape)
