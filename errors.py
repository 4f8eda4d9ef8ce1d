"""Every failure that i2l can explain, as one tree.

A leaf takes the facts and owns its sentence: what is wrong, then the next command or change that mends it.
The command line prints that sentence after ``error:`` and exits with 1; the Python API raises it. Each leaf also
inherits the built-in exception that a Python programmer would catch.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path

from .specs import DiffusionModel, Family

GIB = 1 << 30


def format_bytes(count: int) -> str:
    """Bytes as people read them: ``512 B``, ``3.1 MiB``, ``6.7 GiB``."""
    if count < 1 << 10:
        return f"{count} B"
    for unit, size in (("KiB", 1 << 10), ("MiB", 1 << 20)):
        if count < size << 10:
            return f"{count / size:.1f} {unit}"
    return f"{count / GIB:.2f} GiB"


def format_path(path: Path) -> str:
    """A path with the home directory written as ``~``."""
    try:
        return f"~/{path.relative_to(Path.home())}"
    except (ValueError, RuntimeError):
        return str(path)


def some(items: Sequence[str], shown: int = 8) -> str:
    """The first few of many things, and how many there are besides."""
    more = f" and {len(items) - shown} more" if len(items) > shown else ""
    return f"{', '.join(items[:shown])}{more}"


class I2LError(Exception):
    """Base of every error that i2l raises on purpose."""


# --- checkpoints ------------------------------------------------------------------------------------------------


class CheckpointError(I2LError):
    """A checkpoint cannot be used."""

    family: Family | None = None
    """Which model the file looks like, where that can be told."""


class CheckpointMissing(CheckpointError, FileNotFoundError):
    """No file under the models directory is one of the wanted models; files that may have been are named."""

    def __init__(self, families: Sequence[str], models: Path, damaged: Sequence[CheckpointError] = ()) -> None:
        files = "".join(f"{error}; " for error in damaged)
        super().__init__(
            f"{files}no checkpoint for {' and '.join(families)} under {format_path(models)}: download it there "
            "(README, 'Real checkpoints'), or try synthetic ones with: "
            f"i2l make-checkpoints {format_path(models)} --preset tiny"
        )


class CheckpointUnreadable(CheckpointError, ValueError):
    """The file is not a whole safetensors file."""

    def __init__(self, path: Path, reason: str, family: Family | None = None) -> None:
        self.family = family
        super().__init__(f"{format_path(path)} is not a whole safetensors file ({reason}): download it again")


class CheckpointForeign(CheckpointError, ValueError):
    """The file's tensors belong to no model that i2l knows."""

    def __init__(self, path: Path, tensors: int) -> None:
        super().__init__(
            f"{format_path(path)} holds {tensors} tensors of a model that i2l does not know: it needs SigLIP2-G384, "
            "DINOv3-7B and Z-Image-i2L (README, 'Real checkpoints')"
        )


class CheckpointMismatch(CheckpointError, ValueError):
    """The file is nearly a known model, but some tensors are missing, unexpected or misshapen."""

    def __init__(
        self,
        path: Path,
        family: Family,
        missing: Sequence[str],
        unexpected: Sequence[str],
        misshapen: Mapping[str, tuple[tuple[int, ...], tuple[int, ...]]],
        wrong_dtype: Mapping[str, str],
    ) -> None:
        self.family = family
        differences = {
            "missing": missing,
            "unexpected": unexpected,
            "misshapen": [f"{k} is {list(found)}, not {list(wanted)}" for k, (found, wanted) in misshapen.items()],
            "neither F32, F16 nor BF16": [f"{name} is {dtype}" for name, dtype in wrong_dtype.items()],
        }
        parts = (f"{what}: {some(items)}" for what, items in differences.items() if items)
        super().__init__(f"{format_path(path)} looks like {family}, but {'; '.join(parts)}: download it again")


