"""The cuda and tensorrt backends themselves on trial, over a played card; ``$PLAYED_NVIDIA`` says which and its fault.

All of their code runs but for the driver, CUDA's provider and TensorRT: memory is the host's, work is late, the engines
are onnxruntime's on the CPU over raw pointers. It happens in the proof's own process, so what is replaced stays so.
"""

import ctypes
import json
import math
import os
import sys
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from fake_device import HostDevice
from i2l.engines.base import BackendStatus, CardFacts, Limits, Offer, Opened
from i2l.engines.device.tensor import DeviceTensor
from i2l.engines.directory.manifest import Manifest

VARIABLE = "PLAYED_NVIDIA"
CARD = "a played GeForce"


@dataclass(frozen=True)
class Part:
    """What is played."""

    backend: str
    fault: str = ""
    driver: str = "1.0"

    def text(self) -> str:
        return json.dumps(asdict(self))


def part() -> Part:
    return Part(**json.loads(os.environ[VARIABLE]))


def open_played(engines: Path, manifest: Manifest, limits: Limits) -> Opened:
    """Open the real backend over the played card."""
    from played_tensorrt import Played

    from i2l.engines.cuda import backend as cuda_backend
    from i2l.engines.cuda import session
    from i2l.engines.device import card
    from i2l.engines.tensorrt import backend as tensorrt_backend

    played = part()
    device: Any = HostDevice(11 << 28)  # 2 GiB stay free
    device.name, device.index = CARD, 0
    replaced: Any = card
    replaced.CudaDevice = lambda **_: device
    faulty(session.OrtDeviceEngine, played.fault)
    if played.backend == "tensorrt":
        sys.modules["tensorrt_rtx"] = Played(device).module
        replaced = tensorrt_backend
        replaced.chosen_card = lambda *_: 0
        replaced.current_sm = lambda *_: device.sm
        return tensorrt_backend.open_tensorrt(engines, manifest, limits)
    replaced = cuda_backend
    replaced.chosen_card = lambda *_: 0
    folder = engines / manifest.build
    replaced.checked_graphs = lambda *_: {graph: folder / path for graph, path in manifest.graphs.items()}
    replaced = session
    replaced.CudaTarget = lambda *_: session.CpuTarget()
    replaced.OrtDeviceEngine = late(session.OrtDeviceEngine, device)
    return cuda_backend.open_cuda(engines, manifest, limits)


def late(kind: Any, device: HostDevice) -> Any:
    """Engines that compute when the compute lane comes to it."""
    if hasattr(kind, "device"):  # the second opening of this process
        kind.device = device
        return kind

    class Late(kind):  # type: ignore[misc]  # known only here
        def compute(self, inputs: Mapping[str, DeviceTensor], outputs: Mapping[str, DeviceTensor]) -> None:
            self.device.enqueue("compute", partial(super().compute, inputs, outputs))

    Late.device = device
    return Late


def faulty(kind: Any, fault: str) -> None:
    """What every engine over pointers does from now on."""
    if fault == "" or hasattr(kind, "device") or kind.compute.__name__ == "wrong":  # not twice in a process
        return
    compute = kind.compute

    def wrong(self: Any, inputs: Mapping[str, DeviceTensor], outputs: Mapping[str, DeviceTensor]) -> None:
        if fault == "crashes":
            os.abort()
        if fault == "hangs":
            time.sleep(600)
        compute(self, inputs, outputs)
        for value in outputs.values():
            _put_off(value, next(iter(inputs.values())), fault)

    kind.compute = wrong


def _put_off(value: DeviceTensor, activation: DeviceTensor, fault: str) -> None:
    """``off``: by much; ``a little off``: by no more than bfloat16 rounds, where no massive token is carried along."""
    carried = list(value.shape()) == list(activation.shape())
    count = math.prod(value.shape())
    numbers = np.ctypeslib.as_array((ctypes.c_float * count).from_address(value.data_ptr()))
    numbers *= np.float32(1.2 if fault == "off" else 1.0 if carried else 1.003)


def find_played() -> BackendStatus:
    played = part()
    card = CardFacts(CARD, played.driver, {"playing": "1.0"})
    return BackendStatus(played.backend, works=True, reason="it is played", cards=(card,))


OFFER = Offer(find_played, open_played, arithmetic={"fp32": "bfloat16"})
