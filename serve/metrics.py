"""What the service counts, in the Prometheus text format.

Each service has a registry of its own, so two in one process do not mix.
"""

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.process_collector import ProcessCollector

from ..machine.memory import peak_resident_bytes
from .worker import Health

STAGE_BUCKETS = (0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0, 30.0, 100.0, 300.0)
PASS_BUCKETS = (1, 2, 3, 4, 8, 16)


class Metrics:
    """Counters and gauges of one service; a :class:`.worker.Watcher`."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        ProcessCollector(registry=self.registry)  # resident memory, CPU time, open descriptors
        self.requests = Counter("i2l_requests", "Requests for a LoRA by outcome", ["outcome"], registry=self.registry)
        self.accepted = Counter("i2l_accepted", "Requests that were accepted", registry=self.registry)
        self._stages = Histogram(
            "i2l_stage_seconds", "Seconds of a pass by stage", ["stage"], buckets=STAGE_BUCKETS, registry=self.registry
        )
        self._pass = Histogram(
            "i2l_pass_pictures", "Pictures that shared a pass", buckets=PASS_BUCKETS, registry=self.registry
        )
        self._hits = Counter("i2l_cache_hits", "Pictures whose embedding was kept", registry=self.registry)
        self.seconds = Histogram(
            "i2l_request_seconds", "Seconds from the first byte to the LoRA", buckets=STAGE_BUCKETS,
            registry=self.registry,
        )  # fmt: skip
        self._waiting = Gauge("i2l_queue_depth", "Requests that wait for a pass", registry=self.registry)
        self._open = Gauge("i2l_open_requests", "Requests received, waiting or running", registry=self.registry)
        self._ready = Gauge("i2l_ready", "1 if the engines are open", ["backend"], registry=self.registry)
        self._fallen = Gauge("i2l_fallen_back", "1 if the CPU took over from a card", registry=self.registry)
        self._peak = Gauge("i2l_peak_resident_bytes", "Highest resident memory", registry=self.registry)
        self._vram = Gauge("i2l_vram_bytes", "VRAM of the passes", ["kind"], registry=self.registry)

    def passed(self, pictures: int, from_cache: int, seconds: dict[str, float]) -> None:
        """A pass is done."""
        self._pass.observe(pictures)
        self._hits.inc(from_cache)
        for stage, value in seconds.items():
            self._stages.labels(stage).observe(value)

    def text(self, health: Health, *, waiting: int, open_requests: int) -> bytes:
        """All of it, with the gauges as they are now."""
        self._waiting.set(waiting)
        self._open.set(open_requests)
        self._ready.clear()
        self._ready.labels(health.backend or "none").set(health.ready)
        self._fallen.set(health.fallen_back)
        self._peak.set(peak_resident_bytes())
        for kind, value in (health.vram or {}).items():
            self._vram.labels(kind.removesuffix("_bytes")).set(value)
        return generate_latest(self.registry)
