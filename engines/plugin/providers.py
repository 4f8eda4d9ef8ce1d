"""The plugin providers, one row of facts each. Nothing else in this room knows which provider it runs on.

A plugin provider is a library that loads into the plain onnxruntime: it excludes nothing, and the CPU goes on working.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field

from .graph_paths import FORMS


@dataclass(frozen=True)
class Provider:
    """What is to be known of a plugin provider."""

    backend: str
    """Its name among the backends."""
    package: str
    """On PyPI."""
    module: str
    """That the package installs; it knows the library's path and the provider's name."""
    extra: str
    """Of i2l-engines, which installs it."""
    least_python: tuple[int, int]
    choices: tuple[str, ...] = ()
    """What ``--device`` may be where the provider chooses the card by itself; without them it is a number."""
    choice_option: str = ""
    """The provider's option that takes a choice."""
    options: Mapping[str, str] = field(default_factory=dict)
    """Of the provider."""
    forms: tuple[str, ...] = FORMS
    memory: str = "gpu"
    """How onnxruntime calls memory on the card."""
    vulkan: bool = False
    """On Linux it reaches cards through Vulkan, which can be asked what there is."""
    reserved_bytes: int = 0
    """What it takes on the card beside the tensors: its context and compiled kernels."""
    reserved_in_software_bytes: int = 0
    """The same for a renderer on the CPU."""
    error_log: str = ""
    """Beginning of a log message by which it tells of errors that no call returns; none: every call returns its own."""


WEBGPU = Provider(
    backend="webgpu",
    package="onnxruntime-ep-webgpu",
    module="onnxruntime_ep_webgpu",
    extra="gpu",
    least_python=(3, 11),
    choices=("high-performance", "low-power"),
    choice_option="powerPreference",
    # Buffers that it freed at once would be held until the queue has passed them, while others are made: twice the
    # memory (measured). Kept ones are given back as a whole when the library is unloaded.
    options={"storageBufferCacheMode": "simple"},
    vulkan=True,
    reserved_bytes=256 << 20,  # assumed
    # SwiftShader compiles shaders into the process's memory: beside 5 MiB of tensors it grew by 237 to 439 MiB in eight
    # proofs of the same engines.
    reserved_in_software_bytes=512 << 20,
    error_log="WebGPU device error",
)
"""Direct3D 12, Vulkan or Metal by Dawn: any vendor's card. In CI it runs on SwiftShader, a renderer on the CPU."""

TENSORRT_RTX = Provider(
    backend="tensorrt-rtx",
    package="onnxruntime-ep-nv-tensorrt-rtx-cu13",
    module="onnxruntime_ep_nv_tensorrt_rtx",
    extra="rtx",
    least_python=(3, 11),
    forms=FORMS[:1],
    reserved_bytes=512 << 20,  # assumed, as for the cuda backend
)
"""TensorRT-RTX inside onnxruntime, NVIDIA Ampere and later. Written by its documentation, never run."""