class CheckpointPrefixed(CheckpointError, ValueError):
    """A known model whose tensors have longer names, as when it was saved from inside another one."""

    def __init__(self, path: Path, family: Family, prefix: str) -> None:
        self.family = family
        super().__init__(
            f"{format_path(path)} looks like {family}, but the names of its tensors begin with {prefix}: give the "
            "published file (README, 'Real checkpoints')"
        )


class CheckpointAmbiguous(CheckpointError, ValueError):
    """Two files under the models directory hold the same model with different specs."""

    def __init__(self, family: str, paths: Sequence[Path]) -> None:
        super().__init__(
            f"{len(paths)} checkpoints are {family}: {', '.join(format_path(p) for p in paths)}: keep one of them "
            "under the models directory"
        )


class CheckpointsUnfit(CheckpointError, ValueError):
    """The adapter was made for other encoders."""

    def __init__(self, adapter: Path, embedding: int, siglip2: int, dinov3: int) -> None:
        super().__init__(
            f"{format_path(adapter)} takes embeddings of {embedding} values, but siglip2 and dinov3 give {siglip2} + "
            f"{dinov3} = {siglip2 + dinov3}: put three checkpoints that belong together under the models directory"
        )


class AdapterAmbiguous(CheckpointError, ValueError):
    """The adapters of several diffusion models lie under the models directory."""

    def __init__(self, paths: Mapping[DiffusionModel, Path]) -> None:
        listed = ", ".join(f"{format_path(path)} (for {model})" for model, path in paths.items())
        super().__init__(
            f"there are adapters for several diffusion models: {listed}: choose one with --adapter "
            f"{next(iter(paths))}; each needs an engines directory of its own"
        )


# --- engines ----------------------------------------------------------------------------------------------------


class EnginesError(I2LError):
    """An engines directory cannot be used."""


class EnginesMissing(EnginesError, FileNotFoundError):
    """The directory has no manifest, so it is not a finished engines directory."""

    def __init__(self, directory: Path) -> None:
        super().__init__(
            f"{format_path(directory)} has no manifest.json, so it is not a finished engines directory: build it with: "
            f"i2l build-engines --models MODELS --engines {format_path(directory)}"
        )


class ManifestInvalid(EnginesError, ValueError):
    """The manifest cannot be understood by this version."""

    def __init__(self, path: Path, reason: str) -> None:
        super().__init__(
            f"{format_path(path)} cannot be used ({reason}): rebuild with: "
            f"i2l build-engines --models MODELS --engines {format_path(path.parent)}"
        )


class EngineFileDamaged(EnginesError, ValueError):
    """A file of the engines directory is absent or differs from what the build wrote."""

    def __init__(self, path: Path, directory: Path, reason: str) -> None:
        super().__init__(
            f"{format_path(path)} is not what the build wrote ({reason}): rebuild with: "
            f"i2l build-engines --models MODELS --engines {format_path(directory)} --force"
        )


class EnginesOfOtherCheckpoints(EnginesError, ValueError):
    """The engines were built from checkpoints of another architecture."""

    def __init__(self, directory: Path, models: Path, family: str) -> None:
        super().__init__(
            f"{format_path(directory)} was built for another {family} than the one under {format_path(models)}: give "
            f"the checkpoints it was built from, or rebuild with: i2l build-engines --models {format_path(models)} "
            f"--engines {format_path(directory)}"
        )


class CpuPacksUnwritable(EnginesError, OSError):
    """FP8 engines need packs of their own for the CPU, and these cannot be written."""

    def __init__(self, directory: Path, reason: str) -> None:
        super().__init__(
            f"{format_path(directory)} holds fp8 engines, whose packs are converted once for the CPU, but nothing can "
            f"be written there ({reason}): make it writable, or build engines for the CPU elsewhere: "
            "i2l build-engines --models MODELS --engines ENGINES --precision int8"
        )


class ShapeMismatch(EnginesError, ValueError):
    """A tensor handed to an engine does not fit its graph."""

    def __init__(self, graph: str, name: str, found: str, wanted: str) -> None:
        super().__init__(f"{graph}: input {name} is {found}, but the graph takes {wanted}")


