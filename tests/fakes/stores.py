"""An in-memory blob store and status board; the contract suites run on them too.

The blob store is a dict, and the board is a list for each job. Either can be taken down: with `down
= True` every call raises DependencyUnavailable.
"""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import AsyncIterator, Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from itertools import count
from typing import Protocol
from uuid import UUID

from restoration.errors import ArtifactCorrupt, DependencyUnavailable
from restoration.events import JobEvent, Previewed, StateChanged
from restoration.jobs import Artifact, Job
from restoration.ports.objects import BlobStore, BlobSweeper, NewUpload, UploadLink
from restoration.ports.progress import StampedEvent


def utc_now() -> datetime:
    return datetime.now(UTC)


class AnyBlobs(BlobStore, BlobSweeper, Protocol):
    """Both ports to object storage, which S3 and the store in memory offer."""


@dataclass
class MemoryBlobStore:
    objects: dict[str, bytes] = field(default_factory=dict)
    down: bool = False
    clock: Callable[[], datetime] = utc_now
    written_at: dict[str, datetime] = field(default_factory=dict)
    reads: list[tuple[int, int]] = field(default_factory=list)

    async def put(self, key: str, data: bytes, content_type: str) -> Artifact:
        await self.ping()
        self.objects[key] = data
        self.written_at[key] = self.clock()
        return Artifact(key, hashlib.sha256(data).hexdigest(), len(data), content_type)

    async def get(self, artifact: Artifact) -> bytes:
        await self.ping()
        data = self.objects.get(artifact.key, b"")
        found = (hashlib.sha256(data).hexdigest(), len(data))
        if found != (artifact.sha256, artifact.size_bytes):
            raise ArtifactCorrupt("the stored bytes are not those that were put", key=artifact.key)
        return data

    async def read(self, artifact: Artifact, start: int, end: int) -> bytes:
        await self.ping()
        data = self.objects.get(artifact.key, b"")
        if len(data) != artifact.size_bytes:
            raise ArtifactCorrupt("the stored bytes are not those that were put", key=artifact.key)
        self.reads.append((start, end))
        return data[start:end]

    async def copy(self, artifact: Artifact, key: str) -> Artifact:
        return await self.put(key, await self.get(artifact), artifact.content_type)

    async def delete(self, key: str) -> None:
        await self.ping()
        self.objects.pop(key, None)

    async def delete_many(self, keys: Sequence[str]) -> None:
        for key in keys:
            await self.delete(key)

    async def list(self, prefix: str, older_than: datetime) -> AsyncIterator[Sequence[str]]:
        await self.ping()
        keys = sorted(key for key in self.objects if key.startswith(prefix))
        yield [key for key in keys if self.written_at[key] < older_than]

    async def signed_url(self, artifact: Artifact, filename: str, lifetime_s: int) -> str:
        return f"https://blobs.test/{artifact.key}?filename={filename}&lifetime_s={lifetime_s}"

    async def upload_link(self, key: str, upload: NewUpload, lifetime_s: int) -> UploadLink:
        await self.ping()
        expires_at = self.clock() + timedelta(seconds=lifetime_s)
        headers = {"Content-Type": upload.content_type}
        return UploadLink(f"https://blobs.test/{key}", headers, expires_at)

    async def fetch(self, key: str, max_bytes: int) -> bytes | None:
        await self.ping()
        found = self.objects.get(key)
        return None if found is None else found[: max_bytes + 1]

    async def ping(self) -> None:
        if self.down:
            raise DependencyUnavailable("S3: refused")


@dataclass
class MemoryStatusBoard:
    streams: dict[UUID, list[StampedEvent]] = field(default_factory=dict)
    down: bool = False
    _changed: asyncio.Condition = field(default_factory=asyncio.Condition)
    _ids: Iterator[int] = field(default_factory=lambda: count(1))

    async def publish(self, events: Sequence[tuple[UUID, JobEvent]]) -> None:
        await self.ping()
        async with self._changed:
            for job_id, event in events:
                stream = self.streams.setdefault(job_id, [])
                if isinstance(event, Previewed):
                    stream[:] = [old for old in stream if not isinstance(old.event, Previewed)]
                stream.append(StampedEvent(f"{next(self._ids):09d}-0", event))
            self._changed.notify_all()

    async def conclude(self, job: Job) -> None:
        await self.ping()
        end = StateChanged(job.status, job.attempt)
        async with self._changed:
            stream = self.streams.setdefault(job.id, [])
            stream.append(StampedEvent(f"{next(self._ids):09d}-0", end, job))
            self._changed.notify_all()

    async def latest(self, job_ids: Sequence[UUID]) -> Mapping[UUID, Sequence[JobEvent]]:
        await self.ping()
        return {
            job_id: [*{e.event.type: e.event for e in self.streams[job_id]}.values()]
            for job_id in job_ids
            if job_id in self.streams
        }

    async def follow(self, job_id: UUID) -> AsyncIterator[StampedEvent]:
        last_id = ""
        while True:
            async with self._changed:
                while self.down or not (found := self._after(job_id, last_id)):
                    await self._changed.wait()
            for stamped in found:
                yield stamped
                last_id = stamped.id

    async def ping(self) -> None:
        if self.down:
            raise DependencyUnavailable("Redis: refused")

    def _after(self, job_id: UUID, last_id: str) -> Sequence[StampedEvent]:
        return [stamped for stamped in self.streams.get(job_id, ()) if stamped.id > last_id]
