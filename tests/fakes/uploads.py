"""An in-memory UploadStore; the job store in memory counts its bytes."""

from __future__ import annotations

from dataclasses import dataclass
from uuid import UUID

from restoration.limits.quotas import Quotas
from tests.fakes.job_store import MemoryJobStore


@dataclass
class MemoryUploadStore:
    jobs: MemoryJobStore

    async def begin(
        self,
        upload_id: UUID,
        owner: str,
        size_bytes: int,
        lifetime_s: float,
        quotas: Quotas | None = None,
    ) -> None:
        await self.jobs.check_room(owner, quotas, size_bytes)
        uploading = self.jobs.uploading_bytes(owner) + size_bytes
        (quotas or self.jobs.policy.quotas).check_uploading(uploading)
        self.jobs.uploads[upload_id] = (owner, size_bytes)

    async def size_of(self, upload_id: UUID, owner: str) -> int | None:
        name, size_bytes = self.jobs.uploads.get(upload_id, ("", None))
        return size_bytes if name == owner else None
