"""Run the nodes in a real, headless ComfyUI: python tests/real_comfyui.py COMFYUI_FOLDER [--python COMFYUIS_PYTHON].

Everything goes to a folder of its own (ComfyUI's --base-directory): tiny checkpoints, a link to this pack, input and
output. The ComfyUI folder is not changed. docs/comfyui.md says what that ComfyUI needs installed.
"""

import argparse
import json
import shutil
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.error import HTTPError, URLError

from PIL import Image

from i2l.export.checkpoints.synthetic import make_checkpoints
from i2l.lora.reading import describe_lora

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


@dataclass
class Session:
    """A server and the factory prompt, which the checks change and run."""

    server: Server
    info: Json
    prompt: Json

    @property
    def loras(self) -> Path:
        return self.server.base / "output" / "loras"

    def id_of(self, node: str) -> str:
        return next(key for key, values in self.prompt.items() if values["class_type"] == f"ZImageI2L_{node}")

    def inputs(self, node: str) -> Json:
        inputs: Json = self.prompt[self.id_of(node)]["inputs"]
        return inputs

    def built_and_opened(self) -> tuple[int, int]:
        return self.server.logged("building them in"), self.server.logged("i2l: opened")


def check_contracts(session: Session) -> None:
    info = session.info
    assert info["ZImageI2L_Apply"]["input_order"]["required"] == ["z_image_file_path", "images", "strength"]
    assert info["ZImageI2L_Apply"]["output"] == ["MODEL", "lora_weights"]
    assert info["ZImageI2L_PipelineLoader"]["output"] == ["ZI2L_FILE"]
    assert info["ZImageI2L_Save"]["output_node"]
    names = info["ZImageI2L_PipelineLoader"]["input"]["required"]["model_filename"][0]
    assert names == ["Z-Image-i2L.safetensors", "other.safetensors"], names
    say("/object_info has the three nodes; adapters of models/I2L and of extra_model_paths.yaml are listed")


def check_workflows(session: Session) -> None:
    server = session.server
    assert {"factory", "instant_apply"} <= set(server.get("/workflow_templates")["i2l"])
    for name in ("factory", "instant_apply"):
        for extension in ("json", "jpg"):
            url = f"{server.url}/api/workflow_templates/i2l/{name}.{extension}"
            with urllib.request.urlopen(url, timeout=60) as answer:
                assert answer.status == 200
        prompt_from_workflow(example(name), session.info)  # KeyError: a node that this ComfyUI has not
    say("both example workflows and their thumbnails are served, and every node of them exists")


def check_runs(session: Session) -> None:
    server = session.server
    finished(server.run(session.prompt))
    facts = describe_lora(session.loras / "z_image_style_lora.safetensors")
    assert (facts["modules"], facts["rank"], facts["key_format"]) == (28, 8, "comfyui"), facts
    assert session.built_and_opened() == (1, 1)
    say("the factory workflow built engines and wrote a LoRA of 28 modules, rank 8, to output/loras")
    session.inputs("Apply")["strength"] = 0.5
    finished(server.run(session.prompt))
    assert (session.loras / "z_image_style_lora_00002.safetensors").is_file()
    assert session.built_and_opened() == (1, 1)
    say("a second run built nothing, opened nothing, and took a new file name")
    lists = server.get("/object_info/LoraLoader")["LoraLoader"]["input"]["required"]["lora_name"][0]
    assert "z_image_style_lora.safetensors" in lists
    say("Load LoRA lists the file")


def check_saved_widgets(session: Session) -> None:
    for values in ([0.7], [0.7, True], [0.7, True, False]):
        workflow = example("factory")
        next(n for n in workflow["nodes"] if n["type"] == "ZImageI2L_Apply")["widgets_values"] = values
        finished(session.server.run(prompt_from_workflow(workflow, session.info)))
    bare = prompt_from_workflow(example("factory"), session.info)
    apply = bare[session.id_of("Apply")]["inputs"]
    bare[session.id_of("Apply")]["inputs"] = {name: apply[name] for name in ("z_image_file_path", "images", "strength")}
    finished(session.server.run(bare))
    say("saved widget values of one, two and three entries run, and so does a prompt with the required inputs only")


