"""Direct uploads: a client writes its photo to S3 itself, then makes one job of it.

The link's signature fixes the content, the object's key contains the owner, and the job takes the
upload's id, so that only one job can be made of it. The bytes count as stored from the creation of
the link until a job is made of them or the sweep removes them.
"""

from __future__ import annotations

from dataclasses import dataclass
from uuid import UUID, uuid4

from persistence.objects.keys import upload_key
from restoration.images import ImageType, UploadLimits, check_size_bytes
from restoration.limits.quotas import Quotas
from restoration.ports.objects import BlobStore, NewUpload, UploadLink, UploadStore

UNUSED_AFTER_S = 3600.0  # time to make a job of an upload after its link has expired


@dataclass(frozen=True, slots=True)
class Upload:
    """The id of a new upload, and the link to write it to."""

    id: UUID
    link: UploadLink


class Uploads:
    """Creates direct uploads. Stateless. A link is valid for `lifetime_s` seconds."""

    def __init__(
        self, store: UploadStore, blobs: BlobStore, limits: UploadLimits, lifetime_s: int
    ) -> None:
        self._store = store
        self._blobs = blobs
        self._limits = limits
        self._lifetime_s = lifetime_s

    async def begin(
        self,
        owner: str,
        content_type: ImageType,
        size_bytes: int,
        sha256: str | None = None,
        quotas: Quotas | None = None,
    ) -> Upload:
        """Return a new upload of `size_bytes`, with the hex `sha256` if it is given.

        Raises ImageTooLarge, QueueFull, StorageFull, DependencyUnavailable.
        """
        check_size_bytes(size_bytes, self._limits)
        upload_id, new = uuid4(), NewUpload(content_type.value, size_bytes, sha256)
        key = upload_key(owner, upload_id)
        link = await self._blobs.upload_link(key, new, self._lifetime_s)
        counted_s = self._lifetime_s + UNUSED_AFTER_S
        await self._store.begin(upload_id, owner, size_bytes, counted_s, quotas)
        return Upload(upload_id, link)

    async def size_of(self, owner: str, upload_id: UUID) -> int:
        """Return the announced size in bytes; 0 if the owner has no such unused upload."""
        return await self._store.size_of(upload_id, owner) or 0
