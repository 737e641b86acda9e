"""Fixtures shared by several of the ports' contract suites."""

from __future__ import annotations

from collections.abc import AsyncIterator

import pytest
from redis.asyncio import Redis

from persistence.objects import redis_cache
from persistence.postgres.jobs import PostgresJobStore
from persistence.redis import rate_limits, status
from tests.fakes.job_store import MemoryJobStore
from tests.fakes.stores import AnyBlobs, MemoryBlobStore
from tests.support.job_stores import OpenStore


@pytest.fixture(params=[pytest.param("postgres", marks=pytest.mark.services), "memory"])
def open_store(request: pytest.FixtureRequest) -> OpenStore:
    """Return a function that opens a store with a policy; all stores on Postgres share one
    database."""
    if request.param == "memory":
        return lambda policy: MemoryJobStore(policy=policy)
    database = request.getfixturevalue("database")
    return lambda policy: PostgresJobStore(database, policy)


@pytest.fixture(params=[pytest.param("s3", marks=pytest.mark.services), "memory"])
def any_blobs(request: pytest.FixtureRequest) -> AnyBlobs:
    """Return an object store of either kind."""
    if request.param == "memory":
        return MemoryBlobStore()
    store: AnyBlobs = request.getfixturevalue("blobs")
    return store


@pytest.fixture
def patience(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let a call to Redis take a minute. A busy machine exceeds the service's own limits."""
    for module in (rate_limits, redis_cache, status):
        monkeypatch.setattr(module, "_TIMEOUT_S", 60.0)


@pytest.fixture
async def redis(redis_url: str) -> AsyncIterator[Redis]:
    """Connect to the Redis server itself, to inspect and to disturb it."""
    async with Redis.from_url(redis_url, protocol=2) as client:
        yield client
