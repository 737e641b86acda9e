"""Compare the service with itself under one changed Ray Serve setting at a time."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from contextlib import AsyncExitStack

from benchmarks.figures import Bench, Figure, Goal
from benchmarks.load import apply_load
from benchmarks.service_client import WAIT_S, WORKFLOW, Held, ServiceClient
from benchmarks.single import median_gap_ms
from serve_app.local.temporary import LocalStack

ROUNDS, ROUND_S, CLIENTS = 5, 3.0, 16
JOB = Held(256, 0.0, jobs=30)

# Serve's defaults, or other choices that it offers.
CHANGES: Mapping[str, Mapping[str, str]] = {
    "Serve's own proxy": {"RAY_SERVE_ENABLE_HA_PROXY": "0"},
    "our code on a thread of its own": {"RAY_SERVE_RUN_USER_CODE_IN_SEPARATE_THREAD": "1"},
    "the router on our event loop": {"RAY_SERVE_RUN_ROUTER_IN_SEPARATE_LOOP": "0"},
    "calls by gRPC": {"RAY_SERVE_USE_GRPC_BY_DEFAULT": "1"},
    "logs to files alone": {"RAY_SERVE_LOG_TO_STDERR": "0"},
    "logs written by the thousand": {"RAY_SERVE_REQUEST_PATH_LOG_BUFFER_SIZE": "1000"},
}


def serve_settings(bench: Bench) -> Sequence[Figure]:
    """Run both services at the same time, and measure them in turns."""
    return [figure for name in CHANGES for figure in _compare(bench, name)]


def _compare(bench: Bench, name: str) -> list[Figure]:
    bench.say(f"  {name}")
    with bench.new_stack(1, CHANGES[name]) as changed:
        return asyncio.run(_measure(bench, name, changed))


async def _measure(bench: Bench, name: str, changed: LocalStack) -> list[Figure]:
    async with AsyncExitStack() as clients:
        ours = await clients.enter_async_context(ServiceClient.to(bench.stack))
        theirs = await clients.enter_async_context(ServiceClient.to(changed))
        reads = [(await _reads_per_s(ours), await _reads_per_s(theirs)) for _ in range(ROUNDS)]
        jobs = [(await _job_ms(ours), await _job_ms(theirs)) for _ in range(ROUNDS)]
    figures = [
        Figure(
            f"status reads/s, over those with {name}",
            [mine / other for mine, other in reads],
            Goal(1.0, at_least=True, tolerance=0.15),
            parts="{:.0f}/s over {:.0f}/s".format(*reads[-1]),
        ),
        Figure(
            f"time of a single job, over that with {name}",
            [mine / other for mine, other in jobs],
            Goal(1.0, at_least=False, tolerance=0.15),
            parts="{:.0f} ms over {:.0f} ms".format(*jobs[-1]),
        ),
    ]
    for figure in figures:
        bench.say(f"    {figure.name}: {figure.value:.2f} ({figure.parts})")
    return figures


async def _reads_per_s(client: ServiceClient) -> float:
    job = await client.submit(WORKFLOW, JOB.params, JOB.photo(), WAIT_S)
    return (await apply_load(lambda: client.read(job), CLIENTS, ROUND_S)).per_s


async def _job_ms(client: ServiceClient) -> float:
    return median_gap_ms(await client.end_times_s(JOB, in_flight=1, redirected=False))
