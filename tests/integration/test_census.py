"""Job counts from Postgres, as gauges and counters."""

from __future__ import annotations

import psycopg2
import pytest

from actors.leader.queue_metrics import QueueMetrics
from persistence.postgres.database import Database
from persistence.postgres.job_counts import Census
from persistence.postgres.jobs import PostgresJobStore
from restoration.jobs import Failure, Priority
from restoration.limits.owner_classes import OwnerClass, owner_class
from restoration.observability.metrics import DISPATCHER_LEADS, JOBS, JOBS_FINISHED, OLDEST_WAITING
from tests.fakes.meter import MemoryMeter
from tests.support.polling import until
from tests.support.samples import new_job


@pytest.mark.metrics
async def test_jobs_are_counted_by_state_class_and_kind_of_owner(database: Database) -> None:
    """Each unfinished job is in one gauge, summed by class of owner. Gauges of vanished groups are
    0."""
    jobs, meter = PostgresJobStore(database), MemoryMeter()
    taker = QueueMetrics(Census(database), meter)
    for owner in ("auth0|1", "auth0|2", "abc@clients"):
        await jobs.insert(new_job(owner=owner, priority=Priority.BATCH))
    await jobs.insert(new_job(owner="script", workflow="enlarge"))
    running = await jobs.claim("worker", 60, ["enlarge"])
    await taker.update()
    assert running is not None
    assert meter.gauged(JOBS, state="queued", **{"class": "batch"}, owner_class="person") == 2
    assert meter.gauged(JOBS, state="queued", owner_class="machine") == 1
    assert meter.gauged(JOBS, state="running", workflow="enlarge", owner_class="other") == 1
    assert meter.gauged(OLDEST_WAITING, **{"class": "batch"}) > 0
    assert meter.gauged(OLDEST_WAITING, **{"class": "interactive"}) == 0
    await jobs.fail(running.ref, Failure("engine_failed", "it broke"))
    await taker.update()
    assert meter.gauged(JOBS, state="running") == 0
    assert meter.gauged(JOBS) == 3


@pytest.mark.metrics
async def test_each_end_is_counted_once(database: Database, database_url: str) -> None:
    """Each end of a job is counted once, for any cause, and not if it was before the leadership."""
    jobs = PostgresJobStore(database)
    census = Census(database)
    _, since = await census.finished(None)
    for status in ("cancelled", "failed"):
        job, _ = await jobs.insert(new_job(owner="a@clients"))
        if status == "cancelled":
            await jobs.request_cancel(job.id)
        else:
            claimed = await jobs.claim("worker", 60, ["restore"])
            assert claimed is not None
            await jobs.fail(claimed.ref, Failure("engine_failed", "it broke"))
    _execute(database_url, "UPDATE jobs SET finished_at = finished_at - interval '15 seconds'")
    found, later = await census.finished(since)
    assert {(group.status, group.owner_class, group.jobs) for group in found} == {
        ("cancelled", OwnerClass.MACHINE, 1),
        ("failed", OwnerClass.MACHINE, 1),
    }
    assert (await census.finished(later))[0] == []


@pytest.mark.metrics
async def test_only_while_it_leads(database: Database) -> None:
    """A dispatcher that no longer leads reports 0 jobs, because its successor reports them."""
    jobs, meter = PostgresJobStore(database), MemoryMeter()
    await jobs.insert(new_job())
    taker = QueueMetrics(Census(database), meter, period_s=0.01)
    assert meter.gauged(DISPATCHER_LEADS) == 0

    async def counted() -> bool:
        return meter.gauged(JOBS, state="queued") == 1

    async with taker.leading():
        await until(counted)
        assert meter.gauged(DISPATCHER_LEADS) == 1
    assert (meter.gauged(DISPATCHER_LEADS), meter.gauged(JOBS)) == (0, 0)
    assert meter.counted(JOBS_FINISHED) == 0


@pytest.mark.metrics
@pytest.mark.parametrize("owner", ["auth0|1", "x@clients", "plain", "50%_off", "odd|@clients"])
async def test_sql_and_python_agree_on_owners(database: Database, owner: str) -> None:
    """The query and the Python function find the same class for an owner."""
    await PostgresJobStore(database).insert(new_job(owner=owner))
    [group] = await Census(database).unfinished()
    assert group.owner_class is owner_class(owner)


def _execute(url: str, statement: str) -> None:
    with psycopg2.connect(url.replace("+psycopg2", "")) as connection:
        connection.cursor().execute(statement)
    connection.close()
