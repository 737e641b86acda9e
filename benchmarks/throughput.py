"""Compare one worker on one ComfyUI with a bare client that keeps ComfyUI's queue full.

Both run the same graph on an engine of their own, which holds its GPU for a given time without
using a core. Both start with the photo in memory and end with the PNG received.
"""

from __future__ import annotations

import asyncio
import os
import statistics
import tempfile
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from pathlib import Path

from benchmarks.bare_client import end_times_s
from benchmarks.figures import HERE, Bench, Figure, Goal
from benchmarks.service_client import Held, ServiceClient
from comfy_pool.engine import ComfyEngine
from comfy_pool.factory import installed_engine
from comfy_pool.process.hosts import OwnedHost
from comfy_pool.process.process import EngineCommand
from restoration.settings import NodeSettings
from serve_app.local.temporary import free_port

ROUNDS = 3
IN_FLIGHT = 6
WARM_UP_JOBS = 2  # excluded from each round

LARGE, SMALL = Held(4096, 1.0, jobs=12), Held(1024, 0.2, jobs=40)


def throughput(bench: Bench) -> Sequence[Figure]:
    """Alternate rounds of the bare client and of the service."""
    return asyncio.run(_measure(bench))


async def _measure(bench: Bench) -> list[Figure]:
    async with bare_comfyui() as bare_url, ServiceClient.to(bench.stack) as client:
        return [
            await _rate(bench, bare_url, client, LARGE, Goal(1.8, at_least=True)),
            await _rate(bench, bare_url, client, SMALL, Goal(1.4, at_least=True)),
        ]


@asynccontextmanager
async def bare_comfyui() -> AsyncIterator[str]:
    """Run an engine with ComfyUI's own nodes and the one that holds the GPU; yield its URL."""
    installed = installed_engine(NodeSettings())
    with tempfile.TemporaryDirectory(prefix="comfy-bench-") as folder:
        command = EngineCommand(
            installed.python,
            installed.app_dir,
            Path(folder),
            installed.models_dir,
            free_port(),
            "cpu",
            {name: os.environ[name] for name in ("PATH", "HOME")},
            nodes=(HERE / "nodes",),
        )
        host = OwnedHost(command)
        async with ComfyEngine(host):
            yield host.base_url


async def _rate(
    bench: Bench, bare_url: str, client: ServiceClient, held: Held, goal: Goal
) -> Figure:
    rates = []
    for n in range(ROUNDS):
        bare = per_s(await end_times_s(bare_url, held.work(), held.jobs))
        ours = per_s(await client.end_times_s(held, IN_FLIGHT))
        bench.say(f"  {held.side}x{held.side}, round {n + 1}: {ours:.2f}/s over {bare:.2f}/s")
        rates.append((ours, bare))
    return Figure(
        f"jobs/s over a bare client, {held.side}x{held.side}, {held.seconds:g} s",
        [ours / bare for ours, bare in rates],
        goal,
        parts=f"{statistics.median(ours for ours, _ in rates):.2f}/s over "
        f"{statistics.median(bare for _, bare in rates):.2f}/s",
    )


def per_s(ended_at_s: Sequence[float]) -> float:
    steady = sorted(ended_at_s)[WARM_UP_JOBS:]
    return (len(steady) - 1) / (steady[-1] - steady[0])
