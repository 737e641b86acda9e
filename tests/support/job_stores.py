"""Helpers that put jobs into a store in the state that a test needs."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

from restoration.jobs import Failure, Job
from restoration.ports.jobs import JobAccess, JobSubmissions, LeaderQueue, WorkerQueue
from restoration.queue_policy import QueuePolicy
from tests.support.samples import new_job

FAILURE = Failure("engine_crashed", "the engine died")
LAPSED_S = -1.0  # A lease of this length has lapsed as soon as it is given.
LEASE_S = 60.0


class JobStore(JobSubmissions, JobAccess, WorkerQueue, LeaderQueue, Protocol):
    """All ports to the store of jobs, which the stores of the contract suites offer."""


OpenStore = Callable[[QueuePolicy], JobStore]


async def queued(store: JobStore, **changes: object) -> Job:
    job, created = await store.insert(new_job(**changes))
    assert created
    return job


async def claimed(store: JobStore, lease_s: float = LEASE_S, **changes: object) -> Job:
    """Insert a job and claim it for worker "w"; no other job may be waiting."""
    await queued(store, **changes)
    job = await store.claim("w", lease_s, ["restore"])
    assert job is not None
    return job


async def claim(store: JobStore, worker: str = "w") -> Job:
    job = await store.claim(worker, LEASE_S, ["restore"])
    assert job is not None
    return job
