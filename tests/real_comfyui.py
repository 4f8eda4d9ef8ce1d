"""Run the nodes in a real, headless ComfyUI: python tests/real_comfyui.py COMFYUI_FOLDER [--python COMFYUIS_PYTHON].

Everything goes to a folder of its own (ComfyUI's --base-directory): tiny checkpoints, a link to this pack, input and
output. The ComfyUI folder is not changed. docs/comfyui.md says what that ComfyUI needs installed.
"""

import argparse
import shutil
import sys
import tempfile
from dataclasses import replace
from pathlib import Path
from unittest.mock import patch

import pillow_heif
import torch
from PIL import Image
from safetensors.torch import save_file

from comfyui.browser import check_browser, open_browser
from comfyui.checks import Session, check_api
from comfyui.server import EXAMPLES, PACK, example, prompt_from_workflow, running_server, say
from conftest import ADOBE, matrix_profile
from i2l.export.checkpoints.synthetic import make_checkpoints
from i2l.specs import PRESETS


def prepare(base: Path) -> None:
    """Tiny checkpoints, a picture, the pack and the checking nodes where ComfyUI looks for them."""
    for name in ("custom_nodes", "input", "output", "models", "elsewhere/Z-Image"):
        (base / name).mkdir(parents=True)
    (base / "custom_nodes" / "i2l").symlink_to(PACK, target_is_directory=True)
    nodes = (PACK / "tests" / "comfyui" / "check_nodes.py").read_text(encoding="utf-8")
    (base / "custom_nodes" / "check_nodes.py").write_text(nodes, encoding="utf-8")
    make_checkpoints(base / "models" / "I2L", "tiny")
    adapters = base / "models" / "I2L" / "Z-Image"
    shutil.copyfile(adapters / "Z-Image-i2L.safetensors", base / "elsewhere" / "Z-Image" / "other.safetensors")
    tiny = PRESETS["tiny"]  # "deep": as many modules as the published adapter, for check_nodes.WHOLE_DEPTH
    deep = replace(tiny, adapter=replace(tiny.adapter, layers=30, refiners=2, hidden=256, feed_forward=768))
    with patch.dict("i2l.specs.PRESETS", deep=deep):
        make_checkpoints(base / "deep", "deep")
    (base / "deep" / "Z-Image" / "Z-Image-i2L.safetensors").rename(adapters / "deep.safetensors")
    save_file({"layers.0.attention.to_q.lora_A.weight": torch.ones(4, 8)}, adapters / "my_lora.safetensors")
    (base / "extra.yaml").write_text(f"more:\n  base_path: {base}\n  I2L: elsewhere\n", encoding="utf-8")
    with Image.open(PACK / "docs" / "photo.jpg") as photo:
        photo.save(base / "input" / "example.png")
        profile = matrix_profile(b"RGB ", 2.2, ADOBE)
        photo.save(base / "input" / "adobe.jpg", icc_profile=profile)
        pillow_heif.from_pillow(photo).save(base / "input" / "adobe.heic", icc_profile=profile)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("comfyui", type=Path, help="folder of ComfyUI's main.py")
    parser.add_argument("--python", default=sys.executable, help="the Python that ComfyUI runs in")
    parser.add_argument("--screenshots", type=Path, help="a folder that keeps the browser's screenshots")
    arguments = parser.parse_args()
    python = shutil.which(arguments.python)  # absolute, as ComfyUI starts in its own folder
    if python is None:
        parser.error(f"{arguments.python} is no program")
    if not (arguments.comfyui / "main.py").is_file():
        parser.error(f"{arguments.comfyui} has no main.py: name the folder of a ComfyUI (COMFYUI=folder)")
    with tempfile.TemporaryDirectory(prefix="i2l-comfyui-") as folder:
        base = Path(folder).resolve()
        prepare(base)
        shots = (arguments.screenshots or base / "screenshots").absolute()
        shots.mkdir(parents=True, exist_ok=True)
        with running_server(arguments.comfyui, str(Path(python).absolute()), base) as server:
            version = server.get("/system_stats")["system"]["comfyui_version"]
            say(f"ComfyUI {version} started with the pack")
            info = server.get("/object_info")
            check_api(Session(server, info, prompt_from_workflow(example(EXAMPLES[0]), info)))
            with open_browser(server, shots) as browser:
                check_browser(browser)


if __name__ == "__main__":
    main()
