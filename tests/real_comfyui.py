"""Run the nodes in a real, headless ComfyUI: python tests/real_comfyui.py COMFYUI_FOLDER [--python COMFYUIS_PYTHON].

Everything goes to a folder of its own (ComfyUI's --base-directory): tiny checkpoints, a link to this pack, input and
output. The ComfyUI folder is not changed. docs/comfyui.md says what that ComfyUI needs installed.
"""

import argparse
import json
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.error import HTTPError, URLError

from PIL import Image

from i2l.export.synthetic import make_checkpoints
from i2l.runtime.lora import describe_lora

PACK = Path(__file__).absolute().parents[1]
WIDGETS = {"INT", "FLOAT", "STRING", "BOOLEAN", "COMBO"}
Json = dict[str, Any]


def prompt_from_workflow(workflow: Json, object_info: Json) -> Json:
    """A saved workflow as a prompt of the API, with the widgets' values taken by position as the frontend does it."""
    sources = {link[0]: [str(link[1]), link[2]] for link in workflow["links"]}
    prompt: Json = {}
    for node in workflow["nodes"]:
        if node["type"] in {"MarkdownNote", "Note"}:
            continue
        linked = {slot["name"]: sources[slot["link"]] for slot in node["inputs"] if slot["link"] is not None}
        values = list(node["widgets_values"])
        inputs: Json = {}
        described = object_info[node["type"]]["input"]
        for name, (kind, *rest) in {**described.get("required", {}), **described.get("optional", {})}.items():
            options = rest[0] if rest else {}
            if isinstance(kind, list) or kind in WIDGETS:
                inputs[name] = values.pop(0) if values else options["default"]
                if options.get("control_after_generate"):
                    values.pop(0)
            if name in linked:
                inputs[name] = linked[name]
        prompt[str(node["id"])] = {"class_type": node["type"], "inputs": inputs}
    return prompt


class Server:
    """A running ComfyUI."""

    def __init__(self, base: Path, url: str, log: Path, process: subprocess.Popen[bytes]) -> None:
        self.base, self.url, self._log, self._process = base, url, log, process

    def get(self, path: str) -> Any:
        with urllib.request.urlopen(self.url + path, timeout=60) as answer:
            return json.load(answer)

    def post(self, path: str, values: Json) -> Any:
        body = json.dumps(values).encode()
        request = urllib.request.Request(self.url + path, body, {"Content-Type": "application/json"})
        with urllib.request.urlopen(request, timeout=60) as answer:
            return json.loads(answer.read() or b"null")

    def run(self, prompt: Json, *, meanwhile: Callable[[], object] = lambda: None) -> Json:
        """Queue a prompt and wait for its history entry."""
        try:
            prompt_id = self.post("/prompt", {"prompt": prompt})["prompt_id"]
        except HTTPError as error:
            raise AssertionError(f"the prompt was refused: {error.read().decode()}") from error
        deadline = time.monotonic() + 300
        while time.monotonic() < deadline:
            meanwhile()
            assert not self.logged("Exception in thread"), self._log.read_text(errors="replace")[-3000:]
            if history := self.get(f"/history/{prompt_id}"):
                entry: Json = history[prompt_id]
                return entry
            time.sleep(0.05)
        raise AssertionError("no result within five minutes")

    def logged(self, text: str) -> int:
        """How often a text stands in the log."""
        return self._log.read_text(encoding="utf-8", errors="replace").count(text)

    def wait(self, condition: Callable[[], object], seconds: float = 60) -> None:
        deadline = time.monotonic() + seconds
        while not condition():
            assert time.monotonic() < deadline, f"waited {seconds:g} s"
            assert self._process.poll() is None, f"ComfyUI ended: {self._log.read_text()[-3000:]}"
            time.sleep(0.1)

    def answers(self) -> bool:
        try:
            self.get("/system_stats")
        except URLError:
            return False
        return True


