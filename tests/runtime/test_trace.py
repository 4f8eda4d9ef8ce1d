"""Traces: every copy and computation once, in lanes, and memory that comes and goes; the picture of it."""

import json
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner
from PIL import Image

from conftest import MakeEngines, picture
from i2l.cli import main
from i2l.engines.directory.manifest import read_manifest
from i2l.machine.progress import silent
from i2l.runtime.pipeline import Pipeline
from i2l.runtime.trace import Trace


def run(engines: Path, photo: Path, output: Path, trace: Path) -> Any:
    arguments = ["run", str(photo), "--engines", str(engines), "--output", str(output), "--trace", str(trace)]
    return CliRunner().invoke(main, arguments)


def test_every_step_is_in_the_trace(engines: MakeEngines, photo: Path, tmp_path: Path) -> None:
    directory, path = engines("tiny", "fp32"), tmp_path / "trace.json"
    assert run(directory, photo, tmp_path / "lora.safetensors", path).exit_code == 0
    events = json.loads(path.read_text())["traceEvents"]
    chunks = [chunk for model in read_manifest(directory).models.values() for chunk in model.chunks]
    spans = [event for event in events if event["ph"] == "X"]
    lanes = {event["args"]["name"]: event["tid"] for event in events if event["ph"] == "M"}
    kinds = {"run": "compute", "prefetch": "copy", "acquire": "copy"}
    named: dict[str, list[str]] = {kind: [] for kind in kinds}
    for event in sorted(spans, key=lambda event: event["ts"]):
        kind, name = event["name"].split()
        named[kind].append(name)
        assert event["tid"] in [number for lane, number in lanes.items() if lane.split()[0] == kinds[kind]]
    expected = {kind: [c.steps[0].name for c in chunks] for kind in kinds}
    expected["run"] = [step.name for chunk in chunks for step in chunk.steps]
    for kind, names in named.items():  # the adapter's steps are side by side, in any order
        assert sorted(names) == sorted(expected[kind])
        assert [n for n in names if "adapter" not in n] == [n for n in expected[kind] if "adapter" not in n]
    for number in lanes.values():
        lane = [event for event in spans if event["tid"] == number]
        assert all(a["ts"] + a["dur"] <= b["ts"] for a, b in pairwise(lane))
    held = [event["args"]["weights"] for event in events if event["ph"] == "C"]
    assert held[-1] == 0
    sizes = {name: sum(c.nbytes for c in model.chunks) for name, model in read_manifest(directory).models.items()}
    encoders = max(sizes["siglip2"], sizes["dinov3"])  # tiny: all is read ahead; of the adapter, what is not used yet
    assert encoders <= max(held) <= max(sizes.values())


def test_a_pipeline_without_a_trace_wraps_nothing(engines: MakeEngines) -> None:
    with (
        Pipeline(engines("tiny", "fp32")) as plain,
        Pipeline(engines("tiny", "fp32"), trace=(trace := Trace())) as told,
    ):
        assert type(next(plain._passes._stream("dinov3", silent))[1]).__name__ == "OrtEngine"
        assert type(next(told._passes._stream("dinov3", silent))[1]).__name__ == "TracedEngine"
        told.embed(picture(64, 64))
    assert len(trace.events) > 2


def test_the_picture_shows_lanes_and_memory(engines: MakeEngines, photo: Path, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    direct, file, drawn = (tmp_path / name for name in ("direct.png", "trace.json", "drawn.png"))
    output = tmp_path / "lora.safetensors"
    assert run(engines("tiny", "fp32"), photo, output, direct).exit_code == 0
    assert run(engines("tiny", "fp32"), photo, output, file).exit_code == 0
    assert CliRunner().invoke(main, ["plot-trace", str(file), str(drawn)]).exit_code == 0
    for name in ("trace.trace.png", "trace-2.trace.png"):  # a default name replaces nothing
        assert CliRunner().invoke(main, ["plot-trace", str(file)]).stdout.strip().endswith(name)
    for path in (direct, drawn):
        with Image.open(path) as image:
            colours = {colour for _, colour in image.convert("RGB").getcolors(1 << 24) or []}
        assert {(31, 119, 180), (44, 160, 44)} <= colours  # tab:blue runs, tab:green prefetches


def test_the_models_of_a_trace_are_named_where_they_run() -> None:
    from i2l.look.trace_picture import models_of

    def span(name: str, begin: float) -> dict[str, Any]:
        return {"name": name, "ts": begin, "dur": 5.0}

    spans = [span("run siglip2.embed", 10), span("prefetch dinov3.embed", 11), span("run siglip2.head", 20)]
    spans += [span("run siglip2.embed", 40), span("run dinov3.embed", 30)]  # a second pass; lanes come in any order
    assert models_of(spans) == [("siglip2", 10, 25), ("dinov3", 30, 35), ("siglip2", 40, 45)]


def test_what_cannot_be_traced(engines: MakeEngines, photo: Path, tmp_path: Path) -> None:
    output = tmp_path / "lora.safetensors"
    wrong = run(engines("tiny", "fp32"), photo, output, tmp_path / "trace.txt")
    assert (wrong.exit_code, output.exists()) == (2, False)
    (tmp_path / "no.json").write_text("[]")
    result = CliRunner().invoke(main, ["plot-trace", str(tmp_path / "no.json"), str(tmp_path / "x.png")])
    assert result.exit_code == 1
    assert "is not a trace" in result.output


def test_what_happens_at_a_time_goes_side_by_side() -> None:
    trace = Trace()
    with trace.span("compute", "run a"), trace.span("copy", "copy b"), trace.span("compute", "run c"):
        pass
    with trace.span("compute", "run d"):
        pass
    lanes = {event["tid"]: event["args"]["name"] for event in trace.events if event["ph"] == "M"}
    found = {event["name"]: lanes[event["tid"]] for event in trace.events if event["ph"] == "X"}
    assert found == {"run a": "compute", "copy b": "copy", "run c": "compute 2", "run d": "compute"}