class PlanMissing(EnginesError, FileNotFoundError):
    """There is no TensorRT plan of a graph for this GPU."""

    def __init__(self, graph: str, engines: Path, flavour: str, sm: int, target: str) -> None:
        super().__init__(
            f"{format_path(engines)} has no TensorRT plan of {graph} for sm{sm}, which {flavour} wants: build it with: "
            f"{_build_plans(engines, target)}"
        )


class PlanStale(EnginesError, ValueError):
    """A TensorRT plan is not the one that is wanted."""

    def __init__(self, path: Path, parts: Sequence[str], engines: Path, target: str) -> None:
        super().__init__(
            f"{format_path(path)} cannot be used ({'; '.join(parts)}): rebuild with: {_build_plans(engines, target)}"
        )


class PlanBuildFailed(EnginesError, RuntimeError):
    """TensorRT refuses a graph."""

    def __init__(self, graph: str, flavour: str, sm: int, reasons: Sequence[str]) -> None:
        said = "; ".join(reason.strip() for reason in reasons) or "it gives no reason"
        super().__init__(
            f"{flavour} makes no plan of {graph} for sm{sm} ({said}): try another --sm or --precision, or use "
            "--backend cpu"
        )


class CudaGraphsUnusable(EnginesError):
    """The graphs of the cuda backend are absent, or not those of this build."""

    def __init__(self, engines: Path, reason: str) -> None:
        super().__init__(
            f"{format_path(engines)} has no graphs that the cuda backend can use ({reason}): make them with: "
            f"i2l build-engines --models MODELS --engines {format_path(engines)} --backend cuda"
        )


class PrecisionUnsupported(EnginesError, ValueError):
    """A generation of GPUs cannot compute in the precision of the packs."""

    def __init__(self, sm: int, precision: str, instead: str) -> None:
        super().__init__(
            f"sm{sm} cannot compute with {precision} packs: leave --precision out, or give --precision {instead}"
        )


def _build_plans(engines: Path, target: str) -> str:
    return (
        f"i2l build-engines --models MODELS --engines {format_path(engines)} --backend tensorrt --sm {target}, and "
        "--sm for every other card that shall use the directory"
    )


class PipelineClosed(EnginesError, RuntimeError):
    """A pipeline is used after it was closed."""

    def __init__(self, directory: Path) -> None:
        super().__init__(
            f"the pipeline of {format_path(directory)} is closed: open a new one with: "
            f"i2l.open_engines({str(directory)!r})"
        )


class EnginesReplaced(EnginesError, RuntimeError):
    """The CPU would have to go on with fp8 engines that a rebuild has removed."""

    def __init__(self, directory: Path, backend: str) -> None:
        super().__init__(
            f"{backend} ran out of memory, and {format_path(directory)} was rebuilt since it was opened, so the CPU "
            f"cannot go on with the same fp8 engines: open it again with: i2l.open_engines({str(directory)!r})"
        )


class BackendUnavailable(I2LError, RuntimeError):
    """The backend that was named cannot run here."""

    def __init__(self, backend: str, reason: str, remedy: str) -> None:
        super().__init__(f"backend {backend} cannot run here: {reason}: {remedy}")


