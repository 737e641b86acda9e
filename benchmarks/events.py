"""Measure the time for a step of the engine to reach a thousand clients who watch its job."""

from __future__ import annotations

import asyncio
import json
import statistics
from collections.abc import Sequence
from pathlib import Path

from actors.execution.attempt import ENGINE_FROM, ENGINE_TO
from benchmarks.figures import Bench, Figure, Goal
from benchmarks.service_client import Held, ServiceClient
from benchmarks.watching import Reader, events, watch
from serve_app.local.temporary import LocalStack

CLIENTS = 1_000
ROUNDS = 3
STEPS, PAUSE_S = 12, 1.0
LAST = 1  # one uncounted step more, because the last one coincides with the end of its node
SETTLING_S = 20  # until a thousand connections are open
NODES = 3  # nodes of the workflow; the middle one makes the steps


def event_latency(bench: Bench) -> Sequence[Figure]:
    """Measure the time from a step's event in ComfyUI to its arrival at a client."""
    rounds = [asyncio.run(_round(bench, n)) for n in range(ROUNDS)]
    return [
        Figure(
            f"Server-Sent Events, p99 of {CLIENTS:,} clients",
            [1e3 * _percentile(latencies_s, 99) for latencies_s, _ in rounds],
            Goal(250.0, at_least=False, tolerance=0.1),
            "ms",
            f"p50 {1e3 * statistics.median(_percentile(each, 50) for each, _ in rounds):.0f} ms; "
            f"{100 * min(share for _, share in rounds):.1f} % of the steps were seen",
        )
    ]


def _percentile(sorted_s: Sequence[float], percent: float) -> float:
    return sorted_s[min(len(sorted_s) - 1, int(percent / 100 * len(sorted_s)))]


async def _round(bench: Bench, n: int) -> tuple[list[float], float]:
    """Return the sorted latencies of all steps at all clients, and the share of steps with own
    events."""
    stack, owner = bench.stack, f"watched-{n}"
    (steps_file := _steps_file(stack)).unlink(missing_ok=True)
    settling = int(SETTLING_S / PAUSE_S)
    steps = settling + STEPS + LAST
    async with ServiceClient.to(stack, owner) as client:
        params = {"steps": steps, "pause": PAUSE_S}
        job = await client.submit("stepped", params, Held(256, 0.0, 1).photo())
    url = stack.record.url + job["links"]["events"]
    readers, open_at = await watch(url, stack.token(owner), CLIENTS)
    told = {int(step): float(at) for step, at in map(str.split, steps_file.open())}
    assert open_at < told[settling], "not every client was there in time"
    seen = [_first_seen(reader, steps) for reader in readers]
    counted = range(settling + 1, settling + STEPS + 1)
    latencies_s = sorted(known_at(s, each) - told[s] for each in seen for s in counted)
    share = statistics.mean(s in each for each in seen for s in counted)
    p99_ms = 1e3 * _percentile(latencies_s, 99)
    bench.say(f"  events, round {n + 1}: p99 {p99_ms:.0f} ms, {share:.1%} of the steps seen")
    return latencies_s, share


def known_at(step: int, seen: dict[int, float]) -> float:
    """Return when a client knew of the step, also if it was merged into the event of a later
    one."""
    return min(at for later, at in seen.items() if later >= step)


def _first_seen(reader: Reader, steps: int) -> dict[int, float]:
    """Return when a client first saw each step, and, as one more step, the end; monotonic clock."""
    seen: dict[int, float] = {}
    at = 0.0
    for at, event in events(reader):
        if (step := _step(event.event, event.data, steps)) is not None:
            seen.setdefault(step, at)
    return {**seen, steps + 1: at}


def _steps_file(stack: LocalStack) -> Path:
    (engine,) = (stack.state_dir / "engines").iterdir()
    return engine / "benchmark-steps.txt"


def _step(event: str, data: str, steps: int) -> int | None:
    """Return the step that an event reports, or None."""
    if event != "progress":
        return None
    progress = json.loads(data)
    if progress["stage"] != "BenchmarkSteps":
        return None
    of_engine = (progress["fraction"] - ENGINE_FROM) / (ENGINE_TO - ENGINE_FROM)
    return round((NODES * of_engine - 1) * steps) or None
