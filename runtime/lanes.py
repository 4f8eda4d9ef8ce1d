"""What a device did when, in its own lanes: the host only enqueues, so its clock would show the enqueuing.

Each span is two timed events in a lane. How far they are apart is known once they are done, so all spans are worked out
in one go, behind the last pass.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

from ..engines.device.device import Device, Event, Lane
from .trace import Trace


@dataclass(frozen=True)
class LaneSpan:
    """Work of a lane between two events."""

    lane: Lane
    name: str
    begin: Event
    end: Event
    facts: dict[str, object]


@dataclass
class Lanes:
    """Collects the spans of a device for a trace."""

    device: Device
    trace: Trace
    spans: list[LaneSpan] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.device.finish()
        self._zero = self.device.record("compute", timed=True)
        self.device.finish()
        self._zero_us = self.trace.now()  # the device's zero on the host's clock, to a few microseconds

    @contextmanager
    def span(self, lane: Lane, name: str, **facts: object) -> Iterator[None]:
        """Time what the body enqueues in a lane; a body that fails is not in the trace."""
        begin = self.device.record(lane, timed=True)
        yield
        self.spans.append(LaneSpan(lane, name, begin, self.device.record(lane, timed=True), facts))
        self.trace.count("VRAM", used=self.device.used_bytes)

    def settle(self) -> None:
        """Wait for the device and write the spans into the trace."""
        self.device.finish()
        for span in self.spans:
            begin, end = (self.device.elapsed_us(self._zero, event) for event in (span.begin, span.end))
            self.trace.add(span.lane, span.name, self._zero_us + begin, end - begin, **span.facts)
        self.spans.clear()
