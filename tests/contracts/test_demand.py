"""The amount of work that decides the number of workers, on Postgres and in memory."""

from __future__ import annotations

from datetime import timedelta
from typing import Any

import pytest

from persistence.postgres.jobs import PostgresJobStore
from restoration.jobs import Failure, Job, NewJob, Priority
from restoration.limits.quotas import Quotas
from restoration.scaling import Demand
from tests.fakes.job_store import MemoryJobStore
from tests.support.job_stores import JobStore
from tests.support.samples import artifact, new_job


@pytest.fixture(params=[pytest.param("postgres", marks=pytest.mark.services), "memory"])
def jobs(request: pytest.FixtureRequest) -> JobStore:
    if request.param == "memory":
        return MemoryJobStore()
    return PostgresJobStore(request.getfixturevalue("database"))


def of(priority: Priority, **changes: Any) -> NewJob:
    return new_job(priority=priority, **changes)


async def claim(jobs: JobStore) -> Job:
    job = await jobs.claim("w", 60, ["restore"])
    assert job is not None
    return job


@pytest.mark.scaling
async def test_nothing_is_no_demand(jobs: JobStore) -> None:
    """The demand of an empty queue is zero."""
    assert await jobs.demand() == Demand(0, 0, 0, 0)


@pytest.mark.scaling
async def test_demand_is_what_waits_and_what_is_in_hand(jobs: JobStore) -> None:
    """Each job counts in its class from its submission to its end, also while being cancelled."""
    for priority in (Priority.INTERACTIVE, Priority.INTERACTIVE, Priority.BATCH):
        await jobs.insert(of(priority))
    assert await jobs.demand() == Demand(3, 0, 2, 0)

    first = await claim(jobs)
    assert await jobs.demand() == Demand(2, 1, 1, 1)
    await jobs.request_cancel(first.id)
    assert await jobs.demand() == Demand(2, 1, 1, 1)

    await jobs.release(first.ref, None)
    second = await claim(jobs)
    await jobs.succeed(second.ref, artifact(), {})
    assert await jobs.demand() == Demand(1, 0, 0, 0)


@pytest.mark.scaling
async def test_a_job_to_be_tried_again_later_is_demand(jobs: JobStore) -> None:
    """A job that waits for its next attempt counts, so that its worker is kept."""
    await jobs.insert(of(Priority.BATCH))
    job = await claim(jobs)

    await jobs.release(job.ref, Failure("engine_crashed", "died"), timedelta(hours=1).seconds)

    assert await jobs.demand() == Demand(1, 0, 0, 0)


@pytest.mark.scaling
async def test_what_may_not_start_asks_for_nobody(jobs: JobStore) -> None:
    """For an owner with a limit on running jobs, only those count that could run now."""
    for _ in range(5):
        await jobs.insert(of(Priority.BATCH, owner="alice"), Quotas(running_jobs=2))
    await jobs.insert(of(Priority.BATCH, owner="bob"))
    assert await jobs.demand() == Demand(3, 0, 0, 0)

    running = [await claim(jobs) for _ in range(3)]
    assert await jobs.demand() == Demand(0, 3, 0, 0)

    alices = next(job for job in running if job.owner == "alice")
    await jobs.succeed(alices.ref, artifact(), {})
    assert await jobs.demand() == Demand(1, 2, 0, 0)
