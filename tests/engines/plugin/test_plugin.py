"""The backend of plugin providers over host memory: the same code, with onnxruntime's CPU provider as the plugin.

What a real plugin does differently (its queue, its errors, where operators go) is in test_webgpu.py.
"""

import itertools
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

import host_plugin
from conftest import MakeEngines, MakeModels, picture
from host_plugin import HOST
from i2l.engines.backends import BACKENDS
from i2l.engines.base import Limits, Opened
from i2l.engines.directory.manifest import Chunk, Manifest, Step
from i2l.engines.plugin import loading
from i2l.engines.plugin.backend import PluginBackend, open_plugin
from i2l.engines.plugin.plugin_device import DeviceValue, PluginDevice
from i2l.engines.plugin.presence import find_plugin
from i2l.engines.plugin.value_slots import PluginStore
from i2l.errors import (
    BackendUnavailable,
    BudgetTooSmall,
    EngineFileDamaged,
    OutOfDeviceMemory,
    PluginGraphsMissing,
    ProviderFailed,
)
from i2l.lora.lora import Lora
from i2l.runtime.pipeline import Pipeline
from i2l.runtime.trace import Trace
from oracles import TOLERANCES, oracle_lora, worst_module

PICTURES = [picture(90, 70, seed=1), picture(64, 64, seed=2)]
ALL = 1 << 30


@pytest.fixture(autouse=True, scope="module")
def host() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(BACKENDS, "host", "host_plugin")
        yield


@pytest.fixture(scope="module")
def directory(engines: MakeEngines, host: None) -> Path:  # noqa: ARG001
    return engines("tiny", "int8")


@pytest.fixture(scope="module")
def wanted(directory: Path) -> Lora:
    with opened(directory) as pipeline:
        return pipeline.lora_from_images(PICTURES)


@pytest.fixture(scope="module")
def least(directory: Path) -> int:
    with pytest.raises(BudgetTooSmall) as caught:
        opened(directory, 1)
    return caught.value.needed_bytes


def opened(directory: Path, budget_bytes: int = ALL, **options: Any) -> Pipeline:
    return Pipeline(directory, backend="host", vram_budget_bytes=budget_bytes, **options)


def backend_of(pipeline: Pipeline) -> PluginBackend:
    backend = pipeline._backend
    assert isinstance(backend, PluginBackend)
    return backend


def same(found: Lora, wanted: Lora) -> bool:
    pairs = ((found.factors[module], pair) for module, pair in wanted.factors.items())
    return all(np.array_equal(x, y) for found_pair, pair in pairs for x, y in zip(found_pair, pair, strict=True))


@pytest.mark.parametrize("precision", ["fp32", "int8"])
@pytest.mark.parametrize("form", HOST.forms)
def test_the_lora_is_the_reference(
    models: MakeModels, engines: MakeEngines, monkeypatch: pytest.MonkeyPatch, precision: str, form: str
) -> None:
    def open_form(directory: Path, manifest: Manifest, limits: Limits) -> Opened:
        return open_plugin(HOST, directory, manifest, replace(limits, form=form))

    monkeypatch.setattr(host_plugin, "OFFER", replace(host_plugin.OFFER, open=open_form))
    with opened(engines("tiny", precision)) as pipeline:
        lora = pipeline.lora_from_images(PICTURES)
        _, factors = oracle_lora(models("tiny"), pipeline.pixels(PICTURES))
    assert worst_module(lora, factors) < TOLERANCES[precision]


@pytest.mark.parametrize("spare_bytes", [0, 60_000, 150_000, ALL])
def test_every_budget_gives_the_same_bits(directory: Path, wanted: Lora, least: int, spare_bytes: int) -> None:
    with opened(directory, least + spare_bytes) as pipeline:
        for _ in range(2):
            assert same(pipeline.lora_from_images(PICTURES), wanted)
        plan = backend_of(pipeline).residency
        assert pipeline.vram == {"budget_bytes": least + spare_bytes, "planned_peak_bytes": plan.peak_bytes}
        assert (plan.streamed_bytes == 0) == (spare_bytes == ALL)
        assert 0.9 * plan.peak_bytes < backend_of(pipeline).peak_bytes <= plan.peak_bytes


def test_every_plan_there_is_gives_the_same_bits(directory: Path, wanted: Lora, least: int) -> None:
    """From the least to all resident: each set of chunks that a budget can lead to."""
    with opened(directory) as pipeline:
        plan, room = backend_of(pipeline)._plan, backend_of(pipeline).residency.peak_bytes - least
        budgets = {str(plan(least + spare).resident): least + spare for spare in range(room, -1, -500)}
    assert len(budgets) >= 7
    for budget_bytes in budgets.values():
        with opened(directory, budget_bytes) as pipeline:
            assert same(pipeline.lora_from_images(PICTURES), wanted)
            assert backend_of(pipeline).peak_bytes <= budget_bytes


