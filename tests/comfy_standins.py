"""The parts of ComfyUI that the nodes touch, as small as they can be: tests/real_comfyui.py runs the real ones."""

import os
import sys
import weakref
from collections.abc import Callable
from enum import Enum
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import torch


class InterruptProcessingException(Exception):
    """ComfyUI's own exception of this name."""


class ModelPatcher:
    """Of a diffusion model: ``modules`` are its linears by name, ``patches`` what lies on them."""

    def __init__(self, model: Any, load_device: object = None, offload_device: object = None) -> None:
        self.model = model
        self.devices = (load_device, offload_device)
        self.patches: dict[str, list[tuple[float, torch.Tensor, torch.Tensor]]] = {}
        self._callbacks: list[Callable[..., None]] = []

    def clone(self) -> "ModelPatcher":
        copy = ModelPatcher(self.model, *self.devices)
        copy.patches = {key: list(values) for key, values in self.patches.items()}
        return copy

    def add_callback(self, kind: str, callback: Callable[..., None]) -> None:
        assert kind == "on_detach"
        self._callbacks.append(callback)

    def detach(self, unpatch_all: bool = True) -> None:
        for callback in self._callbacks:
            callback(self, unpatch_all)


class Host:
    """A ComfyUI over a base folder, and what the nodes did to it."""

    def __init__(self, base: Path) -> None:
        self.base = base
        self.folders: dict[str, tuple[list[str], set[str]]] = {}
        self.progress: list[tuple[int, int]] = []
        self.interrupt_at: int | None = None
        """Interrupt once the bar has moved so often."""
        self.loaded: list[weakref.ref[ModelPatcher]] = []
        self.asked: list[int] = []
        """Bytes that it was to free; 0: what torch keeps."""
        self.client_id: str | None = "a browser"
        self.nodes: dict[str, Any] = {}
        """Every class of nodes that it knows."""
        self.texts: list[str] = []
        """What the running node showed, one after the other."""

    def unload_all_models(self) -> None:
        """Like ComfyUI's: it goes through a list of weak references, and none may die on the way."""
        for reference in self.loaded:
            patcher = reference()
            assert patcher is not None
            patcher.detach(unpatch_all=True)
            assert reference() is not None
        self.loaded.clear()

    def send_progress_text(self, text: str, node_id: str, sid: str | None = None) -> None:
        assert (node_id, sid) == ("7", self.client_id)
        self.texts.append(text)

    def install(self) -> dict[str, ModuleType]:
        """Every stand-in by the name under which the nodes import it."""
        names = ("folder_paths", "comfy", "nodes", "server", "comfy_execution", "comfy_execution.utils")
        modules = {name: ModuleType(name) for name in names}
        for name in ("hooks", "lora", "utils", "model_management", "model_patcher", "patcher_extension", "sd"):
            modules[f"comfy.{name}"] = ModuleType(f"comfy.{name}")
            setattr(modules["comfy"], name, modules[f"comfy.{name}"])
        vars(modules["folder_paths"]).update(
            models_dir=str(self.base / "models"),
            folder_names_and_paths=self.folders,
            add_model_folder_path=self._add_folder,
            get_folder_paths=lambda kind: list(self.folders[kind][0]),
            get_filename_list=self._names,
            get_full_path=self._full_path,
            get_output_directory=lambda: str(self.base / "output"),
            get_input_directory=lambda: str(self.base / "input"),
            get_annotated_filepath=self._input_path,
            exists_annotated_filepath=lambda name: Path(self._input_path(name)).exists(),
            get_user_directory=lambda: str(self.base / "user"),
            get_temp_directory=lambda: str(self.base / "temp"),
            get_save_image_path=self._save_path,
        )
        host = self

        class ProgressBar:
            def __init__(self, total: int) -> None:
                self.total = total

            def update_absolute(self, value: int, total: int) -> None:
                host.progress.append((value, total))

        vars(modules["comfy.utils"]).update(ProgressBar=ProgressBar)
        vars(modules["comfy.model_management"]).update(
            InterruptProcessingException=InterruptProcessingException,
            throw_exception_if_processing_interrupted=self._throw,
            intermediate_device=lambda: torch.device("cpu"),
            get_torch_device=lambda: torch.device("cpu"),
            unet_offload_device=lambda: torch.device("cpu"),
            free_memory=lambda nbytes, _: self.asked.append(nbytes),
            soft_empty_cache=lambda: self.asked.append(0),
            load_models_gpu=lambda models: self.loaded.extend(map(weakref.ref, models)),
        )
        vars(modules["comfy.model_patcher"]).update(ModelPatcher=ModelPatcher)
        vars(modules["comfy.patcher_extension"]).update(CallbacksMP=type("CallbacksMP", (), {"ON_DETACH": "on_detach"}))
        vars(modules["comfy.sd"]).update(load_lora_for_models=load_lora_for_models)
        vars(modules["comfy.hooks"]).update(create_hook_lora=Hooks, EnumWeightTarget=EnumWeightTarget)
        vars(modules["comfy.lora"]).update(
            model_lora_keys_unet=lambda model, keys: {**keys, **dict.fromkeys(model)}, load_lora=load_lora
        )
        vars(modules["server"]).update(PromptServer=type("PromptServer", (), {"instance": self}))
        vars(modules["nodes"]).update(NODE_CLASS_MAPPINGS=self.nodes)
        running = SimpleNamespace(node_id="7")
        vars(modules["comfy_execution.utils"]).update(get_executing_context=lambda: running)
        sys.modules.update(modules)
        return modules

    def _throw(self) -> None:
        if self.interrupt_at is not None and len(self.progress) >= self.interrupt_at:
            self.interrupt_at = None  # ComfyUI takes its flag back, too
            raise InterruptProcessingException

    def _add_folder(self, kind: str, path: str, is_default: bool = False) -> None:
        paths, _ = self.folders.setdefault(kind, ([], set()))
        if path not in paths:
            paths.insert(0 if is_default else len(paths), path)

    def _names(self, kind: str) -> list[str]:
        paths, extensions = self.folders[kind]
        found = set()
        for root in paths:
            for folder, _, files in os.walk(root, followlinks=True):
                found |= {(Path(folder) / file).relative_to(root) for file in files}
        return sorted(str(file) for file in found if not extensions or file.suffix in extensions)

    def _full_path(self, kind: str, name: str) -> str | None:
        paths = (Path(path) / name for path in self.folders[kind][0])
        return next((str(path) for path in paths if path.is_file()), None)

    def _input_path(self, name: str) -> str:
        folder = "temp" if name.endswith(" [temp]") else "input"
        path = (self.base / folder / name.removesuffix(" [temp]")).resolve()
        if not path.is_relative_to(self.base / folder):
            raise ValueError(name)
        return str(path)

    @staticmethod
    def _save_path(prefix: str, folder: str) -> tuple[str, str, int, str, str]:
        path = Path(folder, prefix.replace("%year%", "2026"))
        assert path.resolve().is_relative_to(Path(folder).resolve())
        path.parent.mkdir(parents=True, exist_ok=True)
        return str(path.parent), path.name, 1, "", prefix


