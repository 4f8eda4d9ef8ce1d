"""What is checked of the nodes through ComfyUI's HTTP interface; each check says what it saw."""

import urllib.request
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import quote

from safetensors import safe_open

from comfyui.server import (
    EXAMPLES,
    Json,
    Server,
    error_of,
    example,
    finished,
    prompt_from_workflow,
    say,
)
from i2l.lora.reading import describe_lora
from i2l.runtime.pictures.images import load_image
from i2l.runtime.pictures.pixels import content_sha256

CORE_ONLY = {"UNETLoader": "Check_TinyZImage", "CLIPTextEncode": "Check_Prompt", "KSampler": "Check_Branches"}
"""Nodes that need weights nobody has here, and what stands for them; all others of an example run as they are."""


@dataclass
class Session:
    """A server and the first example's prompt, which the checks change and run."""

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


def check_api(session: Session) -> None:
    """All of them, in an order that saves building engines."""
    for check in (
        check_contracts,
        check_workflows,
        check_runs,
        check_saved_widgets,
        check_pictures,
        check_memory,
        check_interrupt,
        check_refusals,
        check_patched_model,
        check_branches,
    ):
        check(session)


def check_contracts(session: Session) -> None:
    info = session.info
    assert info["ZImageI2L_Apply"]["input_order"]["required"] == ["z_image_file_path", "images", "strength"]
    assert info["ZImageI2L_Apply"]["output"] == ["MODEL", "lora_weights", "HOOKS"]
    assert info["ZImageI2L_PipelineLoader"]["output"] == ["ZI2L_FILE"]
    assert info["ZImageI2L_Save"]["output_node"]
    assert info["ZImageI2L_LoadPicture"]["input"]["required"]["image"][0] == ["adobe.heic", "adobe.jpg", "example.png"]
    names = info["ZImageI2L_PipelineLoader"]["input"]["required"]["model_filename"][0]
    assert names == ["Z-Image-i2L.safetensors", "deep.safetensors", "my_lora.safetensors", "other.safetensors"], names
    say("/object_info has the four nodes; adapters of models/I2L and of extra_model_paths.yaml are listed")


def check_workflows(session: Session) -> None:
    server = session.server
    assert set(EXAMPLES) <= set(server.get("/workflow_templates")["i2l"])
    for name in EXAMPLES:
        for extension in ("json", "jpg"):
            url = f"{server.url}/api/workflow_templates/i2l/{quote(name)}.{extension}"
            with urllib.request.urlopen(url, timeout=60) as answer:
                assert answer.status == 200
        prompt_from_workflow(example(name), session.info)  # KeyError: a node that this ComfyUI has not
    types = {node["type"] for name in EXAMPLES for node in example(name)["nodes"]} & session.info.keys()
    assert [name for name in types if session.info[name].get("deprecated")] == []
    say(f"the {len(EXAMPLES)} examples and their thumbnails are served; every node of them exists, none is deprecated")


def check_runs(session: Session) -> None:
    server = session.server
    outputs = finished(server.run(session.prompt))["outputs"]
    facts = describe_lora(session.loras / "z_image_style_lora.safetensors")
    assert (facts["modules"], facts["rank"], facts["key_format"]) == (28, 8, "comfyui"), facts
    assert session.built_and_opened() == (1, 1)
    say("the first example built engines and wrote a LoRA of 28 modules, rank 8, to output/loras")
    (picture,) = outputs[session.id_of("Save")]["images"]
    with urllib.request.urlopen(f"{server.url}/view?type=temp&filename={picture['filename']}", timeout=60) as answer:
        assert answer.read(8) == b"\x89PNG\r\n\x1a\n"
    say("Save gave the frontend a heat map")
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
        workflow = example(EXAMPLES[0])
        next(n for n in workflow["nodes"] if n["type"] == "ZImageI2L_Apply")["widgets_values"] = values
        finished(session.server.run(prompt_from_workflow(workflow, session.info)))
    bare = prompt_from_workflow(example(EXAMPLES[0]), session.info)
    apply = bare[session.id_of("Apply")]["inputs"]
    bare[session.id_of("Apply")]["inputs"] = {name: apply[name] for name in ("z_image_file_path", "images", "strength")}
    finished(session.server.run(bare))
    say("saved widget values of one, two and three entries run, and so does a prompt with the required inputs only")


def check_pictures(session: Session) -> None:
    """Load Picture through Batch Images: the very picture that ``i2l run`` sees, and what became of its profile."""
    batch = next(key for key, values in session.prompt.items() if values["class_type"] == "BatchImagesNode")
    load = "ZImageI2L_LoadPicture"
    adobe = {name: session.server.base / "input" / name for name in ("adobe.heic", "adobe.jpg")}
    for number, (second, ignore_icc, said) in enumerate(
        (
            (load, False, "converted to sRGB"),
            (load, True, "ignored"),
            ("LoadImage", False, "converted to sRGB in some pictures, ignored in others"),
        )
    ):
        prompt = deepcopy(session.prompt)
        prompt |= {
            "80": {"class_type": load, "inputs": {"image": "adobe.jpg", "ignore_icc": ignore_icc}},
            "81": {"class_type": second, "inputs": {"image": "adobe.heic", "ignore_icc": ignore_icc}},
        }
        if second == "LoadImage":
            prompt["81"]["inputs"] = {"image": "example.png"}
        prompt[batch]["inputs"] = {"images.image0": ["80", 0], "images.image1": ["81", 0]}
        prompt[session.id_of("Save")]["inputs"]["filename"] = f"pictures/{number}"
        finished(session.server.run(prompt))
        found = metadata_of(session.loras / "pictures" / f"{number}.safetensors")
        assert found["i2l.icc"] == said, found
        hashes = [
            content_sha256(load_image(adobe[name], ignore_icc=ignore_icc)) for name in ("adobe.jpg", "adobe.heic")
        ]
        assert found["i2l.images"].split(",")[: 2 if second == load else 1] == hashes[: 2 if second == load else 1]
    say("Load Picture: JPEG and HEIC in Adobe RGB as i2l run sees them; i2l.icc says what became of profiles")


