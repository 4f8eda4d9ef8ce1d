"""Synthetic checkpoints: the real keys and shapes, random values that run stably.

Matrices are Gaussian, norm weights about 1, LayerScale about 0.1; every tensor has its own generator seeded by its key,
so a file does not depend on the order of writing. Gaussian weights flatter every quantiser, so ``outliers`` plants what
real vision transformers have ("Massive Activations in Large Language Models", Sun et al. 2024, section on ViTs):

- channels: a few channels of each norm's output and of the inputs of the output projections are 100 times the others.
  The next matrix's columns are divided by 100, so the model computes the same kind of function as before;
- tokens: a few tokens start with three residual channels about 1000 times the others, and keep them through all blocks.
"""

import hashlib
import json
import math
import re
from collections.abc import Iterator
from pathlib import Path

import torch
from safetensors import SafetensorError

from ...engines.directory.tensorfile import LayoutWriter, plan_layout, read_header
from ...machine.files import explained_os_errors, remove_leftovers, require_free
from ...machine.outputs import Format, Found, output_path
from ...machine.progress import Report, silent
from ...specs import PRESETS, QWEN_IMAGE_ADAPTERS, DiffusionModel, Family, Spec, spec_to_dict
from .errors import FolderInUse
from .finding import checkpoint_paths
from .recognise import SPEC_KEY
from .shapes import tensor_shapes

FILES: dict[Family, str] = {
    "siglip2": "CLIPS/SigLIP2-G384.safetensors",
    "dinov3": "CLIPS/DINOv3-7B.safetensors",
    "adapter": "Z-Image/Z-Image-i2L.safetensors",
}
"""The folder layout that users of the ComfyUI node have."""
QWEN_IMAGE_FILE = "Qwen-Image/Qwen-Image-i2L-Style.safetensors"
PUBLISHED_DTYPE: dict[Family, str] = {"siglip2": "F32", "dinov3": "BF16", "adapter": "BF16"}
MARK = "i2l_synthetic"
"""In the header of every synthetic checkpoint."""
TORCH_DTYPE = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
PIECE_VALUES = 1 << 24
"""Values made at a time: 64 MiB of float32."""
OUTLIER_GAIN = 100.0
MASSIVE = 1000.0
TYPICAL = 0.5
"""Size of an ordinary value of the residual stream after the embedding, at the published widths."""

# Which tensors an outlier channel runs through: those whose output (rows) grows, and those whose input (columns)
# shrinks.
GROWING_ROWS = re.compile(r"\.(layer_norm[12]|norm[12])\.(weight|bias)$|\.(v_proj|up_proj)\.(weight|bias)$")
SHRINKING_COLUMNS = re.compile(
    r"\.(q_proj|k_proj|v_proj|gate_proj|up_proj|fc1|o_proj|out_proj|down_proj)\.weight$"  # head.* has no outliers
)
MASSIVE_TOKENS = re.compile(r"^embeddings\.(register_tokens|position_embedding\.weight)$")


def make_checkpoints(
    directory: Path,
    preset: str,
    *,
    seed: int = 0,
    dtype: str | None = None,
    outliers: bool = False,
    adapter: DiffusionModel = "z-image",
    report: Report = silent,
) -> list[Path]:
    """Write the three checkpoints of a preset under ``directory``.

    Args:
        directory: gets ``CLIPS/`` and ``Z-Image/`` or ``Qwen-Image/``.
        preset: ``tiny``, ``small`` or ``full``.
        seed: changes every value.
        dtype: ``F32``, ``F16`` or ``BF16``; by default the dtype of each published file.
        outliers: plant massive activations.
        adapter: which of the adapters to write.
        report: told the bytes written.

    Returns:
        The paths written.

    Raises:
        FolderInUse: checkpoints that are not synthetic lie there.
        OutputUnwritable, DiskFull: nothing is left half written.
    """
    require_own_folder(directory)
    specs: list[Spec] = list(PRESETS[preset])
    files = dict(FILES)
    if adapter == "qwen-image":
        specs[-1] = QWEN_IMAGE_ADAPTERS[preset]
        files["adapter"] = QWEN_IMAGE_FILE
    jobs = [(directory / files[spec.family], spec, dtype or PUBLISHED_DTYPE[spec.family]) for spec in specs]
    layouts = [plan_layout(_entries(spec, kind), _metadata(spec, preset, seed)) for _, spec, kind in jobs]
    total = sum(layout.nbytes for layout in layouts)
    with explained_os_errors(directory):
        directory.mkdir(parents=True, exist_ok=True)
    require_free(directory, total)
    done = sum(len(layout.header) for layout in layouts)
    for (path, spec, kind), layout in zip(jobs, layouts, strict=True):
        remove_leftovers(path.parent)
        with output_path(path, SYNTHETIC) as temporary, LayoutWriter(temporary, layout) as writer:
            for name, shape in tensor_shapes(spec).items():
                for piece in synthetic_pieces(spec, name, shape, seed=seed, outliers=outliers):
                    data = piece.to(TORCH_DTYPE[kind]).contiguous().view(torch.uint8).numpy()
                    writer.write(name, data.data)
                    done += data.nbytes
                    report("writing checkpoints", done, total)
    return [path for path, _, _ in jobs]


