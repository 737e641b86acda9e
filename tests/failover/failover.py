"""`make failover`: jobs survive the loss of a node.

Not named `test_...`, because it takes a minute and a half; run it after changes to the life of the
fleet.
"""

from __future__ import annotations

from collections.abc import AsyncIterator

import pytest

from restoration.jobs import JobStatus
from tests.support.fleet import Fleet, running_fleet

LONG_S = 20.0  # Processes left by a lost node are stopped before they could finish such a job.


@pytest.fixture(scope="module")
async def fleet() -> AsyncIterator[Fleet]:
    async with running_fleet() as fleet:
        yield fleet


@pytest.mark.failover
async def test_the_jobs_of_a_lost_node_run_elsewhere(fleet: Fleet) -> None:
    """Jobs on a killed node run again on another one and succeed."""
    ids = await fleet.submit(2, seconds=LONG_S)
    first = await fleet.reach(ids, JobStatus.RUNNING)
    fleet.cluster.lose_node(await fleet.busy_node())
    jobs = await fleet.reach(ids, JobStatus.SUCCEEDED)

    before = {job.id: job.worker for job in first}
    again = [job for job in jobs if job.attempt > 1]
    assert again
    assert all(job.worker != before[job.id] for job in again)
