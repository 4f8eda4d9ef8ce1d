"""A trace file as a picture: the lanes above, memory over time below."""

import json
from pathlib import Path
from typing import Any

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from ..machine.files import regular_file_problem
from ..machine.outputs import DRAWN_BY, DRAWN_TRACE, output_path, require_output
from .errors import TraceUnreadable

COLOURS = {"prefetch": "tab:green", "copy": "tab:green", "acquire": "tab:orange", "run": "tab:blue"}


def draw_trace(source: Path, target: Path) -> None:
    """Draw the trace file ``source`` to the PNG ``target``.

    Raises:
        TraceUnreadable: the file is no trace of i2l.
        OutputMisnamed, OutputTaken, OutputUnwritable: the picture cannot be written.
    """
    require_output(target, DRAWN_TRACE, inputs=[source])
    lanes, spans, memory = read_trace(source)
    figure = Figure(figsize=(12, 4), layout="constrained")
    FigureCanvasAgg(figure)
    above, below = figure.subplots(2, 1, sharex=True)
    for row, lane in enumerate(lanes):
        for kind, colour in COLOURS.items():
            bars = [(e["ts"] / 1e6, e["dur"] / 1e6) for e in spans if e["tid"] == lane and e["name"].startswith(kind)]
            above.broken_barh(bars, (row - 0.4, 0.8), color=colour, label=kind if bars else None)
    above.set_yticks(range(len(lanes)), list(lanes.values()))
    above.legend(loc="upper left")
    for name, value, label in (("memory", "weights", "weights held"), ("VRAM", "used", "VRAM used")):
        points = [(e["ts"] / 1e6, e["args"][value] / 2**20) for e in memory if e["name"] == name]
        if points:
            below.step(*zip(*points, strict=True), where="post", label=label)
    below.legend(loc="upper left")
    below.set_ylabel("MiB")
    below.set_xlabel("seconds")
    with output_path(target, DRAWN_TRACE) as temporary:
        figure.savefig(temporary, format="png", dpi=120, metadata={"Software": DRAWN_BY})


def read_trace(path: Path) -> tuple[dict[int, str], list[dict[str, Any]], list[dict[str, Any]]]:
    """``(lane number -> name, spans, memory counters)`` of a trace file."""
    if problem := regular_file_problem(path):
        raise TraceUnreadable(path, problem)
    try:
        events = json.loads(path.read_bytes())["traceEvents"]
        lanes = {event["tid"]: event["args"]["name"] for event in events if event["ph"] == "M"}
        spans = [event for event in events if event["ph"] == "X"]
        memory = [event for event in events if event["ph"] == "C"]
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise TraceUnreadable(path, str(error)) from error
    return lanes, spans, memory