def require_own_folder(directory: Path) -> None:
    """Raise :class:`FolderInUse` if a checkpoint lies below ``directory`` that is not synthetic."""
    for path in checkpoint_paths(directory):
        if _find(path):
            raise FolderInUse(directory, path)


def _find(path: Path) -> Found | None:
    try:
        _, metadata = read_header(path)
    except (SafetensorError, OSError, ValueError):
        return Found("no synthetic checkpoint")
    return None if MARK in metadata else Found("a checkpoint that is not synthetic")


SYNTHETIC = Format("a checkpoint", (".safetensors",), _find)


def synthetic_pieces(
    spec: Spec, name: str, shape: tuple[int, ...], *, seed: int, outliers: bool
) -> Iterator[torch.Tensor]:
    """The values of one tensor as flat float32 pieces, front to back, each of whole rows."""
    generator = torch.Generator().manual_seed(_tensor_seed(seed, name))
    rows, columns = shape[0], math.prod(shape[1:])
    if MASSIVE_TOKENS.match(name):  # [1, registers, D] or [tokens, D]: a row is a token
        rows, columns = math.prod(shape[:-1]), shape[-1]
    step = max(1, PIECE_VALUES // columns)
    for start in range(0, rows, step):
        count = min(step, rows - start)
        values = torch.randn(count, columns, generator=generator)
        values = _scaled(spec, name, values, columns)
        if outliers:
            _plant(name, values, start, rows)
        yield values.flatten()


def _scaled(spec: Spec, name: str, values: torch.Tensor, columns: int) -> torch.Tensor:
    if re.search(r"norm[12]?\.weight$|layernorm\.weight$", name):
        return values.mul_(0.1).add_(1.0)
    if "layer_scale" in name:
        return values.mul_(0.02).add_(0.1)
    if spec.family == "adapter":  # keeps A and B of the order of a trained LoRA's whatever the width
        return values.div_(math.sqrt(columns)).mul_(0.3 if name.endswith("proj_out.weight") else 1.0)
    if name.endswith(("_tokens", "probe")):
        return values.mul_(0.5)
    # 0.02 is what the real widths have; narrow presets get the same signal strength with a larger deviation.
    return values.mul_(max(0.02, 0.5 / math.sqrt(columns)) if columns > 1 else 0.02)


def _plant(name: str, values: torch.Tensor, start: int, rows: int) -> None:
    if MASSIVE_TOKENS.match(name):
        tokens = [row for row in (1, 2, rows - 1) if start <= row < start + len(values)]
        channels = _outlier_channels(values.shape[1], 3)
        values[[row - start for row in tokens]] += _one_hot(values.shape[1], channels) * MASSIVE * TYPICAL
        return
    if name.startswith("head."):
        return
    if GROWING_ROWS.search(name):
        chosen = [row - start for row in _outlier_channels(rows, 4) if start <= row < start + len(values)]
        values[chosen] *= OUTLIER_GAIN
    if SHRINKING_COLUMNS.search(name):
        values[:, _outlier_channels(values.shape[1], 4)] /= OUTLIER_GAIN


def _outlier_channels(width: int, count: int) -> list[int]:
    """The same few channels of every tensor of this width, spread unevenly."""
    return sorted({(width * (2 * i + 1) * 5 // 37 + 7 * i) % width for i in range(count)})


def _one_hot(width: int, channels: list[int]) -> torch.Tensor:
    row = torch.zeros(width)
    row[channels] = 1.0
    return row


def _entries(spec: Spec, dtype: str) -> Iterator[tuple[str, str, tuple[int, ...]]]:
    return ((name, dtype, shape) for name, shape in tensor_shapes(spec).items())


def _metadata(spec: Spec, preset: str, seed: int) -> dict[str, str]:
    marks = {"format": "pt", MARK: f"preset {preset}, seed {seed}: random values, for tests and benchmarks"}
    return marks | {SPEC_KEY: json.dumps(spec_to_dict(spec))}


def _tensor_seed(seed: int, name: str) -> int:
    return int.from_bytes(hashlib.sha256(f"{seed}:{name}".encode()).digest()[:7], "little")
