"""The ports to object storage, and to the records of direct uploads."""

from __future__ import annotations

from collections.abc import AsyncIterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Protocol
from uuid import UUID

from restoration.jobs import Artifact
from restoration.limits.quotas import Quotas


@dataclass(frozen=True, slots=True)
class NewUpload:
    """A direct upload that a client announces. `sha256` is lower-case hex, or None if unknown."""

    content_type: str
    size_bytes: int
    sha256: str | None = None


class UploadStore(Protocol):
    """Direct uploads without a job yet. An upload ends when a job with its id is recorded."""

    async def begin(
        self,
        upload_id: UUID,
        owner: str,
        size_bytes: int,
        lifetime_s: float,
        quotas: Quotas | None = None,
    ) -> None:
        """Count `size_bytes` as stored for `owner` until a job is made or `lifetime_s` has passed.

        `quotas` default to the store's own. Raises QueueFull if no job could be queued now, and
        StorageFull if too many bytes would be stored or announced.
        """

    async def size_of(self, upload_id: UUID, owner: str) -> int | None:
        """Return the announced size in bytes, or None if the owner has no such upload."""


@dataclass(frozen=True, slots=True)
class UploadLink:
    """A presigned URL for a PUT with exactly these headers, valid until `expires_at`."""

    url: str
    headers: Mapping[str, str]
    expires_at: datetime


class BlobStore(Protocol):
    """Object storage. `get` returns exactly the bytes that were `put`."""

    async def put(self, key: str, data: bytes, content_type: str) -> Artifact: ...

    async def get(self, artifact: Artifact) -> bytes:
        """Return the bytes. Raises ArtifactCorrupt if size or sha256 differ, or it is missing."""

    async def read(self, artifact: Artifact, start: int, end: int) -> bytes:
        """Return the bytes from `start` up to `end` (exclusive), which must lie in the artifact.

        Raises ArtifactCorrupt if the size differs or the object is gone. The sha256 covers the
        whole object, so a part is not verified.
        """

    async def copy(self, artifact: Artifact, key: str) -> Artifact:
        """Copy the bytes to `key`, as if by `put`. Raises the errors of `get`."""

    async def delete(self, key: str) -> None:
        """Delete the object. A missing object is not an error."""

    async def signed_url(self, artifact: Artifact, filename: str, lifetime_s: int) -> str:
        """Return a URL that serves the object without a token for `lifetime_s` seconds."""

    async def upload_link(self, key: str, upload: NewUpload, lifetime_s: int) -> UploadLink:
        """Return a link with which its holder can write the object at `key`, and no other."""

    async def fetch(self, key: str, max_bytes: int) -> bytes | None:
        """Return unverified bytes, at most `max_bytes` + 1, or None if there is no object."""

    async def ping(self) -> None: ...


class BlobSweeper(Protocol):
    """Object storage as retention sees it."""

    def list(self, prefix: str, older_than: datetime) -> AsyncIterator[Sequence[str]]:
        """Yield pages of the keys with `prefix` that were last written before `older_than`."""

    async def delete_many(self, keys: Sequence[str]) -> None:
        """Delete any number of objects. Missing objects are not errors."""
