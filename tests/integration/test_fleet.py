"""Scale from no GPU node to several and back, on Ray's fake cloud.

One cluster goes through this, and each test checks a part. `make failover` tests the loss of nodes.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from dataclasses import dataclass

import pytest

from comfy_pool.install.engine import EngineInstall
from restoration.jobs import AttemptOutcome, Job, JobStatus
from tests.support.fleet import NODES, WORKERS, Fleet, running_fleet
from tests.support.polling import wait_until
from tests.support.ray_cluster import DEADLINE_S, EngineProcess

SHORT_S = 12.0  # The last engine starts before the first worker is removed.
LONG_S = 75.0  # still running when the other workers have been drained and removed


@dataclass
class Burst:
    """Observations of three jobs, the last a long one, for a cluster without GPU nodes."""

    nodes_before: int
    jobs: list[Job]
    engines: set[EngineProcess]
    long_when_workers_went: Job


@pytest.fixture(scope="module")
async def fleet(engine_install: EngineInstall) -> AsyncIterator[Fleet]:
    async with running_fleet() as fleet:
        yield fleet


@pytest.fixture(scope="module")
async def burst(fleet: Fleet) -> Burst:
    before = len(fleet.cluster.nodes())
    ids = await fleet.submit(WORKERS - 1, SHORT_S)
    ids += await fleet.submit(1, LONG_S)  # last, so that it does not begin long before the others
    await fleet.has_nodes(NODES)
    engines = await fleet.has_engines(WORKERS)
    await asyncio.to_thread(wait_until, lambda: len(fleet.cluster.engines()) < WORKERS, DEADLINE_S)
    [long] = await fleet.services.jobs.find(ids[-1:])
    return Burst(before, await fleet.reach(ids, JobStatus.SUCCEEDED), engines, long)


@pytest.mark.scaling
async def test_a_burst_brings_nodes_and_the_jobs_end(burst: Burst) -> None:
    """A cluster without GPU nodes gets the nodes that its jobs need, and each job runs once."""
    assert burst.nodes_before == 0
    assert [(job.status, job.attempt) for job in burst.jobs] == [(JobStatus.SUCCEEDED, 1)] * WORKERS


@pytest.mark.scaling
async def test_workers_go_while_a_job_runs(burst: Burst) -> None:
    """Idle workers are removed while another one's job runs, and that job ends at its first
    attempt, even if its worker was ordered to stop."""
    long = burst.long_when_workers_went
    assert (long.status, long.attempt) == (JobStatus.RUNNING, 1)
    ended = next(job for job in burst.jobs if job.id == long.id)
    assert [attempt.outcome for attempt in ended.attempts] == [AttemptOutcome.SUCCEEDED]


@pytest.mark.cluster
async def test_each_engine_has_its_gpu_and_its_port(fleet: Fleet, burst: Burst) -> None:
    """On each node the engines of the first and the second GPU use the first and the second port,
    and each sees only its own GPU."""
    places = {fleet.cluster.place(engine.port): engine.gpus for engine in burst.engines}

    assert len(places) == WORKERS
    assert all(gpus == str(slot) for (_, slot), gpus in places.items())
    assert {node for node, _ in places} == set(range(1, NODES + 1))


@pytest.mark.scaling
async def test_nodes_go_when_nothing_waits(fleet: Fleet, burst: Burst) -> None:
    """After the last job no nodes and no engines are left."""
    assert burst.jobs
    await fleet.has_nodes(0)
    assert await fleet.has_engines(0) == set()
