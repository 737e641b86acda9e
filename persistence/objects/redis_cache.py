"""Small objects on their way: a copy in Redis for whoever reads them first, beside the one in S3.

A job's photo is read once, a moment after it was stored, and so is the result that a client waits
for. A copy spares that reader a call to S3, and S3 the call; it is gone once it was taken, and
after a few seconds anyway. S3 is the truth: nothing is stored that is not there too, whatever
comes from a copy is checked against what S3 was given, and without Redis everything is slower and
nothing else.
"""

from __future__ import annotations

import asyncio
import hashlib
import time
from collections import deque
from collections.abc import AsyncIterator, Sequence
from contextlib import AsyncExitStack
from datetime import datetime
from typing import cast

import structlog
from redis.exceptions import RedisError

from persistence.objects.s3 import S3BlobStore
from persistence.redis.client import connect
from restoration.jobs import Artifact
from restoration.ports import BlobStore, NewUpload, UploadLink
from restoration.settings import Settings

log = structlog.get_logger(__name__)

LARGEST_BYTES = 1024 * 1024  # reading more than that takes S3 longer than finding it
KEPT_S = 10
# What a process may have there: a burst of photos that nobody reads soon must not fill Redis.
BUDGET_BYTES = 16 * 1024 * 1024
_TIMEOUT_S = 0.1  # S3 would have answered by then
_PAUSE_S = 2.0  # after a failure nobody asks for so long


class RedisCopies:
    """Belongs to one event loop: the one it is made in. Its methods never fail."""

    def __init__(self, redis_url: str, budget_bytes: int = BUDGET_BYTES) -> None:
        """Connects on first use."""
        self._redis = connect(redis_url, timeout_s=_TIMEOUT_S, retries=1, text=False)
        self._budget = _Budget(budget_bytes)
        self._away_until = 0.0

    async def offer(self, key: str, data: bytes) -> None:
        """Keep a copy for a while, unless it is too large or too many are kept."""
        if self._is_away or len(data) > LARGEST_BYTES or not self._budget.spend(len(data)):
            return
        try:
            async with asyncio.timeout(_TIMEOUT_S):
                await self._redis.set(_name(key), data, ex=KEPT_S)
        except (RedisError, TimeoutError) as error:
            self._failed(error)

    async def take(self, artifact: Artifact) -> bytes | None:
        """The copy, if there is one and it is that very object; nobody else gets it then."""
        if self._is_away or artifact.size_bytes > LARGEST_BYTES:
            return None
        try:
            async with asyncio.timeout(_TIMEOUT_S):
                data = cast("bytes | None", await self._redis.getdel(_name(artifact.key)))
        except (RedisError, TimeoutError) as error:
            self._failed(error)
            return None
        return data if data is not None and _is(artifact, data) else None

    async def drop(self, keys: Sequence[str]) -> None:
        """What is deleted is to be nowhere. Without Redis copies vanish by themselves."""
        if self._is_away or not keys:
            return
        try:
            async with asyncio.timeout(_TIMEOUT_S):
                await self._redis.unlink(*map(_name, keys))
        except (RedisError, TimeoutError) as error:
            self._failed(error)

    async def aclose(self) -> None:
        await self._redis.aclose()

    @property
    def _is_away(self) -> bool:
        return time.monotonic() < self._away_until

    def _failed(self, error: Exception) -> None:
        self._away_until = time.monotonic() + _PAUSE_S
        log.warning("copies_unavailable", reason=repr(error))


class _Budget:
    """Bytes that were written within the last `KEPT_S`, at most so many."""

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
    """A BlobStore whose small objects have copies."""

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
        await self.delete_many([key])

    async def delete_many(self, keys: Sequence[str]) -> None:
        await self._blobs.delete_many(keys)
        await self._copies.drop(keys)

    async def copy(self, artifact: Artifact, key: str) -> Artifact:
        return await self._blobs.copy(artifact, key)

    def list(self, prefix: str, older_than: datetime) -> AsyncIterator[Sequence[str]]:
        return self._blobs.list(prefix, older_than)

    async def signed_url(self, artifact: Artifact, filename: str, lifetime_s: int) -> str:
        return await self._blobs.signed_url(artifact, filename, lifetime_s)

    async def upload_link(self, key: str, upload: NewUpload, lifetime_s: int) -> UploadLink:
        return await self._blobs.upload_link(key, upload, lifetime_s)

    async def fetch(self, key: str, max_bytes: int) -> bytes | None:
        return await self._blobs.fetch(key, max_bytes)

    async def ping(self) -> None:
        await self._blobs.ping()


def open_blobs(settings: Settings, resources: AsyncExitStack) -> CopiedBlobs:
    """S3 with copies in Redis, both closed by `resources`. Raises InvalidSettings."""
    s3 = S3BlobStore.from_settings(settings)
    resources.push_async_callback(s3.aclose)
    copies = RedisCopies(settings.redis_url.get_secret_value())
    resources.push_async_callback(copies.aclose)
    return CopiedBlobs(s3, copies)


def _is(artifact: Artifact, data: bytes) -> bool:
    sha256 = hashlib.sha256(data).hexdigest()
    return (len(data), sha256) == (artifact.size_bytes, artifact.sha256)


def _name(key: str) -> str:
    return f"restore:copy:{key}"
