"""The tensorrt-rtx backend: TensorRT-RTX inside onnxruntime. Never run on a GPU yet."""

from functools import partial

from ..base import Offer
from .backend import open_plugin
from .presence import card_named, find_plugin
from .providers import TENSORRT_RTX

OFFER = Offer(
    partial(find_plugin, TENSORRT_RTX),
    partial(open_plugin, TENSORRT_RTX),
    TENSORRT_RTX.forms,
    partial(card_named, TENSORRT_RTX),
)
