"""Faults put in on purpose into what scenario.py runs, so that test_standin.py can show that it would find them."""

from collections.abc import Callable
from concurrent.futures import Future
from functools import partial
from typing import Any

from i2l.engines.device.calls import CudaEvent
from i2l.engines.device.card import CudaDevice
from i2l.engines.device.pinned import kept
from i2l.engines.device.pinned.copy_lane import CopyLane
from i2l.engines.device.slots import DeviceStore
from i2l.engines.device.tensor import DeviceTensor
from i2l.engines.directory.dtypes import FLOAT32
from i2l.engines.replay.model_graphs import ModelGraphs


def put(target: object, name: str, value: object) -> None:
    setattr(target, name, value)


def _upload_beside_the_lanes() -> None:
    """As it was: pageable memory, the null stream."""

    def upload(self: Any, array: Any, address: int) -> Any:
        self._call("cuStreamSynchronize", self._streams["compute"])
        self._call("cuMemcpyHtoD", address, array.ctypes.data, array.nbytes)
        return DeviceTensor(address, array.shape, FLOAT32)

    put(CudaDevice, "upload", upload)


def _no_wait(lane: str) -> Callable[[], None]:
    def mutate() -> None:
        original = CudaDevice.wait

        def wait(self: Any, waiting: Any, event: Any) -> None:
            if waiting != lane:
                original(self, waiting, event)

        put(CudaDevice, "wait", wait)

    return mutate


def _free_in_use() -> None:
    put(CudaDevice, "finish", lambda _: None)


def _no_wait_for_a_buffer() -> None:
    put(CudaEvent, "sync", lambda _: None)


def _kept_before_it_came() -> None:
    put(kept, "KeptChunk", partial(kept.KeptChunk, filled=True))


def _copies_where_kernels_are_launched() -> None:
    """As it was: one thread."""

    def do(self: Any, work: Callable[[], Any]) -> Future[Any]:  # noqa: ARG001
        made: Future[Any] = Future()
        made.set_result(work())
        return made

    put(CopyLane, "_do", do)


def _marks_behind_what_failed() -> None:
    put(CopyLane, "_do", lambda self, work: self._thread.submit(work))


MUTATIONS: dict[str, Callable[[], None]] = {
    "upload beside the lanes": _upload_beside_the_lanes,
    "no wait for a copy": _no_wait("compute"),
    "no wait for a slot": _no_wait("copy"),
    "freed in use": _free_in_use,
    "no wait for a buffer": _no_wait_for_a_buffer,
    "kept before it came": _kept_before_it_came,
    "copies where kernels are launched": _copies_where_kernels_are_launched,
    "marks behind what failed": _marks_behind_what_failed,
}


def _graphs_outlive_a_plan() -> None:
    put(ModelGraphs, "drop", lambda _: None)


def _no_wait_for_results() -> None:
    original = CudaDevice._taken

    def taken(self: Any, *places: Any) -> Any:
        self._fetched = True
        return original(self, *places)

    put(CudaDevice, "_taken", taken)


def _graphs_before_weights_are_there() -> None:
    put(DeviceStore, "settled", True)


GRAPH_MUTATIONS: dict[str, Callable[[], None]] = {
    "graphs outlive a plan": _graphs_outlive_a_plan,
    "no wait for results": _no_wait_for_results,
    "graphs before weights are there": _graphs_before_weights_are_there,
}
