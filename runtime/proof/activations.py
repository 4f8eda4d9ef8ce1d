"""What a proof feeds: seeded activations of real sizes, with the massive outliers that real models have.

A few tokens of DINOv3 reach thousands in a few channels, and the two parts of an embedding differ in size. What rounds
too coarsely, or lets one token's scale reach another's, shows there and nowhere else.
"""

import zlib

import numpy as np

from ...engines.base import Array
from ...specs import AdapterSpec, Spec

MASSIVE = 800.0
"""Beside channels of size one; DINOv3's residual stream reaches thousands (export/precisions/linears.py)."""
MASSIVE_TOKENS = 4
"""How many tokens have them: CLS and registers where there are some."""
MASSIVE_CHANNELS = 3


def seeded_activation(spec: Spec, graph: str, images: int) -> Array:
    """What a graph takes, float32 ``[images, ...]``; the first images are the same whatever their number."""
    return np.stack([_one(spec, graph, image) for image in range(images)])


def _one(spec: Spec, graph: str, image: int) -> Array:
    random = np.random.default_rng([zlib.crc32(graph.encode()), image])
    if isinstance(spec, AdapterSpec):
        embedding = random.standard_normal(spec.embedding, np.float32)
        embedding[: spec.embedding // 4] *= 8  # as SigLIP2's part is the smaller one
        embedding[random.integers(0, spec.embedding, MASSIVE_CHANNELS)] *= 30
        return embedding
    if graph.endswith(".embed"):
        return np.clip(random.standard_normal((3, spec.image_size, spec.image_size), np.float32), -2.5, 2.5)
    hidden = random.standard_normal((spec.tokens, spec.hidden), np.float32)
    if image % 2 == 0:  # beside pictures that have none
        channels = random.integers(0, spec.hidden, MASSIVE_CHANNELS)
        sizes = MASSIVE * (1 + random.random((MASSIVE_TOKENS, MASSIVE_CHANNELS), np.float32))
        hidden[:MASSIVE_TOKENS, channels] = sizes * random.choice([-1.0, 1.0], sizes.shape)
    return hidden
