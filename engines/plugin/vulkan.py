"""What Vulkan says of the cards: names, kinds, memory, limits. Its loader is called directly, by ctypes.

WebGPU on Linux reaches cards through Vulkan and tells Python nothing about them. Whether a card is a renderer on the
CPU, and how much memory is free, only the loader can say. Structures are read by their offsets in vulkan_core.h.
"""

import ctypes
import struct
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

LOADER = "libvulkan.so.1"
KINDS = ("other", "integrated", "discrete", "virtual", "software")
"""``VkPhysicalDeviceType``."""
NVIDIA = 0x10DE
BUDGET_EXTENSION = b"VK_EXT_memory_budget"
MEMORY_PROPERTIES, MEMORY_BUDGET = 1000059006, 1000237000
"""``sType`` of the two structures that tell what is free."""
HEAPS = 16
DEVICE_LOCAL = 1


@dataclass(frozen=True)
class VulkanCard:
    """A physical device."""

    name: str
    kind: str
    """Of :data:`KINDS`."""
    driver: str
    """Version."""
    largest_bytes: int
    """Of one binding of a buffer."""
    heap_bytes: int
    """Of the largest memory of its own."""
    free_bytes: int | None
    """Of it, for this process, where the driver says so."""


def has_loader() -> bool:
    """Whether there is a Vulkan loader; ``None`` of what follows works without."""
    try:
        ctypes.CDLL(LOADER)
    except OSError:
        return False
    return True


def vulkan_cards() -> tuple[VulkanCard, ...]:
    """Every card that Vulkan finds, the most powerful kind first; none without a loader or a driver."""
    if not sys.platform.startswith("linux") or not has_loader():
        return ()
    vulkan = ctypes.CDLL(LOADER)
    order = ("discrete", "integrated", "virtual", "other", "software")
    with instance(vulkan) as opened:
        cards = [card_facts(vulkan, device) for device in devices(vulkan, opened)] if opened else []
    return tuple(sorted(cards, key=lambda card: order.index(card.kind)))


@contextmanager
def instance(vulkan: ctypes.CDLL) -> Iterator[ctypes.c_void_p | None]:
    """An instance of Vulkan 1.1; None where no driver is installed."""
    application = ctypes.create_string_buffer(struct.pack("<I4xQQI4xQII", 0, 0, 0, 0, 0, 0, 1 << 22 | 1 << 12))
    info = struct.pack("<I4xQI4xQI4xQI4xQ", 1, 0, 0, ctypes.addressof(application), 0, 0, 0, 0)
    handle = ctypes.c_void_p()
    if vulkan.vkCreateInstance(ctypes.create_string_buffer(info), None, ctypes.byref(handle)):
        yield None
        return
    try:
        yield handle
    finally:
        vulkan.vkDestroyInstance(handle, None)


def devices(vulkan: ctypes.CDLL, opened: ctypes.c_void_p) -> list[ctypes.c_void_p]:
    """The handles of an instance's physical devices."""
    count = ctypes.c_uint32()
    vulkan.vkEnumeratePhysicalDevices(opened, ctypes.byref(count), None)
    handles = (ctypes.c_void_p * count.value)()
    vulkan.vkEnumeratePhysicalDevices(opened, ctypes.byref(count), handles)
    return [ctypes.c_void_p(handle) for handle in handles[: count.value]]


def card_facts(vulkan: ctypes.CDLL, device: ctypes.c_void_p) -> VulkanCard:
    """``VkPhysicalDeviceProperties`` and what is free of the largest heap on the device."""
    properties = ctypes.create_string_buffer(1024)
    vulkan.vkGetPhysicalDeviceProperties(device, properties)
    _, version, vendor, _, kind = struct.unpack_from("<5I", properties)
    name = properties.raw[20:276].split(b"\0")[0].decode(errors="replace")
    (largest_bytes,) = struct.unpack_from("<I", properties, 296 + 28)  # limits.maxStorageBufferRange
    memory = ctypes.create_string_buffer(struct.pack("<I4xQ", MEMORY_PROPERTIES, 0), 1024)
    budget = ctypes.create_string_buffer(struct.pack("<I4xQ", MEMORY_BUDGET, 0), 16 + 2 * 8 * HEAPS)
    tells_free = BUDGET_EXTENSION in extensions(vulkan, device)
    if tells_free:
        struct.pack_into("<Q", memory, 8, ctypes.addressof(budget))
    vulkan.vkGetPhysicalDeviceMemoryProperties2(device, memory)
    (heaps,) = struct.unpack_from("<I", memory, 16 + 4 + 32 * 8)
    sizes = [struct.unpack_from("<QI", memory, 16 + 264 + 16 * heap) for heap in range(heaps)]
    own = [heap for heap, (_, flags) in enumerate(sizes) if flags & DEVICE_LOCAL] or list(range(heaps))
    heap = max(own, key=lambda index: sizes[index][0])
    free = struct.unpack_from("<Q", budget, 16 + 8 * heap)[0] - struct.unpack_from("<Q", budget, 144 + 8 * heap)[0]
    return VulkanCard(
        name=name,
        kind=KINDS[kind] if kind < len(KINDS) else KINDS[0],
        driver=driver_version(vendor, version),
        largest_bytes=largest_bytes,
        heap_bytes=sizes[heap][0],
        free_bytes=max(0, free) if tells_free else None,
    )


def extensions(vulkan: ctypes.CDLL, device: ctypes.c_void_p) -> set[bytes]:
    """Names of a device's extensions."""
    count = ctypes.c_uint32()
    vulkan.vkEnumerateDeviceExtensionProperties(device, None, ctypes.byref(count), None)
    rows = ctypes.create_string_buffer(260 * max(1, count.value))
    vulkan.vkEnumerateDeviceExtensionProperties(device, None, ctypes.byref(count), rows)
    return {rows.raw[260 * row : 260 * row + 256].split(b"\0")[0] for row in range(count.value)}


def driver_version(vendor: int, version: int) -> str:
    """As the vendor counts."""
    if vendor == NVIDIA:
        return f"{version >> 22}.{version >> 14 & 0xFF}.{version >> 6 & 0xFF}"
    return f"{version >> 22}.{version >> 12 & 0x3FF}.{version & 0xFFF}"
