"""What is wrong with an engines directory, a backend or a device."""

from pathlib import Path

from ..machine.errors import I2LError
from ..machine.wording import command_path, format_bytes, format_path, printable


class EnginesError(I2LError):
    """An engines directory cannot be used."""


class EnginesMissing(EnginesError, FileNotFoundError):
    """The directory has no manifest, so it is not a finished engines directory."""

    def __init__(self, directory: Path) -> None:
        super().__init__(
            f"{format_path(directory)} has no manifest.json, so it is not a finished engines directory: build it with: "
            f"i2l build-engines --models MODELS --engines {command_path(directory)}"
        )


class ManifestInvalid(EnginesError, ValueError):
    """The manifest cannot be understood by this version."""

    def __init__(self, path: Path, reason: str) -> None:
        super().__init__(
            f"{format_path(path)} cannot be used ({reason}): rebuild with: "
            f"i2l build-engines --models MODELS --engines {command_path(path.parent)}"
        )


class EngineFileDamaged(EnginesError, ValueError):
    """A file of the engines directory is absent or differs from what the build wrote."""

    def __init__(self, path: Path, directory: Path, reason: str) -> None:
        super().__init__(
            f"{format_path(path)} is not what the build wrote ({reason}): rebuild with: "
            f"i2l build-engines --models MODELS --engines {command_path(directory)} --force"
        )


class EngineFileUnreadable(EnginesError, OSError):
    """A file of the engines directory cannot be read by this user, or at all."""

    def __init__(self, path: Path, reason: str) -> None:
        super().__init__(f"{format_path(path)} cannot be read ({reason}): let this user read it, and look at the disk")


class EngineFileChanged(EnginesError, RuntimeError):
    """A pack is not what it was when it was opened."""

    def __init__(self, path: Path) -> None:
        super().__init__(
            f"{format_path(path)} was changed while it was in use, so nothing is made of it: start again, and if it is "
            "damaged, rebuild with: i2l build-engines ... --force"
        )


class EngineFailed(EnginesError, RuntimeError):
    """A graph cannot be opened or run."""

    def __init__(self, graph: str, reason: str) -> None:
        super().__init__(
            f"the graph {printable(graph)} does not run ({printable(reason)[:200]}): look at the engines with: "
            "i2l doctor --engines ENGINES --full"
        )


class FolderNotEngines(EnginesError, FileExistsError):
    """Engines are to be built in a folder that holds something else."""

    def __init__(self, directory: Path, found: Path) -> None:
        super().__init__(
            f"{format_path(directory)} holds {printable(found.name)}, which is not of engines: give a folder of its own"
        )


class ShapeMismatch(EnginesError, ValueError):
    """A tensor handed to an engine does not fit its graph."""

    def __init__(self, graph: str, name: str, found: str, wanted: str) -> None:
        super().__init__(f"{graph}: input {name} is {found}, but the graph takes {wanted}")


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

    def __init__(self, device: str, wanted_bytes: int, free_bytes: int | None) -> None:
        free = "" if free_bytes is None else f" ({format_bytes(free_bytes)} free)"  # not every card tells
        wanted = format_bytes(wanted_bytes) if wanted_bytes else "what its driver or library wants"
        super().__init__(
            f"{device} has no room for {wanted}{free}: close other "
            "programs that use it, give a smaller --vram-budget, or use --backend cpu"
        )


class WorkNotRepeatable(I2LError, RuntimeError):
    """Recorded work must not be done again; whoever recorded it goes on without, and says so."""

    def __init__(self, what: str) -> None:
        super().__init__(f"{what}, which must not be repeated")


class DeviceFailed(I2LError, RuntimeError):
    """A call to the device's driver failed, and not for lack of memory."""

    def __init__(self, device: str, reason: str) -> None:
        super().__init__(f"{device}: {reason}: see what nvidia-smi says, or use --backend cpu")
