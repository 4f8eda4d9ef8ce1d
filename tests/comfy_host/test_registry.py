"""What ComfyUI's registry and Manager read."""

import importlib.util
import tomllib
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

ROOT = Path(__file__).parents[2]
PROJECT = (ROOT / "pyproject.toml").read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def with_urls() -> Any:
    spec = importlib.util.spec_from_file_location("registry_urls", ROOT / ".ci" / "registry_urls.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.with_urls


def test_publishing_puts_the_repository_s_address_in(with_urls: Any) -> None:
    text = with_urls(PROJECT, "https://github.com/somebody/i2l", "0123abc")
    before, after = tomllib.loads(PROJECT), tomllib.loads(text)
    assert after["project"].pop("urls") == {
        "Repository": "https://github.com/somebody/i2l",
        "Documentation": "https://github.com/somebody/i2l/blob/0123abc/docs/comfyui.md",
    }
    icon = after["tool"]["comfy"].pop("Icon")
    assert icon == "https://raw.githubusercontent.com/somebody/i2l/0123abc/docs/icon.png"
    before["tool"]["comfy"].pop("Icon")
    assert after == before  # and nothing else
    with pytest.raises(SystemExit):
        with_urls(text, "https://github.com/somebody/i2l", "0123abc")


def test_the_metadata_follows_the_registry_s_rules() -> None:
    project = tomllib.loads(PROJECT)
    comfy = project["tool"]["comfy"]
    assert "comfyui" not in project["project"]["name"].lower()
    assert {"PublisherId", "DisplayName", "Icon", "requires-comfyui"} <= comfy.keys()
    with Image.open(ROOT / "docs" / "icon.png") as icon:
        assert (icon.format, icon.size) == ("PNG", (400, 400))  # the largest that is allowed
