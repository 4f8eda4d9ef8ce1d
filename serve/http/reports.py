"""What a client is told of a job: as JSON, as server-sent events, as Server-Timing. Pure."""

import json
from typing import Any

from ..jobbook import ServedJob
from .problems import problem


def report(job: ServedJob) -> dict[str, Any]:
    """A job as JSON."""
    facts: dict[str, Any] = {
        "id": job.id,
        "state": job.state,
        "progress": round(job.progress, 3),
        "name": job.wish.name,
        "pictures": job.pictures,
        "from_cache": job.from_cache,
        "shared_with": job.shared_with,
        "seconds": job.seconds,
        "links": {"self": f"/v1/jobs/{job.id}", "events": f"/v1/events/{job.id}"},
    }
    if job.state == "done":
        facts["lora"] = job.facts
        facts["links"] |= {"lora": f"/v1/jobs/{job.id}/lora", "plot": f"/v1/jobs/{job.id}/plot"}
    if job.error is not None:
        facts["problem"] = problem(job.error)
    return facts


def event(name: str, data: dict[str, Any]) -> bytes:
    """One server-sent event."""
    return f"event: {name}\ndata: {json.dumps(data)}\n\n".encode()


def server_timing(job: ServedJob) -> str:
    """The header Server-Timing: milliseconds of each stage of the pass, and what came from the cache."""
    stages = [f"{stage.replace(' ', '-')};dur={1000 * value:.0f}" for stage, value in job.seconds.items()]
    return ", ".join([*stages, f'cache;desc="{sum(job.from_cache)} of {job.pictures}"'])
