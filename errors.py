"""Every failure that i2l can explain, as one tree under :class:`I2LError`: what users catch.

Each stands beside what it is about, in a file called ``errors.py``; how they are worded says :mod:`.machine.errors`.
The nodes' own are not here: the wheel has no nodes, and ComfyUI alone shows them.
"""

from .engines.cpu.errors import CpuPacksUnwritable
from .engines.cuda.errors import CudaGraphsUnusable, ProviderMissing
from .engines.errors import (
    BackendUnavailable,
    BudgetTooSmall,
    DeviceFailed,
    EngineFileDamaged,
    EnginesError,
    EnginesMissing,
    ManifestInvalid,
    OutOfDeviceMemory,
    ShapeMismatch,
)
from .engines.plugin.errors import PluginGraphsMissing, ProviderFailed
from .engines.tensorrt.errors import PlanBuildFailed, PlanMissing, PlanStale
from .export.backends.errors import PrecisionUnsupported
from .export.checkpoints.errors import (
    AdapterAmbiguous,
    CheckpointAmbiguous,
    CheckpointError,
    CheckpointForeign,
    CheckpointIncomplete,
    CheckpointMismatch,
    CheckpointMissing,
    CheckpointOfAnotherKind,
    CheckpointsUnfit,
    CheckpointUnreadable,
)
from .look.errors import EnginesOfOtherCheckpoints, NothingToInspect, TraceUnreadable
from .lora.errors import (
    LoraMissing,
    LoraNamesUnknown,
    LoraNotASum,
    LoraNotFinite,
    LorasDiffer,
    LorasForOthers,
    LoraUnreadable,
    NoLoras,
    StrengthInvalid,
    WeightsMismatch,
)
from .machine.errors import DiskFull, I2LError, OutputInUse, OutputUnwritable, PackageMissing, StandardOutputUnwritable
from .runtime.errors import EnginesReplaced, PipelineClosed
from .runtime.pictures.errors import (
    DecoderMissing,
    FolderEmpty,
    FolderUnreadable,
    ImageAbsurd,
    ImageError,
    ImageMissing,
    ImagesUnusable,
    ImageUnreadable,
    NoImages,
)

__all__ = [
    "AdapterAmbiguous",
    "BackendUnavailable",
    "BudgetTooSmall",
    "CheckpointAmbiguous",
    "CheckpointError",
    "CheckpointForeign",
    "CheckpointIncomplete",
    "CheckpointMismatch",
    "CheckpointMissing",
    "CheckpointOfAnotherKind",
    "CheckpointUnreadable",
    "CheckpointsUnfit",
    "CpuPacksUnwritable",
    "CudaGraphsUnusable",
    "DecoderMissing",
    "DeviceFailed",
    "DiskFull",
    "EngineFileDamaged",
    "EnginesError",
    "EnginesMissing",
    "EnginesOfOtherCheckpoints",
    "EnginesReplaced",
    "FolderEmpty",
    "FolderUnreadable",
    "I2LError",
    "ImageAbsurd",
    "ImageError",
    "ImageMissing",
    "ImageUnreadable",
    "ImagesUnusable",
    "LoraMissing",
    "LoraNamesUnknown",
    "LoraNotASum",
    "LoraNotFinite",
    "LoraUnreadable",
    "LorasDiffer",
    "LorasForOthers",
    "ManifestInvalid",
    "NoImages",
    "NoLoras",
    "NothingToInspect",
    "OutOfDeviceMemory",
    "OutputInUse",
    "OutputUnwritable",
    "PackageMissing",
    "PipelineClosed",
    "PlanBuildFailed",
    "PlanMissing",
    "PlanStale",
    "PluginGraphsMissing",
    "PrecisionUnsupported",
    "ProviderFailed",
    "ProviderMissing",
    "ShapeMismatch",
    "StandardOutputUnwritable",
    "StrengthInvalid",
    "TraceUnreadable",
    "WeightsMismatch",
]
