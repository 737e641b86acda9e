"""Measure the time that the service adds to a single job that needs no GPU time."""

from __future__ import annotations

import asyncio
import statistics
from collections.abc import Sequence

from benchmarks.bare_client import end_times_s
from benchmarks.figures import Bench, Figure, Goal
from benchmarks.service_client import Held, ServiceClient
from benchmarks.throughput import WARM_UP_JOBS, bare_comfyui
from serve_app.local.temporary import LocalStack

# Many short rounds: if the machine's speed changes within a minute, it does so between rounds.
ROUNDS = 9
TINY = Held(256, 0.0, jobs=20)
# Before the first round: all processes need this many jobs to warm up.
WARM_UP = Held(256, 0.0, jobs=100)


def single(bench: Bench) -> Sequence[Figure]:
    """Alternate rounds of the bare client and of the service, with one job at a time."""
    with bench.new_stack(1, {}) as stack:
        return [asyncio.run(_added_time(bench, stack))]


async def _added_time(bench: Bench, stack: LocalStack) -> Figure:
    rounds = []
    async with bare_comfyui() as bare_url, ServiceClient.to(stack) as client:
        await end_times_s(bare_url, WARM_UP.work(), WARM_UP.jobs, in_flight=1)
        await client.end_times_s(WARM_UP, in_flight=1, redirected=False)
        for n in range(ROUNDS):
            bare = median_gap_ms(await end_times_s(bare_url, TINY.work(), TINY.jobs, in_flight=1))
            ours = median_gap_ms(await client.end_times_s(TINY, in_flight=1, redirected=False))
            bench.say(f"  one job at a time, round {n + 1}: {ours:.0f} ms over {bare:.0f} ms")
            rounds.append((ours, bare))
    return Figure(
        "added time of a single job, p50",
        [ours - bare for ours, bare in rounds],
        Goal(35.0, at_least=False, tolerance=0.1),
        "ms",
        f"{statistics.median(ours for ours, _ in rounds):.0f} ms over "
        f"{statistics.median(bare for _, bare in rounds):.0f} ms",
    )


def median_gap_ms(ended_at_s: Sequence[float]) -> float:
    """Return the median time between ends of jobs, each of which begins when the last has ended."""
    pairs = zip(ended_at_s[WARM_UP_JOBS:], ended_at_s[WARM_UP_JOBS + 1 :], strict=False)
    return 1e3 * statistics.median(after - before for before, after in pairs)
