"""A real ComfyUI, started and asked through its HTTP interface; and what checks of it have in common."""

import json
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.error import HTTPError, URLError

PACK = Path(__file__).absolute().parents[2]
EXAMPLES = ("Pictures to a LoRA file", "Draw in the style of pictures", "Style on the positive prompt only")
WIDGETS = {"INT", "FLOAT", "STRING", "BOOLEAN", "COMBO"}
Json = dict[str, Any]


def prompt_from_workflow(workflow: Json, object_info: Json) -> Json:
    """A saved workflow as a prompt of the API, with the widgets' values taken by position as the frontend does it."""
    sources = {link[0]: [str(link[1]), link[2]] for link in workflow["links"]}
    prompt: Json = {}
    for node in workflow["nodes"]:
        if node["type"] in {"MarkdownNote", "Note"}:
            continue
        values = list(node["widgets_values"])
        inputs: Json = {}
        described = object_info[node["type"]]["input"]
        for name, (kind, *rest) in {**described.get("required", {}), **described.get("optional", {})}.items():
            options = rest[0] if rest else {}
            if isinstance(kind, list) or kind in WIDGETS:
                inputs[name] = values.pop(0) if values else options["default"]
                if options.get("control_after_generate"):
                    values.pop(0)
        # a node that grows has sockets which its description does not list one by one
        inputs |= {slot["name"]: sources[slot["link"]] for slot in node["inputs"] if slot["link"] is not None}
        prompt[str(node["id"])] = {"class_type": node["type"], "inputs": inputs}
    return prompt


class Server:
    """A running ComfyUI."""

    def __init__(self, base: Path, url: str, log: Path, process: subprocess.Popen[bytes]) -> None:
        self.base, self.url, self._log, self._process = base, url, log, process

    def get(self, path: str) -> Any:
        with urllib.request.urlopen(self.url + path, timeout=60) as answer:
            return json.load(answer)

    def post(self, path: str, values: object) -> Any:
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
def running_server(folder: Path, python: str, base: Path) -> Iterator[Server]:
    """Start ComfyUI on the CPU and a free port; end it afterwards."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    log = base / "comfyui.log"
    options = ["--cpu", "--listen", "127.0.0.1", "--port", str(port), "--base-directory", str(base)]
    options += ["--extra-model-paths-config", str(base / "extra.yaml"), "--disable-auto-launch"]
    options += ["--database-url", "sqlite:///:memory:"]
    with log.open("wb") as out:
        process = subprocess.Popen([python, "main.py", *options], cwd=folder, stdout=out, stderr=subprocess.STDOUT)
        server = Server(base, f"http://127.0.0.1:{port}", log, process)
        try:
            server.wait(server.answers, 300)
            yield server
        finally:
            process.terminate()
            process.wait(30)


def example(name: str) -> Json:
    """An example workflow."""
    workflow: Json = json.loads((PACK / "example_workflows" / f"{name}.json").read_text(encoding="utf-8"))
    return workflow


def finished(entry: Json) -> Json:
    """The history entry, if the prompt succeeded."""
    if entry["status"]["status_str"] != "success":
        error = error_of(entry)
        raise AssertionError(f"{error['node_type']}: {error['exception_message']}\n{''.join(error['traceback'])}")
    return entry


def error_of(entry: Json) -> Json:
    """What went wrong in a prompt that did not succeed."""
    errors: list[Json] = [values for name, values in entry["status"]["messages"] if name == "execution_error"]
    assert errors, entry["status"]["status_str"]
    return errors[0]


def say(line: str) -> None:
    sys.stdout.write(f"ok  {line}\n")
    sys.stdout.flush()
