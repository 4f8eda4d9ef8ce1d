"""The values of a LoRA file's tensors as float32: every floating dtype but float64 goes over exactly."""

from collections.abc import Callable, Mapping

import numpy as np
from numpy.typing import NDArray

from ..engines.base import Array
from ..engines.directory.tensorfile import TensorInfo


def _float8_e4m3() -> Array:
    """The values of all 256 bytes; 4 bits of exponent, no infinity, NaN where all but the sign is set."""
    codes = np.arange(256)
    exponents, mantissas = codes >> 3 & 15, (codes & 7) / 8
    values = np.where(exponents, (1 + mantissas) * 2.0 ** (exponents - 7), mantissas * 2.0**-6)
    values[(codes & 127) == 127] = np.nan
    return (values * np.where(codes & 128, -1, 1)).astype(np.float32)


FLOAT8_E4M3 = _float8_e4m3()
FLOATS: Mapping[str, Callable[[bytes], Array]] = {
    "F32": lambda data: np.frombuffer(data, np.float32).copy(),
    "F16": lambda data: np.frombuffer(data, np.float16).astype(np.float32),
    "BF16": lambda data: (np.frombuffer(data, np.uint16).astype(np.uint32) << 16).view(np.float32),
    "F8_E4M3": lambda data: FLOAT8_E4M3[np.frombuffer(data, np.uint8)],
    "F8_E5M2": lambda data: (np.frombuffer(data, np.uint8).astype(np.uint16) << 8).view(np.float16).astype(np.float32),
}


def tensor_values(data: bytes, info: TensorInfo) -> NDArray[np.float32]:
    """A tensor of a file whose bytes are all here."""
    return FLOATS[info.dtype](data[info.offset : info.offset + info.nbytes]).reshape(info.shape)