def check_memory(session: Session) -> None:
    server = session.server
    server.post("/free", {"unload_models": True, "free_memory": True})
    server.wait(lambda: server.logged("i2l: closed") == server.logged("i2l: opened"))
    opened = server.logged("i2l: opened")
    session.inputs("Apply")["strength"] = 0.6
    finished(server.run(session.prompt))
    assert server.logged("i2l: opened") == opened + 1
    say("freeing memory closed the pipeline, and the next run opened it again")


def check_interrupt(session: Session) -> None:
    server = session.server
    session.inputs("Apply").update(strength=0.9, precision="fp32")
    before = len(list(session.loras.rglob("*.safetensors")))
    entry = server.run(session.prompt, meanwhile=lambda: server.post("/interrupt", {}))
    messages = dict(entry["status"]["messages"])
    assert messages["execution_interrupted"]["node_type"] == "ZImageI2L_Apply", entry["status"]
    assert len(list(session.loras.rglob("*.safetensors"))) == before
    finished(server.run(session.prompt))
    assert len(list(session.loras.rglob("*.safetensors"))) == before + 1
    session.inputs("Apply").update(precision="auto")
    say("an interrupt stopped the run in Apply and wrote nothing; the same prompt then ran to its end")


def check_escape(session: Session) -> None:
    session.inputs("Save")["filename"] = "../../escaped"
    entry = session.server.run(session.prompt)
    error = next(values for name, values in entry["status"]["messages"] if name == "execution_error")
    assert error["exception_type"].endswith("OutputOutside"), error
    assert not list(session.server.base.rglob("escaped*"))
    session.inputs("Save")["filename"] = "portraits/style"
    say("a file name that leaves the folder is refused")


def check_patched_model(session: Session) -> None:
    if "Check_TinyZImage" not in session.info:
        say("skipped: this ComfyUI knows no Z-Image, so patched_model was not checked")
        return
    session.inputs("Apply").update(model=["90", 0], strength=2.0)
    apply = session.id_of("Apply")
    compared = {"model": ["90", 0], "patched": [apply, 0], "lora_data": [apply, 1]}
    session.prompt |= {
        "90": {"class_type": "Check_TinyZImage", "inputs": {}},
        "91": {"class_type": "Check_WeightChanges", "inputs": compared},
    }
    modules, worst, untouched = finished(session.server.run(session.prompt))["outputs"]["91"]["text"]
    assert modules == "28", modules
    assert float(worst) < 1e-5, worst  # float32 on both sides: only rounding differs
    assert untouched == "True"
    assert (session.loras / "portraits" / "style.safetensors").is_file()
    say(f"patched_model: {modules} of 28 modules changed by B @ A within {float(worst):.0e}, the model not at all")


def example(name: str) -> Json:
    """An example workflow."""
    workflow: Json = json.loads((PACK / "example_workflows" / f"{name}.json").read_text(encoding="utf-8"))
    return workflow


def finished(entry: Json) -> Json:
    """The history entry, if the prompt succeeded."""
    assert entry["status"]["status_str"] == "success", json.dumps(entry["status"], indent=1)
    return entry


def say(line: str) -> None:
    sys.stdout.write(f"ok  {line}\n")
    sys.stdout.flush()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("comfyui", type=Path, help="folder of ComfyUI's main.py")
    parser.add_argument("--python", default=sys.executable, help="the Python that ComfyUI runs in")
    arguments = parser.parse_args()
    python = shutil.which(arguments.python)  # absolute, as ComfyUI starts in its own folder
    if python is None:
        parser.error(f"{arguments.python} is no program")
    with tempfile.TemporaryDirectory(prefix="i2l-comfyui-") as folder:
        base = Path(folder).resolve()
        prepare(base)
        with comfyui(arguments.comfyui, str(Path(python).absolute()), base) as server:
            version = server.get("/system_stats")["system"]["comfyui_version"]
            say(f"ComfyUI {version} started with the pack")
            info = server.get("/object_info")
            session = Session(server, info, prompt_from_workflow(example("factory"), info))
            check_contracts(session)
            check_workflows(session)
            check_runs(session)
            check_saved_widgets(session)
            check_memory(session)
            check_interrupt(session)
            check_escape(session)
            check_patched_model(session)


if __name__ == "__main__":
    main()
