"""Cache small objects in Redis for their first reader.

A job's photo is usually read once, shortly after it was stored, and so is a result that a client
waits for. A copy in Redis saves that reader a call to S3. It is deleted when it is read, or expires
after KEPT_S. S3 is authoritative: every object is stored there too, copies are checked against the
artifact's size and sha256, and without Redis reads are only slower.
"""

from __future__ import annotations

import asyncio
import hashlib
import time
from collections import deque
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from typing import cast

import structlog
from redis.exceptions import RedisError

from persistence.objects.s3 import S3BlobStore
from persistence.redis.client import connect
from restoration.jobs import Artifact
from restoration.ports.objects import BlobStore, NewUpload, UploadLink
from restoration.settings import Settings

log = structlog.get_logger(__name__)

LARGEST_BYTES = 1024 * 1024  # above this, S3's transfer takes longer than its lookup
KEPT_S = 10
# Limit of a process's copies, so that a burst of photos that are not read soon cannot fill Redis.
BUDGET_BYTES = 16 * 1024 * 1024
_TIMEOUT_S = 0.1  # S3 would have answered by then
_PAUSE_S = 2.0  # time without calls to Redis after a failure


class RedisCopies:
    """Copies of objects in Redis. Bound to the event loop in which it is created.

    Its methods do not raise if Redis fails.
    """

    def __init__(self, redis_url: str, budget_bytes: int = BUDGET_BYTES) -> None:
        """Create the client, which connects on first use."""
        self._redis = connect(redis_url, timeout_s=_TIMEOUT_S, retries=1, text=False)
        self._budget = _Budget(budget_bytes)
        self._away_until = 0.0

    async def offer(self, key: str, data: bytes) -> None:
        """Store a copy for KEPT_S, unless it is too large or the budget is used up."""
        if self._is_away or len(data) > LARGEST_BYTES or not self._budget.spend(len(data)):
            return
        async with self._failures_logged():
            await self._redis.set(_name(key), data, ex=KEPT_S)

    async def take(self, artifact: Artifact) -> bytes | None:
        """Delete and return the copy. Return None if it is missing or differs from `artifact`."""
        if self._is_away or artifact.size_bytes > LARGEST_BYTES:
            return None
        data: bytes | None = None
        async with self._failures_logged():
            data = cast("bytes | None", await self._redis.getdel(_name(artifact.key)))
        if data is None or len(data) != artifact.size_bytes:
            return None
        return data if hashlib.sha256(data).hexdigest() == artifact.sha256 else None

    async def drop(self, key: str) -> None:
        """Delete the copy of a deleted object. If Redis fails, it expires."""
        if not self._is_away:
            async with self._failures_logged():
                await self._redis.unlink(_name(key))

    async def aclose(self) -> None:
        await self._redis.aclose()

    @property
    def _is_away(self) -> bool:
        return time.monotonic() < self._away_until

    @asynccontextmanager
    async def _failures_logged(self) -> AsyncIterator[None]:
        try:
            async with asyncio.timeout(_TIMEOUT_S):
                yield
        except (RedisError, TimeoutError) as error:
            self._away_until = time.monotonic() + _PAUSE_S
            log.warning("copies_unavailable", reason=repr(error))


class _Budget:
    """Limits the bytes written within the last `KEPT_S`."""

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._spent = 0
        self._lapses: deque[tuple[float, int]] = deque()

    def spend(self, size: int) -> bool:
        now = time.monotonic()
        while self._lapses and self._lapses[0][0] <= now:
            self._spent -= self._lapses.popleft()[1]
        if self._spent + size > self._limit:
            return False
        self._spent += size
        self._lapses.append((now + KEPT_S, size))
        return True


class CopiedBlobs:
    """A BlobStore that keeps copies of small objects in Redis."""

    def __init__(self, blobs: BlobStore, copies: RedisCopies) -> None:
        self._blobs = blobs
        self._copies = copies

    async def put(self, key: str, data: bytes, content_type: str) -> Artifact:
        offering = asyncio.create_task(self._copies.offer(key, data))
        try:
            return await self._blobs.put(key, data, content_type)
        finally:
            await offering

    async def get(self, artifact: Artifact) -> bytes:
        copy = await self._copies.take(artifact)
        return await self._blobs.get(artifact) if copy is None else copy

    async def read(self, artifact: Artifact, start: int, end: int) -> bytes:
        return await self._blobs.read(artifact, start, end)

    async def delete(self, key: str) -> None:
        await self._blobs.delete(key)
        await self._copies.drop(key)

    async def copy(self, artifact: Artifact, key: str) -> Artifact:
        return await self._blobs.copy(artifact, key)

    async def signed_url(self, artifact: Artifact, filename: str, lifetime_s: int) -> str:
        return await self._blobs.signed_url(artifact, filename, lifetime_s)

    async def upload_link(self, key: str, upload: NewUpload, lifetime_s: int) -> UploadLink:
        return await self._blobs.upload_link(key, upload, lifetime_s)

    async def fetch(self, key: str, max_bytes: int) -> bytes | None:
        return await self._blobs.fetch(key, max_bytes)

    async def ping(self) -> None:
        await self._blobs.ping()


def open_blobs(settings: Settings, resources: AsyncExitStack) -> CopiedBlobs:
    """Return S3 with copies in Redis; `resources` closes both. Raises InvalidSettings."""
    s3 = S3BlobStore.from_settings(settings)
    resources.push_async_callback(s3.aclose)
    copies = RedisCopies(settings.redis_url.get_secret_value())
    resources.push_async_callback(copies.aclose)
    return CopiedBlobs(s3, copies)


def _name(key: str) -> str:
    return f"restore:copy:{key}"