def metadata_of(path: Path) -> dict[str, str]:
    """Of a LoRA file."""
    with safe_open(path, "np") as file:
        found: dict[str, str] = file.metadata()
        return found


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


def check_refusals(session: Session) -> None:
    session.inputs("Save")["filename"] = "../../escaped"
    error = error_of(session.server.run(session.prompt))
    assert error["exception_type"] == "i2l.errors.OutputOutside", error
    assert not list(session.server.base.rglob("escaped*"))
    session.inputs("Save")["filename"] = "portraits/style"
    say("a file name that leaves the folder is refused; errors are called i2l.errors.NAME, not by a path")
    session.inputs("PipelineLoader")["model_filename"] = "my_lora.safetensors"
    message = error_of(session.server.run(session.prompt))["exception_message"]
    assert "my_lora.safetensors in " in message, message
    assert " is a LoRA, not Z-Image-i2L: choose another file in Z-Image i2L Loader" in message, message
    session.inputs("PipelineLoader")["model_filename"] = "Z-Image-i2L.safetensors"
    say("a LoRA among the adapters is named for what it is")


def check_patched_model(session: Session) -> None:
    if "Check_TinyZImage" not in session.info:
        say("skipped: this ComfyUI knows no Z-Image, so patched_model was not checked")
        return
    session.inputs("Apply").update(model=["90", 0], strength=2.0)
    apply = session.id_of("Apply")
    compared = {"model": ["90", 0], "patched": [apply, 0], "lora_data": [apply, 1]}
    session.prompt |= {
        "90": {"class_type": "Check_TinyZImage", "inputs": {"whole_depth": False}},
        "91": {"class_type": "Check_WeightChanges", "inputs": compared},
    }
    modules, worst, untouched = finished(session.server.run(session.prompt))["outputs"]["91"]["text"]
    assert modules == "28", modules
    assert float(worst) < 1e-5, worst  # float32 on both sides: only rounding differs
    assert untouched == "True"
    assert (session.loras / "portraits" / "style.safetensors").is_file()
    say(f"patched_model: {modules} of 28 modules changed by B @ A within {float(worst):.0e}, the model not at all")


def check_branches(session: Session) -> None:
    """Which branch has the LoRA in the two examples that draw, and that no part of it is lost in silence."""
    if "Check_TinyZImage" not in session.info:
        say("skipped: this ComfyUI knows no Z-Image, so the branches were not checked")
        return
    for name, wanted in ((EXAMPLES[1], ("238", "238")), (EXAMPLES[2], ("238", "0"))):
        prompt, sampler = drawing_prompt(session, name)
        positive, negative, restored = finished(session.server.run(prompt))["outputs"][sampler]["text"]
        assert (positive, negative) == wanted, (name, positive, negative)
        assert restored == "True"
        say(f"{name}: the LoRA changed {positive} of 238 modules on the positive, {negative} on the negative branch")
    prompt, _ = drawing_prompt(session, EXAMPLES[2], whole_depth=False)
    error = error_of(session.server.run(prompt))
    assert error["node_type"] == "Check_Branches", error
    assert "only 28 of the LoRA's 238 modules fit the model" in error["exception_message"], error
    say("positive_hooks on a model with 28 of the LoRA's 238 modules: an error when the sampler begins")


def drawing_prompt(session: Session, name: str, *, whole_depth: bool = True) -> tuple[Json, str]:
    """An example that draws, with stand-ins for what needs weights; and the id of its sampler."""
    prompt = prompt_from_workflow(example(name), session.info)
    for node in [key for key, values in prompt.items() if values["class_type"] in {"CLIPLoader", "VAELoader"}]:
        del prompt[node]
    for node in [key for key, values in prompt.items() if values["class_type"] in {"VAEDecode", "SaveImage"}]:
        del prompt[node]
    for values in prompt.values():
        if values["class_type"] == "ZImageI2L_PipelineLoader":
            values["inputs"]["model_filename"] = "deep.safetensors"
        values["class_type"] = CORE_ONLY.get(values["class_type"], values["class_type"])
    for values in prompt.values():
        if values["class_type"] == "Check_TinyZImage":
            values["inputs"] = {"whole_depth": whole_depth}
        elif values["class_type"] == "Check_Prompt":
            values["inputs"] = {"text": values["inputs"]["text"]}
    sampler = next(key for key, values in prompt.items() if values["class_type"] == "Check_Branches")
    apply = next(key for key, values in prompt.items() if values["class_type"] == "ZImageI2L_Apply")
    kept = {socket: prompt[sampler]["inputs"][socket] for socket in ("model", "positive", "negative", "cfg")}
    prompt[sampler]["inputs"] = {**kept, "lora_data": [apply, 1]}
    return prompt, sampler
