"""Whether a plugin provider can run here, on which cards, and which one is taken."""

import importlib.util
import logging
import sys
from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from typing import TYPE_CHECKING

from ..base import BackendStatus, CardFacts, VramBudget
from ..errors import BackendUnavailable, OutOfDeviceMemory
from .providers import Provider
from .vulkan import LOADER, VulkanCard, has_loader, vulkan_cards

if TYPE_CHECKING:  # onnxruntime may be too old for it, which is to be said, not raised
    from .plugin_device import PluginDevice

log = logging.getLogger(__name__)
USE_CPU = "use --backend cpu"


@dataclass(frozen=True)
class Seat:
    """A card behind a provider, not opened yet."""

    provider: Provider
    name: str
    choice: str = ""
    """What the provider is told about which card to take."""
    index: int = 0
    """Among onnxruntime's devices."""
    card: VulkanCard | None = None

    def open(self) -> "PluginDevice":
        """Open it."""
        from .plugin_device import PluginDevice  # noqa: PLC0415 - as above

        return PluginDevice(self.provider, self.name, choice=self.choice, index=self.index, card=self.card)

    def budget_bytes(self, vram: VramBudget) -> int | None:
        """What the backend may take; None for the least that works, where nobody says what is free."""
        if vram.budget_bytes is not None:
            return vram.budget_bytes
        device = self.open()
        try:
            free = device.free_bytes()
        finally:
            device.close()
        if free is None:
            log.warning("%s does not tell what memory is free: taking the least; --vram-budget gives more", self.name)
            return None
        # A renderer on the CPU draws no desktop that would need a part of its memory.
        margin_bytes = 0 if self.card and self.card.kind == "software" else vram.margin_bytes
        if free <= margin_bytes:
            raise OutOfDeviceMemory(self.name, margin_bytes, free)
        return free - margin_bytes


def find_plugin(provider: Provider) -> BackendStatus:
    """It wants its package, an onnxruntime that takes plugins and tells what it logs, and a card."""
    try:
        obstacle = _obstacle(provider)
        seats = [] if obstacle else seats_of(provider)
    except (RuntimeError, OSError) as error:
        seats, obstacle = [], (f"{provider.package} does not load ({error})", f"install it again, or {USE_CPU}")
    if not obstacle and not seats:
        obstacle = ("onnxruntime finds no GPU on this machine", USE_CPU)
    if not obstacle and _asks_vulkan(provider) and seats[0].card is None:
        obstacle = ("Vulkan finds no card", f"install the card's Vulkan driver, or {USE_CPU}")
    if obstacle:
        reason, remedy = obstacle
        return BackendStatus(provider.backend, works=False, reason=reason, remedy=remedy)
    cards = tuple({seat.name: facts_of(seat) for seat in seats}.values())
    software = ", a renderer on the CPU" if cards[0].software else ""
    reason = f"{provider.package} {_version(provider.package)} on {cards[0].name}{software}"
    return BackendStatus(provider.backend, works=True, reason=reason, cards=cards)


def _obstacle(provider: Provider) -> tuple[str, str] | None:
    """What is missing before its library can be loaded, and the remedy."""
    if sys.version_info < provider.least_python:
        wanted = ".".join(map(str, provider.least_python))
        return f"{provider.package} needs Python {wanted}", f"install i2l into such a Python, or {USE_CPU}"
    if importlib.util.find_spec(provider.module) is None:
        return f"{provider.package} is not installed", f'pip install "i2l-engines[{provider.extra}]"'
    import onnxruntime  # noqa: PLC0415 - only where there is something to ask it

    if not hasattr(onnxruntime, "set_default_logger_callback"):
        return f"onnxruntime {onnxruntime.__version__} is too old for it", "pip install --upgrade 'onnxruntime>=1.32'"
    if _asks_vulkan(provider) and not has_loader():
        return f"there is no Vulkan loader ({LOADER})", "apt install libvulkan1"
    return None


def _asks_vulkan(provider: Provider) -> bool:
    return provider.vulkan and sys.platform.startswith("linux")


def seat_for(provider: Provider, device: str | None) -> Seat:
    """The card that was asked for, or the first.

    Raises:
        BackendUnavailable: the provider cannot run here, or there is no such card.
    """
    status = find_plugin(provider)
    if not status.works:
        raise BackendUnavailable(provider.backend, status.reason, status.remedy)
    seats = seats_of(provider)
    if device is None:
        return seats[0]
    for number, seat in enumerate(seats):
        if device in {seat.choice, str(number)} or device.casefold() in seat.name.casefold():
            return seat
    names = [f"{number} ({seat.choice or seat.name})" for number, seat in enumerate(seats)]
    raise BackendUnavailable(provider.backend, f"it finds no card {device}", f"use one of {', '.join(names)}")


def seats_of(provider: Provider) -> list[Seat]:
    """Every card that may be chosen, the one that is taken by itself first."""
    from .loading import library_of  # noqa: PLC0415 - onnxruntime

    library = library_of(provider)
    library.begin()
    try:
        names = [_device_name(device) for device in library.devices()]
    finally:
        library.end()
    if not names:
        return []
    if not provider.choices:
        return [Seat(provider, name, index=index) for index, name in enumerate(names)]
    cards = vulkan_cards() if _asks_vulkan(provider) else ()
    order: dict[str, Callable[[VulkanCard], bool]] = {"low-power": lambda card: card.kind != "integrated"}
    seats = []
    for choice in provider.choices:
        card = min(cards, key=order[choice], default=None) if choice in order else next(iter(cards), None)
        seats.append(Seat(provider, card.name if card else names[0], choice, card=card))
    return seats


def card_named(provider: Provider, device: str | None) -> CardFacts | None:
    """The card that ``--device`` stands for; None where there is no such one."""
    try:
        return facts_of(seat_for(provider, device))
    except BackendUnavailable:
        return None


def facts_of(seat: Seat) -> CardFacts:
    """What a proof on this card holds for."""
    packages = ("onnxruntime", seat.provider.package)
    return CardFacts(
        name=seat.name,
        driver=seat.card.driver if seat.card else "",
        libraries={package: _version(package) for package in packages},
        software=seat.card.kind == "software" if seat.card else "Basic Render" in seat.name,
    )


def _device_name(device: object) -> str:
    """What onnxruntime knows of a device: a description on Windows, else its vendor and numbers."""
    hardware = device.device  # type: ignore[attr-defined]  # onnxruntime has no types
    described = dict(hardware.metadata).get("Description")
    return str(described or f"{hardware.vendor or 'GPU'} {hardware.vendor_id:04x}:{hardware.device_id:04x}".strip())


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "unknown"
