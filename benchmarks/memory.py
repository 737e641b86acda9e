"""Measure how much memory of the ingress and of the worker grows over two thousand jobs."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence

import psutil

from benchmarks.figures import Bench, Figure, Goal
from benchmarks.service_client import Held, ServiceClient
from serve_app.local.temporary import LocalStack

FIRST, ALL = 200, 2_000
PART = 600
IN_FLIGHT = 8
DEPLOYMENTS = ("Ingress", "GpuWorker")


def memory_growth(bench: Bench) -> Sequence[Figure]:
    """Compare the memory of each process after a stack's first jobs and after all of them."""
    samples = {name: list[float]() for name in DEPLOYMENTS}
    with bench.new_stack(1, {}) as stack:
        after_first = asyncio.run(_after(bench, stack, FIRST))
        for _ in range((ALL - FIRST) // PART):
            now = asyncio.run(_after(bench, stack, PART))
            for name in DEPLOYMENTS:
                samples[name].append(100 * (now[name] / after_first[name] - 1))
    return [
        Figure(
            f"growth of {name}'s memory over {ALL:,} jobs",
            growth[-1:],
            Goal(5.0, at_least=False, tolerance=0.2),
            "%",
            f"{after_first[name] / 1e6:.0f} MB after {FIRST}; on the way "
            + ", ".join(f"{each:.1f} %" for each in growth),
        )
        for name, growth in samples.items()
    ]


async def _after(bench: Bench, stack: LocalStack, jobs: int) -> dict[str, int]:
    async with ServiceClient.to(stack) as client:
        await client.end_times_s(Held(128, 0.0, jobs), IN_FLIGHT, redirected=False)
    used = {name: _own_bytes(stack, name) for name in DEPLOYMENTS}
    bench.say("  " + ", ".join(f"{name}: {size / 1e6:.0f} MB" for name, size in used.items()))
    return used


def _own_bytes(stack: LocalStack, deployment: str) -> int:
    """Return the unshared memory (USS) of the replica's process in bytes."""
    (process,) = (
        process
        for process in psutil.Process(stack.record.pid).children(recursive=True)
        if f":{deployment}" in " ".join(process.cmdline())
    )
    size: int = process.memory_full_info().uss
    return size
