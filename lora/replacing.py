"""Which LoRA files may be replaced: those whose header says that i2l wrote them."""

from pathlib import Path

from safetensors import SafetensorError

from ..engines.directory.tensorfile import read_header
from ..machine.outputs import Format, Found
from .keys import parse_keys

OWN = "i2l."
"""How every name of our own metadata begins."""


def _find(path: Path) -> Found | None:
    try:
        tensors, metadata = read_header(path)
    except (SafetensorError, OSError, ValueError):
        return Found("there already, and no LoRA")
    parsed = parse_keys(tensors)
    if parsed.foreign or not parsed.modules:
        return Found("there already, and no LoRA")
    if any(name.startswith(OWN) for name in metadata):
        return None
    return Found("a LoRA that something else than i2l wrote", forcible=True)


LORA = Format("a LoRA", (".safetensors",), _find)
