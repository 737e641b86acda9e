"""`make failover`: what becomes of the jobs when a node is lost.

Not named `test_...`: it takes a minute and a half, for those who change how the fleet lives.
"""

from __future__ import annotations

from collections.abc import AsyncIterator

import pytest

from restoration.jobs import JobStatus
from tests.support.fleet import Fleet, running_fleet

LONG_S = 20.0  # for what a lost node leaves running to be stopped before it can finish


@pytest.fixture(scope="module")
async def fleet() -> AsyncIterator[Fleet]:
    async with running_fleet() as fleet:
        yield fleet


@pytest.mark.failover
async def test_the_jobs_of_a_lost_node_run_elsewhere(fleet: Fleet) -> None:
    """A node is killed under its jobs: they run again on another, and all end well."""
    ids = await fleet.submit(2, seconds=LONG_S)
    first = await fleet.reach(ids, JobStatus.RUNNING)
    fleet.cluster.lose_node(await fleet.busy_node())
    jobs = await fleet.reach(ids, JobStatus.SUCCEEDED)

    before = {job.id: job.worker for job in first}
    again = [job for job in jobs if job.attempt > 1]
    assert again
    assert all(job.worker != before[job.id] for job in again)