def test_a_pass_is_traced_and_told_and_can_be_stopped(directory: Path, wanted: Lora, least: int) -> None:
    told: list[tuple[str, int]] = []

    def report(stage: str, done: int, _: int) -> None:
        told.append((stage, done))
        if len(told) == 5:
            raise KeyboardInterrupt

    trace = Trace()
    with opened(directory, least, report=report, trace=trace) as pipeline:
        with pytest.raises(KeyboardInterrupt):
            pipeline.lora_from_images(PICTURES)
        assert same(pipeline.lora_from_images(PICTURES), wanted)
    assert {"siglip2", "dinov3", "adapter"} == {stage for stage, _ in told}
    names = {event["name"].split()[0] for event in trace.events if event["ph"] == "X"}
    assert names == {"prefetch", "acquire", "run"}


# --- mutations: what the comparisons above are worth ----------------------------------------------------------------


def overwritten_too_early(patch: pytest.MonkeyPatch) -> None:
    """The next chunk goes where the one in use lies."""
    prefetch = PluginStore.prefetch

    def early(self: PluginStore, chunk: Chunk) -> None:
        if self._held and chunk not in self.resident:
            used = next(iter(self._held))
            if used.steps[0].graph == chunk.steps[0].graph:
                self._copy(chunk, self._held[used])
        prefetch(self, chunk)

    patch.setattr(PluginStore, "prefetch", early)


def upload_dropped(patch: pytest.MonkeyPatch) -> None:
    """One chunk of the second pass never arrives."""
    prefetch, count = PluginStore.prefetch, itertools.count()

    def dropped(self: PluginStore, chunk: Chunk) -> None:
        if chunk.steps[0].name == "dinov3.block.1" and next(count):
            patch.setattr(PluginStore, "_copy", lambda *_: None)
        prefetch(self, chunk)
        patch.setattr(PluginStore, "_copy", copy)

    copy = PluginStore._copy
    patch.setattr(PluginStore, "prefetch", dropped)


def buffers_swapped(patch: pytest.MonkeyPatch) -> None:
    """Two values of a step change places."""
    weights = PluginStore.weights

    def swapped(self: PluginStore, step: Step) -> Any:
        values = dict(weights(self, step))
        if "norm1.weight" in values:
            values["norm1.weight"], values["norm2.weight"] = values["norm2.weight"], values["norm1.weight"]
        return values

    patch.setattr(PluginStore, "weights", swapped)


def slots_swapped(patch: pytest.MonkeyPatch) -> None:
    """A chunk is said to lie where another does."""
    acquire = PluginStore.acquire

    def swapped(self: PluginStore, chunk: Chunk) -> None:
        acquire(self, chunk)
        others = [other for other in self._held if other != chunk and other.steps[0].graph == chunk.steps[0].graph]
        if others:
            values = self._held[others[0]].steps
            self._current = {step.name: weights for step, weights in zip(chunk.steps, values, strict=True)}

    patch.setattr(PluginStore, "acquire", swapped)


@pytest.mark.parametrize("mutate", [overwritten_too_early, upload_dropped, buffers_swapped, slots_swapped])
def test_a_mutation_is_seen(
    directory: Path, wanted: Lora, least: int, monkeypatch: pytest.MonkeyPatch, mutate: Callable[..., None]
) -> None:
    mutate(monkeypatch)
    with opened(directory, least) as pipeline:
        assert not all(same(pipeline.lora_from_images(PICTURES), wanted) for _ in range(2))


# --- memory that is not there ---------------------------------------------------------------------------------------


class Absent:
    """A value that the provider could not allocate: what is written there is lost."""

    def __init__(self, array: NDArray[Any]) -> None:
        self._array = array

    def shape(self) -> list[int]:
        return list(self._array.shape)

    def update_inplace(self, array: NDArray[Any]) -> None: ...

    def numpy(self) -> NDArray[Any]:
        return self._array


FAILURES = ("raised", "logged", "absent")


