"""Copies of S3's objects in Redis: short-lived, read once, and optional."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import AsyncIterator
from dataclasses import replace
from uuid import uuid4

import pytest
from redis.asyncio import Redis

from persistence.objects.redis_cache import KEPT_S, LARGEST_BYTES, CopiedBlobs, RedisCopies
from restoration.errors import ArtifactCorrupt, DependencyUnavailable
from tests.fakes.stores import MemoryBlobStore

DATA = bytes(range(256)) * 20
DEADLINE_S = 90


@pytest.fixture
async def copies(redis_url: str, patience: None) -> AsyncIterator[RedisCopies]:
    copies = RedisCopies(redis_url)
    yield copies
    await copies.aclose()


@pytest.fixture
def key() -> str:
    return f"outputs/{uuid4()}/1.png"


@pytest.mark.cache
async def test_the_first_reader_does_not_ask_s3(copies: RedisCopies, key: str) -> None:
    """The first reader gets the copy, also in another process; later readers get the object from
    S3."""
    s3 = MemoryBlobStore()
    artifact = await CopiedBlobs(s3, copies).put(key, DATA, "image/png")
    s3.down = True
    assert await CopiedBlobs(s3, copies).get(artifact) == DATA
    with pytest.raises(DependencyUnavailable):
        await CopiedBlobs(s3, copies).get(artifact)
    s3.down = False
    assert await CopiedBlobs(s3, copies).get(artifact) == DATA


@pytest.mark.cache
async def test_only_the_very_object_is_taken(copies: RedisCopies, key: str) -> None:
    """A copy of bytes written later under the same key, or of another object, is not returned."""
    blobs = CopiedBlobs(MemoryBlobStore(), copies)
    artifact = await blobs.put(key, DATA, "image/png")
    await blobs.put(key, DATA[::-1], "image/png")
    with pytest.raises(ArtifactCorrupt):
        await blobs.get(artifact)
    other = await blobs.put(f"{key}-other", DATA, "image/png")
    with pytest.raises(ArtifactCorrupt):
        await blobs.get(replace(other, sha256="0" * 64))


@pytest.mark.cache
async def test_nothing_is_stored_that_s3_does_not_have(copies: RedisCopies, key: str) -> None:
    """A failed PUT to S3 fails, whether or not a copy could be stored."""
    s3 = MemoryBlobStore(down=True)
    with pytest.raises(DependencyUnavailable):
        await CopiedBlobs(s3, copies).put(key, DATA, "image/png")


async def test_what_is_deleted_is_nowhere(copies: RedisCopies, key: str) -> None:
    """Deleting an object deletes its copy too."""
    s3 = MemoryBlobStore()
    blobs = CopiedBlobs(s3, copies)
    artifact = await blobs.put(key, DATA, "image/png")
    await blobs.delete(artifact.key)
    with pytest.raises(ArtifactCorrupt):
        await blobs.get(artifact)


async def test_nothing_is_kept_for_long(copies: RedisCopies, redis: Redis, key: str) -> None:
    """An unread copy expires."""
    await copies.offer(key, DATA)
    assert 0 < await redis.ttl(f"restore:copy:{key}") <= KEPT_S


async def test_large_objects_have_none(
    redis_url: str, patience: None, redis: Redis, key: str
) -> None:
    """The size of one copy and the sum of all are limited, so that a burst does not fill Redis."""
    copies = RedisCopies(redis_url, budget_bytes=2 * len(DATA))
    await copies.offer(key, bytes(LARGEST_BYTES + 1))
    for n in range(3):
        await copies.offer(f"{key}-{n}", DATA)
    await copies.aclose()
    names = [f"restore:copy:{each}" for each in (key, f"{key}-0", f"{key}-1", f"{key}-2")]
    assert [await redis.exists(name) for name in names] == [0, 1, 1, 0]


@pytest.mark.parametrize("listens", [True, False], ids=["says nothing", "refuses"])
async def test_without_redis_s3_serves(key: str, *, listens: bool) -> None:
    """Nothing fails, and after the first failure Redis is not tried for a while."""
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        if listens:
            server.listen()
        copies = RedisCopies(f"redis://127.0.0.1:{server.getsockname()[1]}/0")
        blobs = CopiedBlobs(MemoryBlobStore(), copies)
        async with asyncio.timeout(DEADLINE_S):
            for n in range(1000):  # would exceed the deadline at a tenth of a second each
                artifact = await blobs.put(f"{key}-{n}", DATA, "image/png")
                assert await blobs.get(artifact) == DATA
                await blobs.delete(artifact.key)
        await copies.aclose()