class BudgetTooSmall(I2LError, MemoryError):
    """Not even the smallest plan fits the budget."""

    def __init__(self, budget_bytes: int, needed_bytes: int, memory: str = "VRAM") -> None:
        self.needed_bytes = needed_bytes
        mebibytes = -(-needed_bytes // (1 << 20))  # rounded up, so that what is printed works
        super().__init__(
            f"the {memory} budget is {format_bytes(budget_bytes)}, but these engines need at least "
            f"{format_bytes(needed_bytes)}: give --{memory.lower()}-budget {mebibytes}MiB or more"
            f"{', or use --backend cpu' if memory == 'VRAM' else ''}"
        )


class OutOfDeviceMemory(I2LError, MemoryError):
    """The device has less free memory than was asked for."""

    def __init__(self, device: str, wanted_bytes: int, free_bytes: int) -> None:
        super().__init__(
            f"{device} has no room for {format_bytes(wanted_bytes)} ({format_bytes(free_bytes)} free): close other "
            "programs that use it, give a smaller --vram-budget, or use --backend cpu"
        )


class DeviceFailed(I2LError, RuntimeError):
    """A call to the device's driver failed, and not for lack of memory."""

    def __init__(self, device: str, reason: str) -> None:
        super().__init__(f"{device}: {reason}: see what nvidia-smi says, or use --backend cpu")


class ProviderMissing(I2LError, RuntimeError):
    """This onnxruntime cannot compute on the device."""

    def __init__(self, provider: str, found: Sequence[str]) -> None:
        super().__init__(
            f"onnxruntime runs without {provider} here (it has {', '.join(found)}): put the GPU build in the place of "
            "the CPU's: pip uninstall onnxruntime && pip install 'i2l-engines[cuda]', or use --backend cpu"
        )


class PackageMissing(I2LError, ImportError):
    """An optional dependency is not installed."""

    def __init__(self, package: str, purpose: str, extra: str) -> None:
        super().__init__(f"{purpose} needs {package}, which is not installed: pip install 'i2l-engines[{extra}]'")


class NodePackIncomplete(I2LError, ImportError):
    """A package that the ComfyUI nodes need is not in ComfyUI's Python."""

    def __init__(self, package: str, requirements: Path, python: str) -> None:
        super().__init__(
            f"{package} is not installed in ComfyUI's Python: {python} -m pip install -r {format_path(requirements)}"
        )


# --- images and output ------------------------------------------------------------------------------------------


class ImageError(I2LError, ValueError):
    """An image cannot be used."""


class NoImages(ImageError):
    """Nothing to read."""

    def __init__(self) -> None:
        super().__init__("no image was given: i2l run PHOTO.jpg --engines DIR --output LORA.safetensors")


class ImageUnreadable(ImageError):
    """The file is absent, truncated or not an image."""

    def __init__(self, name: str, reason: str) -> None:
        super().__init__(f"{name} cannot be read as an image ({reason}): give a whole JPEG, PNG or WebP file")


class ImageAbsurd(ImageError):
    """The image's size makes no sense as an example picture."""

    def __init__(self, name: str, width: int, height: int, limits: str) -> None:
        super().__init__(f"{name} is {width} x {height} pixels; {limits}: resize or crop it first")


class FolderEmpty(ImageError):
    """A folder was given, but it holds no image, or no folder with images."""

    def __init__(self, folder: Path, suffixes: Sequence[str], *, per_folder: bool = False) -> None:
        lacks = "no folder with images" if per_folder else "no image"
        deeper = "give --per image for its own images" if per_folder else "folders inside it are not looked into"
        super().__init__(
            f"{format_path(folder)} holds {lacks}: put pictures there (files that end in {', '.join(suffixes)}); "
            f"{deeper}"
        )


class StrengthInvalid(I2LError, ValueError):
    """A strength or a weight is not a finite number."""

    def __init__(self, name: str, value: float) -> None:
        super().__init__(f"{name} is {value}, but it must be a finite number: give one such as 0.7")


class WeightsMismatch(I2LError, ValueError):
    """There is not one weight for each thing that is joined."""

    def __init__(self, weights: int, things: int, noun: str) -> None:
        super().__init__(
            f"{weights} weight{'s' * (weights != 1)} for {things} {noun}{'s' * (things != 1)}: give one weight for "
            "each, in the same order, or none for equal ones"
        )


class OutputUnwritable(I2LError, OSError):
    """The output file or directory cannot be written."""

    def __init__(self, path: Path, reason: str) -> None:
        super().__init__(f"cannot write {format_path(path)} ({reason}): choose another place")


class StandardOutputUnwritable(I2LError, OSError):
    """What a command prints cannot be written."""

    def __init__(self, reason: str) -> None:
        super().__init__(f"cannot write to standard output ({reason}): send it to another place")


class OutputOutside(I2LError, ValueError):
    """A file name leads out of the folder that it belongs in."""

    def __init__(self, filename: str, folder: Path) -> None:
        super().__init__(
            f"{filename!r} is no name of a file below {format_path(folder)}: give a name such as style or "
            "portraits/style, without .. and not beginning with a slash or a drive"
        )


class DiskFull(I2LError, OSError):
    """The disk has no room for what is to be written."""

    def __init__(self, path: Path, needed_bytes: int | None, free_bytes: int) -> None:
        need = f"{format_bytes(needed_bytes)} needed, " if needed_bytes is not None else ""
        super().__init__(
            f"no room on the disk of {format_path(path)} ({need}{format_bytes(free_bytes)} free): free some space or "
            "choose a directory on another disk"
        )


class LoraNotFinite(I2LError, ValueError):
    """The LoRA holds a value that the file's dtype cannot."""

    def __init__(self, tensor: str, dtype: str) -> None:
        super().__init__(
            f"{tensor} has values that are not finite or too large for {dtype}: try --dtype fp32, and if that fails "
            "too, compare the engines with the checkpoints: i2l verify --models MODELS --engines ENGINES"
        )


class LoraUnreadable(I2LError, ValueError):
    """A file is not a LoRA that i2l understands."""

    def __init__(self, path: Path, reason: str) -> None:
        super().__init__(f"{format_path(path)} is not a LoRA that i2l understands ({reason})")


class LorasDiffer(I2LError, ValueError):
    """LoRAs do not change the same modules, or not of the same shape."""

    def __init__(
        self,
        first: Path,
        second: Path,
        only_first: Sequence[str],
        only_second: Sequence[str],
        misshapen: Mapping[str, tuple[tuple[int, int], tuple[int, int]]],
    ) -> None:
        parts = [
            f"{len(modules)} module{'s' * (len(modules) != 1)} only in {path.name}, such as {modules[0]}"
            for path, modules in ((first, only_first), (second, only_second))
            if modules
        ]
        if misshapen:
            name, (left, right) = next(iter(misshapen.items()))
            parts.append(f"{name} changes a weight of {list(left)} in one and of {list(right)} in the other")
        super().__init__(
            f"{format_path(first)} and {format_path(second)} do not change the same modules ({'; '.join(parts)}): "
            "give LoRAs of one diffusion model, made with all its modules"
        )


class LoraDataForeign(I2LError, ValueError):
    """What reached the save node holds no factors."""

    def __init__(self, tensors: int) -> None:
        super().__init__(
            f"lora_data holds no LoRA ({tensors} entries, no pair of lora_A and lora_B): connect the lora_data output "
            "of Z-Image i2L Apply"
        )


class LoraNotApplied(I2LError, RuntimeError):
    """ComfyUI put only a part of a LoRA on a model, or nothing."""

    def __init__(self, applied: int, modules: int) -> None:
        super().__init__(
            f"only {applied} of the LoRA's {modules} modules fit the model: connect a Z-Image model, and update "
            "ComfyUI if it is older than 0.3.76 (December 2025)"
        )


class TraceUnreadable(I2LError, ValueError):
    """A file is not a trace."""

    def __init__(self, path: Path, reason: str) -> None:
        super().__init__(
            f"{format_path(path)} is not a trace ({reason}): make one with: i2l run ... --trace {format_path(path)}"
        )


class NothingToInspect(I2LError, ValueError):
    """The path is neither a checkpoint, nor an engines directory, nor a LoRA."""

    def __init__(self, path: Path) -> None:
        super().__init__(
            f"{format_path(path)} is neither a checkpoint, nor an engines directory, nor a LoRA: give one of those, or "
            "a folder that holds checkpoints"
        )
