"""How long a step of the engine takes to reach a thousand clients who watch its job."""

from __future__ import annotations

import asyncio
import json
import statistics
import time
from collections.abc import Sequence
from pathlib import Path

import aiohttp

from actors.execution import ENGINE_FROM, ENGINE_TO
from benchmarks.figures import Bench, Figure, Goal
from benchmarks.service_client import Held, ServiceClient
from serve_app.sse import Decoder
from tests.stack import Stack

CLIENTS = 1_000
ROUNDS = 3
STEPS, PAUSE_S = 12, 1.0
SETTLING_S = 20  # for a thousand connections to be open before the first step counts
NODES = 3  # of the workflow, of which the middle one makes the steps


def event_latency(bench: Bench) -> Sequence[Figure]:
    """From the moment ComfyUI tells of a step to the moment a client has it."""
    rounds = [asyncio.run(_round(bench, n)) for n in range(ROUNDS)]
    return [
        Figure(
            f"Server-Sent Events, p99 of {CLIENTS:,} clients",
            [1e3 * _percentile(latencies_s, 99) for latencies_s in rounds],
            Goal(250.0, at_least=False, tolerance=0.1),
            "ms",
            f"p50 {1e3 * statistics.median(_percentile(each, 50) for each in rounds):.0f} ms",
        )
    ]


def _percentile(sorted_s: Sequence[float], percent: float) -> float:
    return sorted_s[min(len(sorted_s) - 1, int(percent / 100 * len(sorted_s)))]


async def _round(bench: Bench, n: int) -> list[float]:
    """The latencies of every step at every client, sorted."""
    stack, owner = bench.stack, f"watched-{n}"
    (steps_file := _steps_file(stack)).unlink(missing_ok=True)
    settling = int(SETTLING_S / PAUSE_S)
    async with ServiceClient.to(stack, owner) as client:
        params = {"steps": settling + STEPS, "pause": PAUSE_S}
        job = await client.submit("stepped", params, Held(256, 0.0, 1).photo())
        url = stack.record.url + job["links"]["events"]
        seen = await _watch(url, stack.token(owner), settling + STEPS)
    told = {int(step): float(at) for step, at in map(str.split, steps_file.open())}
    latencies_s = sorted(at - told[step] for step, at in seen if step > settling)
    assert len(latencies_s) > 0.9 * CLIENTS * (STEPS - 1), "clients missed steps"
    bench.say(f"  events, round {n + 1}: p99 {1e3 * _percentile(latencies_s, 99):.0f} ms")
    return latencies_s


def _steps_file(stack: Stack) -> Path:
    (engine,) = (stack.state_dir / "engines").iterdir()
    return engine / "benchmark-steps.txt"


async def _watch(url: str, token: str, steps: int) -> list[tuple[int, float]]:
    """Which step each of the clients saw when, by the machine's monotonic clock."""
    seen: list[tuple[int, float]] = []
    headers = {"Authorization": f"Bearer {token}"}
    connector = aiohttp.TCPConnector(limit=0)
    timeout = aiohttp.ClientTimeout(total=None)

    async def watch(http: aiohttp.ClientSession) -> None:
        decoder = Decoder()
        async with http.get(url) as answer:
            answer.raise_for_status()
            async for chunk in answer.content.iter_any():
                at = time.monotonic()
                events = decoder.feed(chunk.decode())
                told = (_step(event.event, event.data, steps) for event in events)
                seen.extend((step, at) for step in told if step is not None)

    async with aiohttp.ClientSession(headers=headers, connector=connector, timeout=timeout) as http:
        await asyncio.gather(*(watch(http) for _ in range(CLIENTS)))
    return seen


def _step(event: str, data: str, steps: int) -> int | None:
    """The step that an event tells of, if it does."""
    if event != "progress":
        return None
    progress = json.loads(data)
    if progress["stage"] != "BenchmarkSteps":
        return None
    of_engine = (progress["fraction"] - ENGINE_FROM) / (ENGINE_TO - ENGINE_FROM)
    return round((NODES * of_engine - 1) * steps) or None
