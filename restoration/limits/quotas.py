"""What one owner may have and do at a time. 0 is no limit.

The settings give everybody's; a token's claim may replace any of them for its bearer.
"""

from __future__ import annotations

from typing import Self

from pydantic import BaseModel, ConfigDict, Field

from restoration.errors import QueueFull, StorageFull
from restoration.images import MEBIBYTE

# What a client is told to wait before it sends again: by then a few jobs have ended ...
RETRY_AFTER_S = 10
# ... and what is kept has been looked through for what may go (actors.leader.retention).
STORAGE_RETRY_AFTER_S = 3600
# A whole batch of the largest photos.
UPLOADING_BYTES = 1000 * 50 * MEBIBYTE
_MOST = 2**31 - 1  # what Postgres' integer holds
_MOST_BYTES = 2**53  # beyond, JSON's numbers are not exact


class Quotas(BaseModel):
    """`requests_per_minute` counts what changes something; reads are never refused.

    `uploading_bytes` are those of direct uploads that no job was made of yet, which count in
    `stored_bytes` as well.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    requests_per_minute: int = Field(6_000, ge=0, le=_MOST)
    waiting_jobs: int = Field(10_000, ge=0, le=_MOST)
    running_jobs: int = Field(0, ge=0, le=_MOST)
    stored_bytes: int = Field(0, ge=0, le=_MOST_BYTES)
    uploading_bytes: int = Field(UPLOADING_BYTES, ge=0, le=_MOST_BYTES)

    def replaced(self, claim: object) -> Self:
        """These with those that a token's claim names. Raises ValueError for any other claim."""
        if not isinstance(claim, dict):
            raise ValueError("its quotas are not an object")
        return type(self).model_validate({**self.model_dump(), **claim})

    def check_waiting(self, waiting: int) -> None:
        """Raise QueueFull if more jobs than may would wait."""
        if 0 < self.waiting_jobs < waiting:
            raise queue_full("as many of your jobs wait as may", self.waiting_jobs)

    def check_stored(self, stored_bytes: int) -> None:
        """Raise StorageFull if more bytes than may would be stored."""
        if 0 < self.stored_bytes < stored_bytes:
            raise StorageFull(
                f"your photos and results would take more than {self.stored_bytes} bytes; "
                "they are removed some time after their jobs have ended",
                limit=self.stored_bytes,
                retry_after_s=STORAGE_RETRY_AFTER_S,
            )

    def check_uploading(self, uploading_bytes: int) -> None:
        """Raise StorageFull if more bytes than may would be announced."""
        if 0 < self.uploading_bytes < uploading_bytes:
            raise StorageFull(
                f"your direct uploads would announce more than {self.uploading_bytes} bytes; submit"
                " those that have been sent: the others are forgotten some time after their links",
                limit=self.uploading_bytes,
                retry_after_s=RETRY_AFTER_S,
            )


def queue_full(what: str, limit: int) -> QueueFull:
    return QueueFull(
        f"{what} ({limit}); send it again later", limit=limit, retry_after_s=RETRY_AFTER_S
    )
