"""Webhooks in the JobStore port: the call that ends a job also records its webhook."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Any
from uuid import uuid4

import pytest

from persistence.postgres.jobs import PostgresJobStore
from restoration.jobs import Failure, Job, JobStatus
from restoration.webhooks.messages import DeliveryStatus
from tests.fakes.job_store import MemoryJobStore
from tests.support.job_stores import JobStore
from tests.support.samples import artifact, new_job

FAILURE = Failure("engine_crashed", "the engine died")
URL = "https://example.com/hook"
End = Callable[[JobStore, Job], Awaitable[object]]


@pytest.fixture(params=[pytest.param("postgres", marks=pytest.mark.services), "memory"])
def store(request: pytest.FixtureRequest) -> JobStore:
    if request.param == "memory":
        return MemoryJobStore()
    return PostgresJobStore(request.getfixturevalue("database"))


async def _claimed(store: JobStore, lease_s: float = 60, **changes: Any) -> Job:
    await store.insert(new_job(webhook_url=URL, **changes))
    job = await store.claim("w", lease_s, ["restore"])
    assert job is not None
    return job


async def _cancelled(store: JobStore, job: Job) -> None:
    await store.request_cancel(job.id)
    await store.release(job.ref, None)


ENDS: dict[str, End] = {
    "succeed": lambda store, job: store.succeed(job.ref, artifact(), {}),
    "fail": lambda store, job: store.fail(job.ref, FAILURE),
    "release, exhausted": lambda store, job: store.release(job.ref, FAILURE),
    "reclaim, exhausted": lambda store, _: store.reclaim("w"),
    "cancel, handed back": _cancelled,
}


@pytest.mark.webhooks
@pytest.mark.parametrize("end", ENDS.values(), ids=ENDS.keys())
async def test_every_end_is_to_be_told_once(store: JobStore, end: End) -> None:
    """After any kind of end the webhook is pending and due; before, there is none."""
    job = await _claimed(store, max_attempts=1)
    assert await store.deliveries([job.id]) == {}
    await end(store, job)
    ended = await store.get(job.id)
    assert (ended.status.is_final, ended.options.webhook_url) == (True, URL)
    delivery = (await store.deliveries([job.id]))[job.id]
    assert (delivery.status, delivery.tries) == (DeliveryStatus.PENDING, 0)
    assert delivery.next_try_at == ended.finished_at


@pytest.mark.webhooks
async def test_a_job_that_is_cancelled_before_it_ran_is_told(store: JobStore) -> None:
    """Cancelling a waiting job records one webhook, and repeating the cancel adds none."""
    job, _ = await store.insert(new_job(webhook_url=URL))
    assert (await store.request_cancel(job.id)).status is JobStatus.CANCELLED
    first = await store.deliveries([job.id])
    assert list(first) == [job.id]
    await store.request_cancel(job.id)
    assert await store.deliveries([job.id]) == first


@pytest.mark.webhooks
async def test_what_does_not_end_a_job_is_not_told(store: JobStore) -> None:
    """A hand-back, a lost worker or a requested cancel records no webhook, because the job goes
    on."""
    job = await _claimed(store)
    await store.release(job.ref, FAILURE)
    again = await store.claim("w2", 60, ["restore"])
    assert again is not None
    await store.request_cancel(job.id)
    assert await store.deliveries([job.id]) == {}


@pytest.mark.webhooks
async def test_who_asked_for_none_gets_none(store: JobStore) -> None:
    """Jobs without a webhook URL and unknown jobs have no delivery."""
    await store.insert(new_job())
    job = await store.claim("w", 60, ["restore"])
    assert job is not None
    await store.succeed(job.ref, artifact(), {})
    assert await store.deliveries([job.id, uuid4()]) == {}


@pytest.mark.webhooks
async def test_a_repeated_success_is_told_once(store: JobStore) -> None:
    """A worker that repeats its success, because the answer was lost, records no second webhook."""
    job = await _claimed(store)
    for _ in range(2):
        await store.succeed(job.ref, artifact(), {})
    assert len(await store.deliveries([job.id])) == 1
