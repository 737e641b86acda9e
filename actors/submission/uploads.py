"""Direct uploads: a client writes its photo into S3 by itself, and then makes one job of it.

What may be written is in the link's signature, whose it is in the object's key, and that only one
job is made of it in the job's id, which is the upload's. Its bytes count as stored from the moment
in which the link is given, until a job is made of them or the sweeper removes them.
"""

from __future__ import annotations

from dataclasses import dataclass
from uuid import UUID, uuid4

from persistence.objects.keys import upload_key
from restoration.errors import UploadNotFound
from restoration.images import ImageType, UploadLimits, check_size_bytes
from restoration.limits.quotas import Quotas
from restoration.ports import BlobStore, NewUpload, UploadLink, UploadStore

UNUSED_AFTER_S = 3600.0  # an upload is for one use, soon after its link has ended


@dataclass(frozen=True, slots=True)
class Upload:
    """An upload that may begin: its id, and where to write it to."""

    id: UUID
    link: UploadLink


class Uploads:
    """Holds no state of its own. `lifetime_s` is how long a link is good for."""

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
        """Raises ImageTooLarge, QueueFull, StorageFull, DependencyUnavailable."""
        check_size_bytes(size_bytes, self._limits)
        upload_id, new = uuid4(), NewUpload(content_type.value, size_bytes, sha256)
        key = upload_key(owner, upload_id)
        link = await self._blobs.upload_link(key, new, self._lifetime_s)
        counted_s = self._lifetime_s + UNUSED_AFTER_S
        await self._store.begin(upload_id, owner, size_bytes, counted_s, quotas)
        return Upload(upload_id, link)

    async def size_of(self, owner: str, upload_id: UUID) -> int:
        """The bytes that were announced; 0 for what is no upload of the owner's, or was used."""
        return await self._store.size_of(upload_id, owner) or 0


async def fetch_upload(
    blobs: BlobStore, owner: str, upload_id: UUID, limits: UploadLimits
) -> bytes:
    """The bytes of an owner's upload, as unknown as any: at most one more than allowed.

    Raises UploadNotFound, which does not tell whether it never was or is somebody else's.
    """
    data = await blobs.fetch(upload_key(owner, upload_id), limits.max_bytes)
    if data is None:
        raise UploadNotFound("there is no such upload, or nothing has been sent to it yet")
    return data