def test_an_allocation_fails_wherever(directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each of the first hundred, one way or another: a smaller plan or one clear error, never a wrong LoRA."""
    with opened(directory) as pipeline:
        wanted = pipeline.lora_from_images(PICTURES[:1])
    allocate, outcomes = PluginDevice.allocate, {"right": 0, "error": 0}
    for number, how in zip(range(100), itertools.cycle(FAILURES), strict=False):
        count = itertools.count()

        def failing(
            self: PluginDevice,
            dtype: type[np.generic],
            shape: tuple[int, ...],
            at: int = number,
            how: str = how,
            count: Any = count,
        ) -> DeviceValue:
            if next(count) != at:
                return allocate(self, dtype, shape)
            if how == "raised":
                raise OutOfDeviceMemory(self.name, 1, 0)
            if how == "logged":
                loading._hear(3, "host", "", "", "host device error(3): out of memory")
                return allocate(self, dtype, shape)
            value = DeviceValue(Absent(np.zeros(shape, dtype)))
            self._values.add(value)
            return value

        monkeypatch.setattr(PluginDevice, "allocate", failing)
        try:
            with opened(directory) as pipeline:
                lora = pipeline.lora_from_images(PICTURES[:1])
        except (OutOfDeviceMemory, ProviderFailed):
            outcomes["error"] += 1
        else:
            assert same(lora, wanted), f"{how}, allocation {number}"
            outcomes["right"] += 1
    assert outcomes["right"] > 90


class Once:
    """Fails at one run of one graph, as a provider does: raised, or only logged."""

    def __init__(self, patch: pytest.MonkeyPatch, message: str, *, logged: bool, times: int = 1) -> None:
        self.runs, self.left = 0, times
        run = PluginDevice.run

        def failing(device: PluginDevice, session: Any, feed: Any, outputs: Any, wanted_bytes: int) -> Any:
            self.runs += 1
            if self.runs % 5 == 0 and self.left:
                self.left -= 1
                if not logged:
                    raise device._failure(message, wanted_bytes)
                loading._hear(3, "host", "", "", f"host device error{message}")
            return run(device, session, feed, outputs, wanted_bytes)

        patch.setattr(PluginDevice, "run", failing)


@pytest.mark.parametrize("logged", [False, True])
def test_memory_runs_out_while_it_computes(
    directory: Path, wanted: Lora, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, *, logged: bool
) -> None:
    """A smaller plan, once for each time; at the smallest the error."""
    with opened(directory) as pipeline:
        planned = backend_of(pipeline).residency.peak_bytes
        Once(monkeypatch, "(3): Out of memory", logged=logged)
        assert same(pipeline.lora_from_images(PICTURES), wanted)
        assert backend_of(pipeline).residency.peak_bytes < planned
        assert "going on with" in caplog.text
        Once(monkeypatch, "(3): Out of memory", logged=logged, times=100)
        with pytest.raises(OutOfDeviceMemory, match="has no room for"):
            all(pipeline.lora_from_images(PICTURES) for _ in range(100))
        monkeypatch.undo()
        assert same(pipeline.lora_from_images(PICTURES), wanted)  # the smallest plan is still open


def test_auto_goes_on_with_the_cpu(directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with Pipeline(directory, backend="cpu") as pipeline:
        on_cpu = pipeline.lora_from_images(PICTURES)
    with opened(directory) as pipeline:
        pipeline._open._may_fall_back = True
        Once(monkeypatch, "out of memory", logged=False, times=100)
        assert same(pipeline.lora_from_images(PICTURES), on_cpu)
        assert pipeline.backend_name == "cpu"


@pytest.mark.parametrize("logged", [False, True])
def test_a_lost_device_is_an_error(directory: Path, monkeypatch: pytest.MonkeyPatch, *, logged: bool) -> None:
    with opened(directory) as pipeline:
        Once(monkeypatch, "(1): the device is lost", logged=logged)
        with pytest.raises(ProviderFailed, match="the device is lost: use --backend cpu"):
            pipeline.lora_from_images(PICTURES)


# --- closing, choosing, refusing ------------------------------------------------------------------------------------


def test_whoever_holds_a_value_of_a_closed_backend_holds_nothing(directory: Path) -> None:
    """Or else unloading the library would end the process."""
    of_others = set(loading.library_of(HOST).made)  # an error of another test may still hold some
    with opened(directory) as pipeline:
        backend = backend_of(pipeline)
        kept = backend.value(np.zeros((1, 3, 64, 64), np.float32))
        assert kept.shape() == [1, 3, 64, 64]
    assert kept.held is None
    assert set(loading.library_of(HOST).made) <= of_others
    with opened(directory) as pipeline:  # and again
        pipeline.lora_from_images(PICTURES[:1])


def test_what_is_not_an_error_goes_to_pythons_logging(caplog: pytest.LogCaptureFixture) -> None:
    with loading.listening(loading.ErrorLog("host device error")):
        loading._hear(2, "onnxruntime", "", "somewhere.cc:1", "a warning of another session")
    assert "somewhere.cc:1: a warning of another session" in caplog.text


@pytest.mark.parametrize("precision", ["bf16", "fp8"])
def test_packs_that_it_cannot_multiply_are_refused(engines: MakeEngines, precision: str) -> None:
    with pytest.raises(PluginGraphsMissing, match=f"its packs are {precision}, .*--precision int8"):
        opened(engines("tiny", precision))


def test_a_build_without_the_graphs_is_refused(directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("i2l.engines.plugin.graph_paths.PLUGIN_FOLDER", "elsewhere")
    with pytest.raises(PluginGraphsMissing, match=r"an older i2l built it.*rebuild with"):
        opened(directory)


def test_graphs_of_other_packs_are_refused(directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("i2l.engines.plugin.value_slots.inputs_of", lambda *_: {})
    with pytest.raises(EngineFileDamaged, match="the pack has no"):
        opened(directory)


def test_a_card_is_chosen_by_number_or_name(directory: Path) -> None:
    name = find_plugin(HOST).cards[0].name
    for device in ("0", name.upper(), name[2:]):
        with opened(directory, device=device) as pipeline:
            assert backend_of(pipeline).device.name == name
    with pytest.raises(BackendUnavailable, match="it finds no card 7: use one of 0"):
        opened(directory, device="7")
    with pytest.raises(BackendUnavailable, match="no form odd of its graphs: use one of plain, mha"):
        open_plugin(HOST, directory, pipeline.manifest, Limits(images=1, form="odd"))
