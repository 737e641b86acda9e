"""From no GPU node to several and back: on Ray's fake cloud.

One cluster goes through it, and each test looks at a part. What becomes of nodes that die:
`make failover`.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from dataclasses import dataclass

import pytest

from comfy_pool.install.engine import EngineInstall
from restoration.jobs import AttemptOutcome, Job, JobStatus
from tests.support.fleet import NODES, WORKERS, Fleet, running_fleet
from tests.support.ray_cluster import EngineProcess, wait_for

SHORT_S = 12.0  # for the last engine to start before the first worker goes
LONG_S = 75.0  # to be running yet when the others' workers have been drained and are gone


@dataclass
class Burst:
    """What was seen of three jobs for a cluster without a node, the last of them a long one."""

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
    ids += await fleet.submit(1, LONG_S)  # last, so that it has not begun long before the others
    await fleet.has_nodes(NODES)
    engines = await fleet.has_engines(WORKERS)
    await asyncio.to_thread(wait_for, lambda: len(fleet.cluster.engines()) < WORKERS)
    [long] = await fleet.services.jobs.find(ids[-1:])
    return Burst(before, await fleet.reach(ids, JobStatus.SUCCEEDED), engines, long)


@pytest.mark.scaling
async def test_a_burst_brings_nodes_and_the_jobs_end(burst: Burst) -> None:
    """Jobs for a cluster without a GPU node get all nodes that they need, and each runs once."""
    assert burst.nodes_before == 0
    assert [(job.status, job.attempt) for job in burst.jobs] == [(JobStatus.SUCCEEDED, 1)] * WORKERS


@pytest.mark.scaling
async def test_workers_go_while_a_job_runs(burst: Burst) -> None:
    """Those without a job are let go while another's runs, and it ends at its first attempt, on
    whichever worker was told to go."""
    long = burst.long_when_workers_went
    assert (long.status, long.attempt) == (JobStatus.RUNNING, 1)
    ended = next(job for job in burst.jobs if job.id == long.id)
    assert [attempt.outcome for attempt in ended.attempts] == [AttemptOutcome.SUCCEEDED]


@pytest.mark.cluster
async def test_each_engine_has_its_gpu_and_its_port(fleet: Fleet, burst: Burst) -> None:
    """On each node the first GPU's engine has the node's first port, the second's the next, and
    each sees its own GPU alone."""
    places = {fleet.cluster.place(engine.port): engine.gpus for engine in burst.engines}

    assert len(places) == WORKERS
    assert all(gpus == str(slot) for (_, slot), gpus in places.items())
    assert {node for node, _ in places} == set(range(1, NODES + 1))


@pytest.mark.scaling
async def test_nodes_go_when_nothing_waits(fleet: Fleet, burst: Burst) -> None:
    """After the last job the fleet is at zero, engines included."""
    assert burst.jobs
    await fleet.has_nodes(0)
    assert await fleet.has_engines(0) == set()
