"""The numbers that packs hold: safetensors' name, numpy's type of the same width, ONNX's number."""

from collections.abc import Mapping

import numpy as np

# safetensors dtype -> (numpy dtype of the same width, onnx.TensorProto element type): numpy knows neither bfloat16 nor
# FP8, and the runtime does without the onnx package.
ELEMENT_TYPES: Mapping[str, tuple[type[np.generic], int]] = {
    "F32": (np.float32, 1),
    "U8": (np.uint8, 2),
    "I8": (np.int8, 3),
    "BF16": (np.uint16, 16),
    "F8_E4M3": (np.uint8, 17),
}
FLOAT32 = ELEMENT_TYPES["F32"][1]
