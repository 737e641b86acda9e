"""Jobs in a JobStore, and how far along they are when a test begins with them."""

from __future__ import annotations

from collections.abc import Callable

from restoration.jobs import Failure, Job
from restoration.ports import JobStore
from restoration.queue_policy import QueuePolicy
from tests.support.samples import new_job

FAILURE = Failure("engine_crashed", "the engine died")
LAPSED_S = -1.0  # a lease that has lapsed when it is given
LEASE_S = 60.0
OpenStore = Callable[[QueuePolicy], JobStore]


async def queued(store: JobStore, **changes: object) -> Job:
    job, created = await store.insert(new_job(**changes))
    assert created
    return job


async def claimed(store: JobStore, lease_s: float = LEASE_S, **changes: object) -> Job:
    """A job that worker "w" runs; for tests that have no other job waiting."""
    await queued(store, **changes)
    job = await store.claim("w", lease_s, ["restore"])
    assert job is not None
    return job


async def claim(store: JobStore, worker: str = "w") -> Job:
    job = await store.claim(worker, LEASE_S, ["restore"])
    assert job is not None
    return job
