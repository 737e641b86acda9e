"""Fixtures shared by several of the ports' contract suites."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import AsyncExitStack

import pytest
from redis.asyncio import Redis

from persistence.postgres.database import Database
from persistence.postgres.jobs import PostgresJobStore
from tests.fakes.job_store import MemoryJobStore
from tests.support.job_stores import OpenStore


@pytest.fixture(params=[pytest.param("postgres", marks=pytest.mark.services), "memory"])
async def open_store(request: pytest.FixtureRequest) -> AsyncIterator[OpenStore]:
    """Yield a function that opens a store with a policy; all stores on Postgres share one
    database."""
    if request.param == "memory":
        yield lambda policy: MemoryJobStore(policy=policy)
        return
    url = request.getfixturevalue("database_url")
    async with AsyncExitStack() as stack:
        database = Database(url)
        stack.push_async_callback(database.aclose)
        yield lambda policy: PostgresJobStore(database, policy)


@pytest.fixture
async def redis(redis_url: str) -> AsyncIterator[Redis]:
    """Connect to the Redis server itself, to inspect and to disturb it."""
    async with Redis.from_url(redis_url, protocol=2) as client:
        yield client
