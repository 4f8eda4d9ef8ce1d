"""Every failure that i2l can explain, as one tree under :class:`I2LError`: what users catch.

Each stands beside what it is about, in a file called ``errors.py``; how they are worded says :mod:`.machine.errors`.
"""

from .comfy_host.errors import (
    AdapterUnfit,
    FilenameRefused,
    ImagesUnfit,
    LoraDataForeign,
    LoraNotApplied,
    ModelFilesMissing,
    NodePackIncomplete,
    NoPlaceForEngines,
    OutputOutside,
)
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
    LoraNamesUnknown,
    LoraNotASum,
    LoraNotFinite,
    LorasDiffer,
    LorasForOthers,
    LoraUnreadable,
    StrengthInvalid,
    WeightsMismatch,
)
from .machine.errors import DiskFull, I2LError, OutputUnwritable, PackageMissing, StandardOutputUnwritable
from .runtime.errors import EnginesReplaced, PipelineClosed
from .runtime.pictures.errors import (
    DecoderMissing,
    FolderEmpty,
    ImageAbsurd,
    ImageError,
    ImagesUnusable,
    ImageUnreadable,
    NoImages,
)

__all__ = [
    "AdapterAmbiguous",
    "AdapterUnfit",
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
    "FilenameRefused",
    "FolderEmpty",
    "I2LError",
    "ImageAbsurd",
    "ImageError",
    "ImageUnreadable",
    "ImagesUnfit",
    "ImagesUnusable",
    "LoraDataForeign",
    "LoraNamesUnknown",
    "LoraNotASum",
    "LoraNotApplied",
    "LoraNotFinite",
    "LoraUnreadable",
    "LorasDiffer",
    "LorasForOthers",
    "ManifestInvalid",
    "ModelFilesMissing",
    "NoImages",
    "NoPlaceForEngines",
    "NodePackIncomplete",
    "NothingToInspect",
    "OutOfDeviceMemory",
    "OutputOutside",
    "OutputUnwritable",
    "PackageMissing",
    "PipelineClosed",
    "PlanBuildFailed",
    "PlanMissing",
    "PlanStale",
    "PrecisionUnsupported",
    "ProviderMissing",
    "ShapeMismatch",
    "StandardOutputUnwritable",
    "StrengthInvalid",
    "TraceUnreadable",
    "WeightsMismatch",
]
