"""What works on this machine, and what it would take for the rest."""

import importlib.util
import os
import platform
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from typing import Any

from ..engines.backends import detect_backends
from ..engines.base import CardFacts
from ..machine.memory import total_bytes
from ..machine.wording import format_bytes
from ..runtime.proof.sentences import card_text

EXTRAS: Mapping[str, tuple[Sequence[str], Sequence[str]]] = {
    "export": (
        ("build-engines", "verify", "make-checkpoints"),
        ("torch", "onnx", "onnxscript", "onnx_ir"),
    ),
    "plot": (("plot", "plot-trace"), ("matplotlib",)),
    "serve": (("serve",), ("fastapi", "uvicorn", "prometheus_client", "python_multipart")),
    "ray": (("batch --ray",), ("ray",)),
    "pictures": (("HEIC and JPEG XL pictures",), ("pillow_heif", "pillow_jxl")),
}
"""``extra -> (what needs it, the modules that it installs)``; those of a backend stand in its row."""


def diagnose() -> dict[str, Any]:
    """The machine: backends, which extras are installed, cores and memory."""
    return {
        "python": platform.python_version(),
        "platform": platform.platform(),
        "cores": os.cpu_count(),
        "memory_bytes": total_bytes(),
        "backends": [
            {
                "name": status.name,
                "works": status.works,
                "cards": [asdict(card) for card in status.cards],
                "reason": status.reason,
                "remedy": status.remedy,
            }
            for status in detect_backends()
        ],
        "extras": [_extra_facts(name, users, modules) for name, (users, modules) in EXTRAS.items()],
    }


def diagnosis_lines(facts: Mapping[str, Any]) -> Iterator[str]:
    """:func:`diagnose` for people."""
    memory = f", {format_bytes(facts['memory_bytes'])} memory" if facts["memory_bytes"] else ""
    yield f"Python {facts['python']} on {facts['platform']}, {facts['cores']} cores{memory}"
    for backend in facts["backends"]:
        if backend["works"]:
            yield f"backend {backend['name']}: works ({backend['reason']})"
        else:
            yield f"backend {backend['name']}: no ({backend['reason']}); {backend['remedy']}"
        for number, card in enumerate(backend["cards"]):
            never = ": --backend auto never takes it" if card["software"] else ""
            yield f"  card {number}: {card_text(CardFacts(**card))}{never}"
    for extra in facts["extras"]:
        lacks = f"no ({', '.join(extra['missing'])} missing); {extra['remedy']}"
        yield f"{', '.join(extra['for'])}: {lacks if extra['missing'] else 'works'}"


def _extra_facts(name: str, users: Sequence[str], modules: Sequence[str]) -> dict[str, Any]:
    missing = [module for module in modules if importlib.util.find_spec(module) is None]
    remedy = f'pip install "i2l-engines[{name}]"' if missing else ""
    return {"name": name, "for": list(users), "missing": missing, "remedy": remedy}
