"""A trace file as a picture: the lanes above, memory over time below."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from ..machine.files import regular_file_problem
from ..machine.outputs import DRAWN_BY, DRAWN_TRACE, output_path, require_output
from ..machine.wording import printable
from .errors import TraceUnreadable

KINDS = {
    "prefetch": ("tab:green", "asks for weights ahead"),
    "copy": ("tab:green", "brings weights to the card"),
    "acquire": ("tab:orange", "waits for weights"),
    "run": ("tab:blue", "computes a step"),
}
"""``first word of a span's name -> (its colour, what it is)``."""
COUNTERS = {"memory": ("weights", "weights held"), "VRAM": ("used", "VRAM used")}
"""``a counter -> (which of its values is drawn, what it is)``."""
LATEST = 1e18
"""Microseconds or bytes; a trace has no more."""


def draw_trace(source: Path, target: Path) -> None:
    """Draw the trace file ``source`` to the PNG ``target``.

    Raises:
        TraceUnreadable: the file is no trace of i2l.
        OutputMisnamed, OutputTaken, OutputUnwritable: the picture cannot be written.
    """
    require_output(target, DRAWN_TRACE, inputs=[source])
    lanes, spans, memory = read_trace(source)
    figure = Figure(figsize=(12, 4.5), layout="constrained")
    FigureCanvasAgg(figure)
    above, below = figure.subplots(2, 1, sharex=True)
    begin = min((e["ts"] for e in spans), default=0) / 1e6
    for row, lane in enumerate(lanes):
        for kind, (colour, meaning) in KINDS.items():
            bars = [
                (e["ts"] / 1e6 - begin, e["dur"] / 1e6)
                for e in spans
                if e["tid"] == lane and e["name"].startswith(kind)
            ]
            above.broken_barh(bars, (row - 0.4, 0.8), color=colour, label=f"{kind}: {meaning}" if bars else None)
    above.set_yticks(range(len(lanes)), list(lanes.values()))
    above.set_ylim(-0.5, len(lanes) + 0.2)
    for name, first, last in models_of(spans):
        middle = (first + last) / 2e6 - begin
        above.annotate(name, (middle, len(lanes) - 0.35), ha="center", va="bottom", annotation_clip=False)
        above.axvline(first / 1e6 - begin, color="0.7", linewidth=0.8)
    for name, (value, label) in COUNTERS.items():
        points = [(e["ts"] / 1e6 - begin, e["args"][value] / 2**20) for e in memory if e["name"] == name]
        if points:
            below.step(*zip(*points, strict=True), where="post", label=label)
    below.set_ylim(bottom=0)
    below.set_xlim(left=0)
    below.set_ylabel("MiB")
    below.set_xlabel("seconds since the first chunk of weights was asked for")
    figure.legend(loc="outside upper left", ncols=5, fontsize=8)
    with output_path(target, DRAWN_TRACE) as temporary:
        figure.savefig(temporary, format="png", dpi=120, metadata={"Software": DRAWN_BY})


def models_of(spans: Sequence[Mapping[str, Any]]) -> list[tuple[str, float, float]]:
    """``(model, begin, end)`` in microseconds, of each model's runs in a row: several passes are several entries."""
    runs = [
        (e["name"].split()[-1].split(".")[0], e["ts"], e["ts"] + e["dur"]) for e in spans if e["name"][:4] == "run "
    ]
    found: list[tuple[str, float, float]] = []
    for name, begin, end in sorted(runs, key=lambda run: run[1]):
        if found and found[-1][0] == name:
            found[-1] = (name, found[-1][1], end)
        else:
            found.append((name, begin, end))
    return found


def read_trace(path: Path) -> tuple[dict[int, str], list[dict[str, Any]], list[dict[str, Any]]]:
    """``(lane number -> name, spans, memory counters)`` of a trace file."""
    if problem := regular_file_problem(path):
        raise TraceUnreadable(path, problem)
    try:
        events = json.loads(path.read_bytes())["traceEvents"]
        lanes = {event["tid"]: _label(event["args"]["name"]) for event in events if event["ph"] == "M"}
        spans = [_span(event) for event in events if event["ph"] == "X"]
        memory = [_counter(event) for event in events if event["ph"] == "C"]
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise TraceUnreadable(path, str(error)) from error
    return lanes, spans, memory


def _span(event: dict[str, Any]) -> dict[str, Any]:
    """A span of which all is there that is drawn; raises :class:`ValueError`, :class:`KeyError` or others."""
    _require(isinstance(event["tid"], int) and event["name"].split())
    _require(_is_time(event["ts"]) and _is_time(event["dur"]))
    return event


def _counter(event: dict[str, Any]) -> dict[str, Any]:
    _require(isinstance(event["name"], str) and _is_time(event["ts"]) and all(map(_is_time, event["args"].values())))
    for name, (value, _) in COUNTERS.items():
        _require(event["name"] != name or value in event["args"])
    return event


def _label(name: str) -> str:
    return printable(name).replace("$", r"\$")  # which begins mathematics


def _is_time(value: object) -> bool:
    return type(value) in (int, float) and 0 <= value < LATEST  # type: ignore[operator]  # it is a number


def _require(condition: object) -> None:
    if not condition:
        raise ValueError("an event lacks what is drawn of it")
