"""The memory that onnxruntime's sessions compute in: one region of the plan's workspace, shared by all of them.

Left to itself, each session keeps an arena of its own that grows past any plan and never shrinks. But onnxruntime asks
functions of ours where it is told their addresses. What a session keeps (constants) it asks for while it opens; what it
computes in, it asks for and gives back within a run. Runs follow one another on one stream, so the region is empty
before each and every piece can be given out again at once: whoever writes it next does so behind whoever reads it now.

The first gap that is large enough is taken, from the beginning. So where a run's pieces lie depends on the run alone,
not on those before it, and the highest end that was ever seen for a graph and a number of images is what it will always
need: no order of passes can need more.
"""

import ctypes
from bisect import bisect_left, insort

from ..device.device import Device, Workspace, aligned
from ..errors import DeviceFailed, OutOfDeviceMemory

KEPT_BYTES = 2 << 20
"""Of a piece for what sessions keep: what the driver gives at least."""
ALLOCATE = ctypes.CFUNCTYPE(ctypes.c_void_p, ctypes.c_size_t)
FREE = ctypes.CFUNCTYPE(None, ctypes.c_void_p)
FORGET = ctypes.CFUNCTYPE(None)


class Arena:
    """Gives out the scratch of a workspace.

    Args:
        device: where what sessions keep comes from.
        workspace: whose scratch it is; it may move while nothing is given out.
    """

    def __init__(self, device: Device, workspace: Workspace) -> None:
        self.workspace = workspace
        self.opening = False
        """Sessions are being opened: what they ask for stays."""
        self.most_bytes = 0
        """The highest end of what was given out since it was set to 0."""
        self.refusal: DeviceFailed | OutOfDeviceMemory | None = None
        """Why the last piece that was asked for was not given."""
        self._device = device
        self._given: list[tuple[int, int]] = []
        """``(start, end)`` from the beginning of the scratch, ascending."""
        self._kept: list[int] = []
        self._kept_from = self._kept_until = 0
        self._functions = ALLOCATE(self.allocate), FREE(self.free), FORGET(lambda: None)  # C holds only their addresses

    @property
    def options(self) -> dict[str, str]:
        """How onnxruntime is told."""
        names = ("gpu_external_alloc", "gpu_external_free", "gpu_external_empty_cache")
        addresses = (ctypes.cast(function, ctypes.c_void_p).value for function in self._functions)
        return {name: str(address) for name, address in zip(names, addresses, strict=True)}

    def allocate(self, nbytes: int) -> int:
        """An address; 0 where there is no room, as nothing can be raised through C."""
        size = aligned(max(nbytes, 1))
        if self.opening:
            try:
                return self._keep(size)
            except (DeviceFailed, OutOfDeviceMemory) as error:
                self.refusal = error.with_traceback(None)  # its frames would keep the session
                return 0
        start = 0
        for other, end in self._given:
            if other - start >= size:
                break
            start = end
        if start + size > self.workspace.scratch_bytes:
            self.refusal = OutOfDeviceMemory(self._device.name, nbytes, self.workspace.scratch_bytes)
            return 0
        insort(self._given, (start, start + size))
        self.most_bytes = max(self.most_bytes, start + size)
        return self.workspace.address + start

    def free(self, address: int) -> None:
        """Take a piece back; what sessions keep goes all at once, in :meth:`close`."""
        start = address - self.workspace.address
        index = bisect_left(self._given, (start, 0))
        if index < len(self._given) and self._given[index][0] == start:
            del self._given[index]

    def close(self) -> None:
        """Give back what sessions kept, once they are gone and the device has finished."""
        while self._kept:
            self._device.free(self._kept.pop())
        self._kept_from = self._kept_until = 0

    def _keep(self, size: int) -> int:
        if self._kept_from + size > self._kept_until:
            nbytes = -(-size // KEPT_BYTES) * KEPT_BYTES
            self._kept_from = self._device.allocate(nbytes)
            self._kept_until = self._kept_from + nbytes
            self._kept.append(self._kept_from)
        self._kept_from += size
        return self._kept_from - size
