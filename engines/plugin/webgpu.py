"""The webgpu backend: any card, through Direct3D 12, Vulkan or Metal."""

from functools import partial

from ..base import Offer
from .backend import open_plugin
from .presence import card_named, find_plugin
from .providers import WEBGPU

OFFER = Offer(
    partial(find_plugin, WEBGPU),
    partial(open_plugin, WEBGPU),
    WEBGPU.forms,
    partial(card_named, WEBGPU),
)