@contextmanager
def comfyui(folder: Path, python: str, base: Path) -> Iterator[Server]:
    """Start ComfyUI on the CPU and a free port; end it afterwards."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    log = base / "comfyui.log"
    options = ["--cpu", "--listen", "127.0.0.1", "--port", str(port), "--base-directory", str(base)]
    options += ["--extra-model-paths-config", str(base / "extra.yaml"), "--disable-auto-launch"]
    with log.open("wb") as out:
        process = subprocess.Popen([python, "main.py", *options], cwd=folder, stdout=out, stderr=subprocess.STDOUT)
        server = Server(base, f"http://127.0.0.1:{port}", log, process)
        try:
            server.wait(server.answers, 300)
            yield server
        finally:
            process.terminate()
            process.wait(30)


def prepare(base: Path) -> None:
    """Tiny checkpoints, a picture, the pack and the checking nodes where ComfyUI looks for them."""
    for name in ("custom_nodes", "input", "output", "models", "elsewhere/Z-Image"):
        (base / name).mkdir(parents=True)
    (base / "custom_nodes" / "i2l").symlink_to(PACK, target_is_directory=True)
    nodes = (PACK / "tests" / "comfy_check_nodes.py").read_text(encoding="utf-8")
    (base / "custom_nodes" / "check_nodes.py").write_text(nodes, encoding="utf-8")
    make_checkpoints(base / "models" / "I2L", "tiny")
    adapter = base / "models" / "I2L" / "Z-Image" / "Z-Image-i2L.safetensors"
    (base / "elsewhere" / "Z-Image" / "other.safetensors").write_bytes(adapter.read_bytes())
    (base / "extra.yaml").write_text(f"more:\n  base_path: {base}\n  I2L: elsewhere\n", encoding="utf-8")
    with Image.open(PACK / "docs" / "photo.jpg") as photo:
        photo.save(base / "input" / "example.png")


def check(server: Server) -> None:
    """Everything that the nodes promise, one line each."""
    info = server.get("/object_info")
    assert info["ZImageI2L_Apply"]["input_order"]["required"] == ["z_image_file_path", "images", "strength"]
    assert info["ZImageI2L_Apply"]["output"] == ["MODEL", "lora_weights"]
    assert info["ZImageI2L_PipelineLoader"]["output"] == ["ZI2L_FILE"]
    assert info["ZImageI2L_Save"]["output_node"]
    names = info["ZImageI2L_PipelineLoader"]["input"]["required"]["model_filename"][0]
    assert names == ["Z-Image-i2L.safetensors", "other.safetensors"], names
    say("/object_info has the three nodes; adapters of models/I2L and of extra_model_paths.yaml are listed")

    assert {"factory", "instant_apply"} <= set(server.get("/workflow_templates")["i2l"])
    templates = f"{server.url}/api/workflow_templates/i2l"
    for name in ("factory.json", "factory.jpg", "instant_apply.json", "instant_apply.jpg"):
        with urllib.request.urlopen(f"{templates}/{name}", timeout=60) as answer:
            assert answer.status == 200
    workflows = {
        name: json.loads((PACK / "example_workflows" / f"{name}.json").read_text(encoding="utf-8"))
        for name in ("factory", "instant_apply")
    }
    prompts = {name: prompt_from_workflow(workflow, info) for name, workflow in workflows.items()}
    say("both example workflows and their thumbnails are served, and every node of them exists")

    loras = server.base / "output" / "loras"
    prompt = prompts["factory"]
    apply = next(node["inputs"] for node in prompt.values() if node["class_type"] == "ZImageI2L_Apply")
    finished(server.run(prompt))
    facts = describe_lora(loras / "z_image_style_lora.safetensors")
    assert (facts["modules"], facts["rank"], facts["key_format"]) == (28, 8, "comfyui"), facts
    assert (server.logged("building them in"), server.logged("i2l: opened")) == (1, 1)
    say("the factory workflow built engines and wrote a LoRA of 28 modules, rank 8, to output/loras")

    apply["strength"] = 0.5
    finished(server.run(prompt))
    assert (loras / "z_image_style_lora_00002.safetensors").is_file()
    assert (server.logged("building them in"), server.logged("i2l: opened")) == (1, 1)
    say("a second run built nothing, opened nothing, and took a new file name")

    lists = server.get("/object_info/LoraLoader")["LoraLoader"]["input"]["required"]["lora_name"][0]
    assert "z_image_style_lora.safetensors" in lists
    say("Load LoRA lists the file")

    for values in ([0.7], [0.7, True], [0.7, True, False]):
        next(n for n in workflows["factory"]["nodes"] if n["type"] == "ZImageI2L_Apply")["widgets_values"] = values
        saved = prompt_from_workflow(workflows["factory"], info)
        finished(server.run(saved))
    say("saved widget values of one, two and three entries run")

    apply["strength"] = 0.6
    server.post("/free", {"unload_models": True, "free_memory": True})
    server.wait(lambda: server.logged("i2l: closed") == server.logged("i2l: opened"))
    opened = server.logged("i2l: opened")
    finished(server.run(prompt))
    assert server.logged("i2l: opened") == opened + 1
    say("freeing memory closed the pipeline, and the next run opened it again")

    apply["strength"], apply["precision"] = 0.9, "fp32"
    entry = server.run(prompt, meanwhile=lambda: server.post("/interrupt", {}))
    messages = {name: values for name, values in entry["status"]["messages"]}
    assert messages["execution_interrupted"]["node_type"] == "ZImageI2L_Apply", entry["status"]
    before = len(list(loras.rglob("*.safetensors")))
    finished(server.run(prompt))
    assert len(list(loras.rglob("*.safetensors"))) == before + 1
    say("an interrupt stopped the run in Apply and wrote nothing; the same prompt then ran to its end")

    save = next(node["inputs"] for node in prompt.values() if node["class_type"] == "ZImageI2L_Save")
    save["filename"] = "../../escaped"
    entry = server.run(prompt)
    assert error_of(entry)["exception_type"].endswith("OutputOutside"), entry["status"]
    assert not list(server.base.rglob("escaped*"))
    say("a file name that leaves the folder is refused")

    apply_id = next(key for key, node in prompt.items() if node["class_type"] == "ZImageI2L_Apply")
    apply |= {"model": ["90", 0], "strength": 2.0, "precision": "auto"}
    save["filename"] = "portraits/style"
    prompt["90"] = {"class_type": "Check_TinyZImage", "inputs": {}}
    compared = {"model": ["90", 0], "patched": [apply_id, 0], "lora_data": [apply_id, 1]}
    prompt["91"] = {"class_type": "Check_WeightChanges", "inputs": compared}
    modules, worst, untouched = finished(server.run(prompt))["outputs"]["91"]["text"]
    assert modules == "28", modules
    assert float(worst) < 1e-5, worst  # float32 on both sides: only rounding differs
    assert untouched == "True"
    assert (loras / "portraits" / "style.safetensors").is_file()
    say(f"patched_model: {modules} of 28 modules changed by B @ A within {float(worst):.0e}, the model itself by nothing")


def finished(entry: Json) -> Json:
    """The history entry, if the prompt succeeded."""
    assert entry["status"]["status_str"] == "success", json.dumps(entry["status"], indent=1)
    return entry


def error_of(entry: Json) -> Json:
    """What ComfyUI says of a failed prompt."""
    return next(values for name, values in entry["status"]["messages"] if name == "execution_error")


def say(line: str) -> None:
    sys.stdout.write(f"ok  {line}\n")
    sys.stdout.flush()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("comfyui", type=Path, help="folder of ComfyUI's main.py")
    parser.add_argument("--python", default=sys.executable, help="the Python that ComfyUI runs in")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="i2l-comfyui-") as folder:
        base = Path(folder).resolve()
        prepare(base)
        with comfyui(arguments.comfyui, arguments.python, base) as server:
            version = server.get("/system_stats")["system"]["comfyui_version"]
            say(f"ComfyUI {version} started with the pack")
            check(server)
            assert not server.logged("Cannot import /" + str(base / "custom_nodes").lstrip("/"))


if __name__ == "__main__":
    main()
