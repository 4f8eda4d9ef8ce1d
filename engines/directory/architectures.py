"""Generations of NVIDIA GPUs, by compute capability: 89 for 8.9. Imports nothing, as ``--help`` lists them."""

from collections.abc import Mapping

GENERATIONS: Mapping[int, str] = {
    75: "RTX 20", 80: "A100", 86: "RTX 30", 89: "RTX 40", 120: "RTX 50", 121: "GB10",
}  # fmt: skip
"""Those that TensorRT-RTX 1.7 builds for; 9.0 (H100) is none of them."""
FLOAT8_FROM = 89
"""The first generation with FP8 products; older ones refuse to build them."""
BFLOAT16_FROM = 80
"""The first with bfloat16; sm75 multiplies in float16, and no float32 products are built for it."""
