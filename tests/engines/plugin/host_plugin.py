"""onnxruntime's CPU provider in the place of a plugin: what every plugin provider goes through, over host memory."""

from functools import partial

from i2l.engines.base import Offer
from i2l.engines.plugin.backend import open_plugin
from i2l.engines.plugin.presence import find_plugin
from i2l.engines.plugin.providers import Provider


def get_ep_name() -> str:
    return "CPUExecutionProvider"


def get_library_path() -> str:
    return ""  # it is always loaded


HOST = Provider(
    backend="host",
    package="onnxruntime",
    module="host_plugin",
    extra="gpu",
    least_python=(3, 10),
    memory="cpu",
    reserved_bytes=1000,
    error_log="host device error",
)


OFFER = Offer(partial(find_plugin, HOST), partial(open_plugin, HOST), HOST.forms)
