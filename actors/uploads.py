"""Direct uploads: a client writes its photo into S3 by itself, and then makes one job of it.

There is no record of an upload but its object: what may be written is in the link's signature,
whose it is in the object's key, and that only one job is made of it in the job's id, which is the
upload's. What nobody uses, the sweeper removes.
"""

from __future__ import annotations

from dataclasses import dataclass
from uuid import UUID, uuid4

from persistence.keys import upload_key
from restoration.errors import UploadNotFound
from restoration.images import ImageType, UploadLimits, check_size_bytes
from restoration.ports import BlobStore, NewUpload, UploadLink


@dataclass(frozen=True, slots=True)
class Upload:
    """An upload that may begin: its id, and where to write it to."""

    id: UUID
    link: UploadLink


class Uploads:
    """Holds no state of its own. `lifetime_s` is how long a link is good for."""

    def __init__(self, blobs: BlobStore, limits: UploadLimits, lifetime_s: int) -> None:
        self._blobs = blobs
        self._limits = limits
        self._lifetime_s = lifetime_s

    async def begin(
        self, owner: str, content_type: ImageType, size_bytes: int, sha256: str | None = None
    ) -> Upload:
        """Raises ImageTooLarge, DependencyUnavailable."""
        check_size_bytes(size_bytes, self._limits)
        upload_id, new = uuid4(), NewUpload(content_type.value, size_bytes, sha256)
        key = upload_key(owner, upload_id)
        return Upload(upload_id, await self._blobs.upload_link(key, new, self._lifetime_s))


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