class EnumWeightTarget(Enum):
    """ComfyUI's own of this name."""

    Model = "model"
    Clip = "clip"


class Hooks:
    """Of a group of hooks with one for a LoRA: what it holds, and how it is asked whether it acts on a model."""

    def __init__(self, lora: dict[str, torch.Tensor], strength_model: float, strength_clip: float) -> None:
        self.weights, self.strengths = lora, (strength_model, strength_clip)
        self.hooks = [self]
        self.custom_should_register: Callable[..., bool] = lambda *_: True

    def add_hook_patches(self, model: ModelPatcher, target: EnumWeightTarget) -> bool:
        return self.custom_should_register(self, model, {}, {"target": target}, self)


def load_lora(lora: dict[str, torch.Tensor], keys: dict[str, object], *, log_missing: bool) -> dict[str, object]:
    """The modules of a LoRA that a model has; silent about the others."""
    assert not log_missing
    modules = {key.removeprefix("diffusion_model.").split(".lora_")[0] for key in lora}
    return {module: lora for module in modules if module in keys}


def load_lora_for_models(
    model: ModelPatcher, clip: None, lora: dict[str, torch.Tensor], strength_model: float, strength_clip: float
) -> tuple[ModelPatcher, None]:
    """Puts the modules that the model has on a clone; the others are only logged by the real one."""
    assert clip is None
    assert not strength_clip
    patched = model.clone()
    for key, down in lora.items():
        module = key.removeprefix("diffusion_model.").removesuffix(".lora_A.weight")
        if key == f"diffusion_model.{module}.lora_A.weight" and module in model.model:
            up = lora[f"diffusion_model.{module}.lora_B.weight"]
            patched.patches.setdefault(module, []).append((strength_model, down, up))
    return patched, None
