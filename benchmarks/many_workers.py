"""A thousand workers without engines, on real dispatcher, tickets, claims, heartbeats and ends.

All of them run in one process beside Postgres. A cluster meets this limit later, because its
workers bring their own cores.
"""

from __future__ import annotations

import asyncio
import random
import tempfile
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import NoReturn

from actors.dispatcher import Dispatch
from actors.execution.pipeline import TicketOutcome
from benchmarks.claims import filled
from benchmarks.figures import Bench, Figure, Goal
from persistence.embedded.local import LocalServices
from persistence.postgres.database import Database
from persistence.postgres.jobs import PostgresJobStore
from persistence.postgres.leadership import Leadership
from restoration.jobs import Artifact, AttemptRef, Job

FEW, MANY = 10, 1_000
JOB_S = 20.0  # on average; each job takes from 0.5 to 1.5 times as long
# Slower than the defaults, as in so large a cluster, because each heartbeat is an UPDATE.
HEARTBEAT_S, LEASE_S = 5.0, 15.0
IN_STEP_JOBS = 3  # Until then the workers, which start together, end jobs in waves.
WINDOW_S = 60.0
SATURATED_S = 10.0
WAITING = 20_000
_RESULT = Artifact("outputs/x.png", "0" * 64, 1, "image/png")


def many_workers(bench: Bench) -> Sequence[Figure]:
    """Compare the rate of many workers with the rate that their jobs' time allows.

    `parts` also gives the highest rate of one process.
    """
    with tempfile.TemporaryDirectory(prefix="comfy-bench-", ignore_cleanup_errors=True) as folder:
        with LocalServices(Path(folder), only=["postgres"]) as services:
            url = filled(services.urls.database_url, "waiting", WAITING, bench)
            many = asyncio.run(_rate(url, MANY, JOB_S, WINDOW_S))
            most = asyncio.run(_rate(url, FEW, 0.0, SATURATED_S))
    return [
        Figure(
            f"{MANY:,} simulated workers: jobs/s, over what jobs of {JOB_S:g} s allow",
            [many / (MANY / JOB_S)],
            Goal(0.8, at_least=True),
            parts=f"{many:.1f}/s over {MANY / JOB_S:.1f}/s; {most:.0f}/s at most in one process",
        )
    ]


async def _rate(url: str, workers: int, job_s: float, window_s: float) -> float:
    """Return the jobs ended per second, measured once the workers are out of step."""
    database = Database(url)
    jobs = PostgresJobStore(database)
    pool = _Pool(jobs, workers, job_s)
    try:
        async with _dispatching(url, jobs, pool):
            await asyncio.sleep(IN_STEP_JOBS * job_s)
            before = pool.ended
            await asyncio.sleep(window_s)
            return (pool.ended - before) / window_s
    finally:
        await database.aclose()


@asynccontextmanager
async def _dispatching(url: str, jobs: PostgresJobStore, pool: _Pool) -> AsyncIterator[None]:
    signals = Leadership(url)
    assert await signals.acquire(1.0)
    dispatch = Dispatch(jobs, signals, pool.process, window=pool.size + 8, lease_s=LEASE_S)
    leading = asyncio.create_task(dispatch.lead())
    try:
        yield
    finally:
        leading.cancel()
        await asyncio.gather(leading, return_exceptions=True)
        await signals.aclose()


class _Pool:
    """Takes tickets as Serve does: they wait for an idle worker."""

    def __init__(self, jobs: PostgresJobStore, size: int, job_s: float) -> None:
        self._jobs = jobs
        self._job_s = job_s
        self._idle: asyncio.Queue[str] = asyncio.Queue()
        for n in range(size):
            self._idle.put_nowait(f"worker-{n}")
        self.size = size
        self.ended = 0

    async def process(self, _ref: AttemptRef, _hold_s: float) -> TicketOutcome:
        worker = await self._idle.get()
        try:
            job = await self._jobs.claim(worker, LEASE_S, ["restore"])
            if job is None:
                return TicketOutcome.NOTHING_CLAIMED
            await self._see_through(job)
            return TicketOutcome.RAN
        finally:
            self._idle.put_nowait(worker)

    async def _see_through(self, job: Job) -> None:
        beating = asyncio.create_task(self._beat(job.ref))
        try:
            await asyncio.sleep(self._job_s * random.uniform(0.5, 1.5))  # noqa: S311 - a load
            await self._jobs.succeed(job.ref, _RESULT, {})
        finally:
            beating.cancel()
            await asyncio.gather(beating, return_exceptions=True)
        self.ended += 1

    async def _beat(self, ref: AttemptRef) -> NoReturn:
        while True:
            await asyncio.sleep(HEARTBEAT_S)
            await self._jobs.heartbeat(ref, LEASE_S)
