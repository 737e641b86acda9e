"""Workers' reports and orders, on Postgres and in memory."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import UTC, datetime
from uuid import uuid4

import pytest

from persistence.postgres.jobs import PostgresJobStore
from persistence.postgres.workers import PostgresWorkerRegistry
from restoration.errors import WorkerNotFound
from restoration.jobs import Priority
from restoration.workers import (
    EngineState,
    JobInHand,
    Stage,
    WorkerOrders,
    WorkerReport,
)
from tests.fakes.job_store import MemoryJobStore
from tests.fakes.workers import MemoryWorkerRegistry
from tests.support.job_stores import JobStore
from tests.support.samples import new_job


@dataclass
class Stores:
    registry: PostgresWorkerRegistry | MemoryWorkerRegistry
    jobs: JobStore


@pytest.fixture(params=[pytest.param("postgres", marks=pytest.mark.services), "memory"])
def stores(request: pytest.FixtureRequest) -> Stores:
    if request.param == "memory":
        jobs = MemoryJobStore()
        return Stores(MemoryWorkerRegistry(jobs), jobs)
    database = request.getfixturevalue("database")
    return Stores(PostgresWorkerRegistry(database), PostgresJobStore(database))


def _report(worker: str, node: str = "node", *in_hand: JobInHand) -> WorkerReport:
    url, version = "http://127.0.0.1:8188", "0.3.75"
    return WorkerReport(worker, node, url, EngineState.READY, 1, in_hand, 0, version)


@pytest.mark.fleet
async def test_the_roll_has_the_newest_report_of_each(stores: Stores) -> None:
    """Reports are unchanged and ordered by node."""
    job = JobInHand(uuid4(), "restore", Stage.EXECUTING, datetime(2030, 1, 1, tzinfo=UTC))
    await stores.registry.report(_report("worker-2", "node-2"))
    await stores.registry.report(_report("worker-1", "node-1"))
    await stores.registry.report(_report("worker-2", "node-2", job))
    roll = await stores.registry.roll()
    assert [state.report for state in roll.workers] == [
        _report("worker-1", "node-1"),
        _report("worker-2", "node-2", job),
    ]
    assert all(state.started_at <= state.seen_at <= roll.at for state in roll.workers)


@pytest.mark.fleet
async def test_orders_stay_until_they_are_taken_back(stores: Stores) -> None:
    """Every answer to a worker's report repeats its orders, and other workers' orders stay as they
    are."""
    for worker in ("worker-1", "worker-2"):
        assert await stores.registry.report(_report(worker)) == WorkerOrders()
    drained = await stores.registry.drain("worker-1", drained=True)
    assert drained.orders == WorkerOrders(drained=True)
    await stores.registry.restart_engine("worker-1")
    for node in ("node-1", "node-2"):
        orders = await stores.registry.report(_report("worker-1", node))
        assert orders == WorkerOrders(drained=True, restarts_asked=1)
    assert await stores.registry.report(_report("worker-2")) == WorkerOrders()
    await stores.registry.drain("worker-1", drained=False)
    orders = await stores.registry.report(_report("worker-1"))
    assert orders == WorkerOrders(drained=False, restarts_asked=1)


@pytest.mark.fleet
async def test_an_unknown_worker_cannot_be_told_anything(stores: Stores) -> None:
    """Orders for a worker that never existed, or has left, are refused."""
    await stores.registry.report(_report("worker-1"))
    await stores.registry.leave("worker-1")
    for worker in ("worker-1", "worker-2"):
        with pytest.raises(WorkerNotFound):
            await stores.registry.drain(worker, drained=True)
        with pytest.raises(WorkerNotFound):
            await stores.registry.restart_engine(worker)
    assert (await stores.registry.roll()).workers == ()


@pytest.mark.fleet
async def test_the_queue_has_a_line_for_each_class(stores: Stores) -> None:
    """Each class has its waiting and running jobs and the age of the oldest, over all owners."""
    first, *_ = [
        (await stores.jobs.insert(new_job(owner=owner)))[0] for owner in ("ann", "bob", "bob")
    ]
    await stores.jobs.insert(new_job(owner="cat", priority=Priority.BATCH))
    oldest = {line.priority: line.oldest_at for line in (await stores.registry.queue()).lines}
    assert oldest[Priority.INTERACTIVE] == first.created_at
    claimed = await stores.jobs.claim("worker-1", 60, ["restore"])
    assert claimed is not None
    queue = await stores.registry.queue()
    counts = [(line.priority, line.waiting, line.running) for line in queue.lines]
    assert counts == [(Priority.INTERACTIVE, 2, 1), (Priority.BATCH, 1, 0)]


@pytest.mark.fleet
async def test_a_line_of_an_empty_queue_says_so(stores: Stores) -> None:
    """An empty line has no jobs and no oldest one."""
    lines = (await stores.registry.queue()).lines
    assert [(line.waiting, line.running, line.oldest_at) for line in lines] == [(0, 0, None)] * 2
