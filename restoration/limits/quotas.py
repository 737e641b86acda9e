"""Limits for one owner. 0 means no limit.

The settings give the defaults; a claim in a token may replace any of them for its owner.
"""

from __future__ import annotations

from typing import Self

from pydantic import BaseModel, ConfigDict, Field

from restoration.errors import QueueFull, StorageFull
from restoration.images import MEBIBYTE

# Retry-After of QueueFull: a few jobs have ended by then.
RETRY_AFTER_S = 10
# Retry-After of StorageFull: retention (actors.leader.retention) has run by then.
STORAGE_RETRY_AFTER_S = 3600
# A whole batch of the largest photos.
UPLOADING_BYTES = 1000 * 50 * MEBIBYTE
_MOST = 2**31 - 1  # largest value of an integer column in Postgres
_MOST_BYTES = 2**53  # larger numbers are not exact in JSON


class Quotas(BaseModel):
    """The limits of one owner.

    `requests_per_minute` counts requests that change something; reads are never refused.
    `uploading_bytes` counts direct uploads without a job yet, which `stored_bytes` includes.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    requests_per_minute: int = Field(6_000, ge=0, le=_MOST)
    waiting_jobs: int = Field(10_000, ge=0, le=_MOST)
    running_jobs: int = Field(0, ge=0, le=_MOST)
    stored_bytes: int = Field(0, ge=0, le=_MOST_BYTES)
    uploading_bytes: int = Field(UPLOADING_BYTES, ge=0, le=_MOST_BYTES)

    def replaced(self, claim: object) -> Self:
        """Return a copy with the limits that a token's claim names.

        Raises ValueError if the claim is not an object of valid limits.
        """
        if not isinstance(claim, dict):
            raise ValueError("the quotas must be a JSON object")
        return type(self).model_validate({**self.model_dump(), **claim})

    def check_waiting(self, waiting: int) -> None:
        """Raise QueueFull if `waiting` jobs exceed the limit."""
        if 0 < self.waiting_jobs < waiting:
            raise queue_full("your queue is full", self.waiting_jobs)

    def check_stored(self, stored_bytes: int) -> None:
        """Raise StorageFull if `stored_bytes` exceed the limit."""
        if 0 < self.stored_bytes < stored_bytes:
            raise StorageFull(
                "your photos and results would exceed your storage limit of "
                f"{self.stored_bytes} bytes; they expire some time after their jobs have "
                "ended",
                limit=self.stored_bytes,
                retry_after_s=STORAGE_RETRY_AFTER_S,
            )

    def check_uploading(self, uploading_bytes: int) -> None:
        """Raise StorageFull if the `uploading_bytes` announced exceed the limit."""
        if 0 < self.uploading_bytes < uploading_bytes:
            raise StorageFull(
                f"your direct uploads would exceed the limit of {self.uploading_bytes} "
                "bytes; submit the photos that you have sent: unused uploads are removed "
                "some time after their links expire",
                limit=self.uploading_bytes,
                retry_after_s=RETRY_AFTER_S,
            )


def queue_full(what: str, limit: int) -> QueueFull:
    return QueueFull(
        f"{what}: at most {limit} jobs may wait; try again later",
        limit=limit,
        retry_after_s=RETRY_AFTER_S,
    )
