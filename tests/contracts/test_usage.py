"""GPU time of attempts, on Postgres and in memory."""

from __future__ import annotations

from dataclasses import replace
from datetime import UTC, datetime, timedelta
from uuid import uuid4

import pytest

from persistence.postgres.usage import PostgresUsageLedger
from restoration.jobs import Job
from restoration.observability.usage import Cost, Usage, UsageLedger
from tests.fakes.job_store import MemoryJobStore
from tests.fakes.usage import MemoryUsageLedger
from tests.support.samples import new_job

LONG_AGO = datetime(2000, 1, 1, tzinfo=UTC)


@pytest.fixture(params=[pytest.param("postgres", marks=pytest.mark.services), "memory"])
def ledger(request: pytest.FixtureRequest) -> UsageLedger:
    if request.param == "memory":
        return MemoryUsageLedger()
    return PostgresUsageLedger(request.getfixturevalue("database"))


async def _attempt(owner: str, workflow: str = "restore") -> Job:
    job, _ = await MemoryJobStore().insert(new_job(owner=owner, workflow=workflow))
    return replace(job, attempt=1)


@pytest.mark.usage
async def test_every_attempt_is_summed(ledger: UsageLedger) -> None:
    """Failed attempts count too: a job with three attempts is one job and three attempts."""
    owner = f"ann-{uuid4()}"
    job = await _attempt(owner)
    for attempt, gpu_s in ((1, 2.0), (2, 3.5), (3, 1.0)):
        await ledger.record([Cost(replace(job, attempt=attempt), gpu_s)])
    await ledger.record([Cost(await _attempt(owner), 4.0)])
    assert await ledger.since(LONG_AGO, owner) == [Usage(owner, "restore", 2, 4, 10.5)]


@pytest.mark.usage
async def test_a_job_counts_whichever_of_its_attempts_cost(ledger: UsageLedger) -> None:
    """A job is counted even if its first attempt never executed, or executed before `since`."""
    job = await _attempt(owner := f"ann-{uuid4()}")
    for attempt in (2, 4):
        await ledger.record([Cost(replace(job, attempt=attempt), 1.0)])
    assert await ledger.since(LONG_AGO, owner) == [Usage(owner, "restore", 1, 2, 2.0)]


@pytest.mark.usage
async def test_a_figure_replaces_a_smaller_one(ledger: UsageLedger) -> None:
    """Repeated, late or smaller reports of an attempt add nothing."""
    job = await _attempt(owner := f"ann-{uuid4()}")
    for gpu_s in (1.0, 2.0, 2.0, 1.5):
        await ledger.record([Cost(job, gpu_s)])
    assert await ledger.since(LONG_AGO, owner) == [Usage(owner, "restore", 1, 1, 2.0)]


@pytest.mark.usage
async def test_sums_are_by_owner_and_workflow_the_largest_first(ledger: UsageLedger) -> None:
    """Sums cover all owners, or one owner without the others."""
    ann, bob = f"ann-{uuid4()}", f"bob-{uuid4()}"
    attempts = await _attempt(ann), await _attempt(ann, "enlarge"), await _attempt(bob)
    await ledger.record(list(map(Cost, attempts, (1.0, 5.0, 3.0))))
    of_all = [usage for usage in await ledger.since(LONG_AGO) if usage.owner in (ann, bob)]
    assert [(usage.owner, usage.workflow, usage.gpu_s) for usage in of_all] == [
        (ann, "enlarge", 5.0),
        (bob, "restore", 3.0),
        (ann, "restore", 1.0),
    ]
    assert [usage.owner for usage in await ledger.since(LONG_AGO, bob)] == [bob]


@pytest.mark.usage
async def test_only_what_began_since_then(ledger: UsageLedger) -> None:
    """An attempt belongs to the time at which it began to execute."""
    await ledger.record([Cost(await _attempt(owner := f"ann-{uuid4()}"), 1.0)])
    assert await ledger.since(datetime.now(UTC) + timedelta(hours=1), owner) == []
    assert await ledger.since(datetime.now(UTC) - timedelta(hours=1), owner)
