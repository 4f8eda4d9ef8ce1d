"""What stands in a plugin provider's way, each with its sentence; which card is taken."""

import sys
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import onnxruntime
import pytest

from host_plugin import HOST
from i2l.engines.base import VramBudget
from i2l.engines.plugin import presence
from i2l.engines.plugin.presence import Seat, facts_of, find_plugin, seats_of
from i2l.engines.plugin.providers import TENSORRT_RTX, WEBGPU
from i2l.engines.plugin.vulkan import VulkanCard, driver_version
from i2l.errors import OutOfDeviceMemory
from i2l.look.diagnosis import diagnosis_lines

DISCRETE = VulkanCard("GeForce", "discrete", "580.95.5", 2 << 30, 8 << 30, 6 << 30)
INTEGRATED = VulkanCard("Radeon 780M", "integrated", "25.2.1", 2 << 30, 4 << 30, None)
SOFTWARE = VulkanCard("SwiftShader", "software", "5.0.0", 1 << 30, 2 << 30, None)
ON_HOST = replace(HOST, vulkan=True, choices=WEBGPU.choices, choice_option="powerPreference")


@pytest.fixture(autouse=True)
def linux(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "platform", "linux")
    monkeypatch.setattr(presence, "has_loader", lambda: True)
    monkeypatch.setattr(presence, "vulkan_cards", lambda: (DISCRETE, INTEGRATED))


def reason(provider: Any = ON_HOST) -> str:
    status = find_plugin(provider)
    assert not status.works
    return f"{status.reason}: {status.remedy}"


def test_every_obstacle_has_a_sentence_and_a_way_out(monkeypatch: pytest.MonkeyPatch) -> None:
    assert 'is not installed: pip install "i2l-engines[rtx]"' in reason(TENSORRT_RTX)
    assert "needs Python 3.99" in reason(replace(HOST, least_python=(3, 99)))
    monkeypatch.setattr(presence, "vulkan_cards", lambda: ())
    assert "Vulkan finds no card: install the card's Vulkan driver, or use --backend cpu" in reason()
    monkeypatch.setattr(presence, "has_loader", lambda: False)
    assert "no Vulkan loader (libvulkan.so.1): apt install libvulkan1" in reason()
    monkeypatch.delattr(onnxruntime, "set_default_logger_callback")
    assert "is too old for it: pip install --upgrade 'onnxruntime>=1.32'" in reason()


def test_a_library_that_does_not_load_and_a_machine_without_a_card(monkeypatch: pytest.MonkeyPatch) -> None:
    def seats(_: Any) -> list[Seat]:
        raise RuntimeError("undefined symbol")

    monkeypatch.setattr(presence, "seats_of", lambda _: [])
    assert "finds no GPU on this machine: use --backend cpu" in reason()
    monkeypatch.setattr(presence, "seats_of", seats)
    assert "does not load (undefined symbol): install it again" in reason()


def test_the_choices_take_different_cards() -> None:
    first, second = seats_of(ON_HOST)
    assert (first.choice, first.card) == ("high-performance", DISCRETE)
    assert (second.choice, second.card) == ("low-power", INTEGRATED)
    status = find_plugin(ON_HOST)
    assert [card.name for card in status.cards] == ["GeForce", "Radeon 780M"]
    assert status.works
    assert status.cards[0].driver == "580.95.5"
    assert set(status.cards[0].libraries) == {"onnxruntime", HOST.package}


def test_a_renderer_on_the_cpu_is_called_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(presence, "vulkan_cards", lambda: (SOFTWARE,))
    status = find_plugin(ON_HOST)
    assert [card.software for card in status.cards] == [True]
    assert "on SwiftShader, a renderer on the CPU" in status.reason
    assert facts_of(Seat(ON_HOST, "Microsoft Basic Render Driver")).software
    backend = {"name": "webgpu", "works": True, "reason": "it is", "remedy": "try it"}
    cards = [{"name": "SwiftShader", "driver": "5.0.0", "libraries": {}, "software": True}]
    machine = {"python": "3", "platform": "p", "cores": 1, "memory_bytes": None, "extras": []}
    lines = list(diagnosis_lines(machine | {"backends": [backend | {"cards": cards}]}))
    assert "  card 0: SwiftShader, driver 5.0.0, a renderer in software: --backend auto never takes it" in lines


def test_the_budget_is_what_is_free_less_the_margin(caplog: pytest.LogCaptureFixture) -> None:
    def budget(card: VulkanCard | None, **vram: int) -> int | None:
        return Seat(HOST, "card", card=card).budget_bytes(VramBudget(**vram))

    assert budget(DISCRETE, margin_bytes=2 << 30) == 4 << 30
    assert budget(DISCRETE, budget_bytes=5) == 5
    with pytest.raises(OutOfDeviceMemory):
        budget(DISCRETE, margin_bytes=6 << 30)
    software = budget(SOFTWARE, margin_bytes=2 << 30)
    assert software is not None
    assert software <= 2 << 30  # no desktop needs a margin of it
    assert budget(None) is None
    assert "does not tell what memory is free: taking the least" in caplog.text


def test_drivers_count_their_versions_in_two_ways() -> None:
    assert driver_version(0x10DE, 580 << 22 | 95 << 14 | 5 << 6) == "580.95.5"
    assert driver_version(0x1002, 25 << 22 | 2 << 12 | 1) == "25.2.1"


def test_a_device_on_windows_is_called_by_its_description() -> None:
    hardware = SimpleNamespace(metadata={"Description": "NVIDIA GeForce RTX 4070"}, vendor="NVIDIA")
    assert presence._device_name(SimpleNamespace(device=hardware)) == "NVIDIA GeForce RTX 4070"
    bare = SimpleNamespace(metadata={}, vendor="", vendor_id=0x10DE, device_id=0x2684)
    assert presence._device_name(SimpleNamespace(device=bare)) == "GPU 10de:2684"
