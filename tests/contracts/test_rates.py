"""Requests per minute, on Redis and in memory."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from uuid import uuid4

import pytest
from redis.asyncio import Redis

from persistence.redis.rate_limits import RedisRateLimiter
from restoration.errors import DependencyUnavailable
from restoration.limits.rates import Rate, RateLimiter
from tests.fakes.rates import MemoryRateLimiter
from tests.support.polling import until


@pytest.fixture(params=[pytest.param("redis", marks=pytest.mark.services), "memory"])
async def rates(request: pytest.FixtureRequest, patience: None) -> AsyncIterator[RateLimiter]:
    if request.param == "memory":
        yield MemoryRateLimiter()
        return
    limiter = RedisRateLimiter(request.getfixturevalue("redis_url"))
    yield limiter
    await limiter.aclose()


@pytest.fixture
def owner() -> str:
    return str(uuid4())


@pytest.mark.quotas
async def test_a_minutes_requests_may_come_at_once(rates: RateLimiter, owner: str) -> None:
    """Each request leaves one less; the first one too many gets the time until one is free
    again."""
    taken = [await rates.take(owner, 3) for _ in range(4)]
    assert [(rate.left, rate.allowed) for rate in taken] == [
        *((2, True), (1, True), (0, True)),
        (0, False),
    ]
    assert 0 < taken[-1].wait_s <= 20
    assert 1 <= taken[-1].retry_after_s <= 20


@pytest.mark.quotas
async def test_a_refused_request_costs_nothing(rates: RateLimiter, owner: str) -> None:
    """Refused requests do not delay the time at which one is allowed again."""
    while (await rates.take(owner, 600)).allowed:
        pass

    async def is_allowed() -> bool:
        return (await rates.take(owner, 600)).allowed

    await until(is_allowed)


@pytest.mark.quotas
async def test_owners_do_not_share(rates: RateLimiter, owner: str) -> None:
    """One owner's requests do not count for another."""
    assert (await rates.take(owner, 1)).allowed
    assert not (await rates.take(owner, 1)).allowed
    assert (await rates.take(f"{owner}-2", 1)).allowed


@pytest.mark.quotas
async def test_a_limit_may_change(rates: RateLimiter, owner: str) -> None:
    """Past requests count against the limit of the newest token."""
    for _ in range(5):
        await rates.take(owner, 10)
    assert not (await rates.take(owner, 1)).allowed
    assert (await rates.take(owner, 1000)).allowed


@pytest.mark.quotas
async def test_requests_at_the_same_moment_are_counted_one_by_one(
    rates: RateLimiter, owner: str
) -> None:
    """Exactly as many concurrent requests are allowed as the limit says."""
    taken = await asyncio.gather(*(rates.take(owner, 5) for _ in range(30)))
    assert sum(rate.allowed for rate in taken) == 5


@pytest.mark.quotas
async def test_counts_are_forgotten_with_their_minute(
    redis_url: str, patience: None, owner: str
) -> None:
    """Redis forgets an owner who sends no more requests."""
    limiter = RedisRateLimiter(redis_url)
    await limiter.take(owner, 6)
    await limiter.aclose()
    async with Redis.from_url(redis_url, protocol=2) as client:
        assert 0 < await client.pttl(f"restore:rate:{owner}") <= 10_000


@pytest.mark.quotas
async def test_a_server_that_is_not_there_is_said_at_once() -> None:
    """It raises DependencyUnavailable, and the caller decides how to go on."""
    limiter = RedisRateLimiter("redis://127.0.0.1:9")
    with pytest.raises(DependencyUnavailable):
        await limiter.take("ann", 1)
    await limiter.aclose()


@pytest.mark.quotas
def test_the_headers_are_those_of_the_draft() -> None:
    """Structured fields give the policy's name, quota and window, and the remaining requests."""
    assert Rate(600, 599, 0.1).headers() == {
        "RateLimit-Policy": '"requests";q=600;w=60',
        "RateLimit": '"requests";r=599;t=1',
    }
