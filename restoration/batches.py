"""Batches: up to a thousand photos that are submitted, watched and cancelled together. No I/O.

The jobs of a batch are ordinary jobs. A batch stores no status: it is computed from its jobs and
from the photos that were refused at submission.
"""

from __future__ import annotations

import unicodedata
from collections.abc import Sequence
from dataclasses import astuple, dataclass, field
from datetime import UTC, datetime, timedelta
from enum import StrEnum
from uuid import UUID

from restoration.jobs import Failure, JobStatus

MAX_BATCH_ITEMS = 1000
MAX_ITEM_NAME_CHARS = 255
_HARMFUL = frozenset({"Cc", "Cs", "Zl", "Zp"})  # controls, surrogates, line breaks
# Characters that change the direction of text.
_TURNING = frozenset("\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069")
# Longest time from a batch's first stored photo to its rows. Objects without a row are kept longer.
PUT_TOGETHER_S = 6 * 3600.0


def utc_now() -> datetime:
    return datetime.now(UTC)


class BatchStatus(StrEnum):
    RUNNING = "running"  # at least one job has not ended
    SUCCEEDED = "succeeded"  # every photo was restored
    PARTLY_FAILED = "partly_failed"  # some photos were restored, others failed or were refused
    FAILED = "failed"  # no photo was restored
    CANCELLED = "cancelled"  # every job has ended, at least one of them by a cancel

    @property
    def is_final(self) -> bool:
        return self is not BatchStatus.RUNNING


@dataclass(frozen=True, slots=True)
class BatchCounts:
    """Numbers of a batch's photos: jobs by status, refused photos and expired jobs.

    `expired` counts ended jobs whose rows were deleted by retention. `status` does not count them
    as failed.
    """

    queued: int = 0
    running: int = 0
    cancelling: int = 0
    succeeded: int = 0
    failed: int = 0
    cancelled: int = 0
    refused: int = 0
    expired: int = 0

    @property
    def total(self) -> int:
        return sum(astuple(self))

    @property
    def ended(self) -> int:
        return self.succeeded + self.failed + self.cancelled + self.refused + self.expired

    @property
    def status(self) -> BatchStatus:
        if self.ended < self.total:
            return BatchStatus.RUNNING
        if self.cancelled:
            return BatchStatus.CANCELLED
        if not self.succeeded + self.expired:
            return BatchStatus.FAILED
        return BatchStatus.PARTLY_FAILED if self.failed + self.refused else BatchStatus.SUCCEEDED


@dataclass(frozen=True, slots=True)
class Refusal:
    """The refusal of the photo at `index`; `reason` holds the error's code and message."""

    index: int
    reason: Failure


@dataclass(frozen=True, slots=True)
class NewBatch:
    """A batch to record. Each photo, by its index in `names`, has either a job or a refusal."""

    id: UUID
    owner: str
    names: tuple[str, ...]  # file names, for display
    refusals: tuple[Refusal, ...]
    idempotency_key: str | None = None
    # sha256 over the whole request, to detect another request with the same idempotency key
    request_digest: str | None = None
    begun_at: datetime = field(default_factory=utc_now)  # before its first photo was stored

    @property
    def is_stale(self) -> bool:
        """Return whether PUT_TOGETHER_S has passed, so that its photos may be deleted."""
        return utc_now() - self.begun_at > timedelta(seconds=PUT_TOGETHER_S)


@dataclass(frozen=True, slots=True)
class JobBatch:
    """A recorded batch. `created_at` is an aware datetime in UTC."""

    id: UUID
    owner: str
    created_at: datetime
    counts: BatchCounts
    idempotency_key: str | None = None
    request_digest: str | None = None

    @property
    def status(self) -> BatchStatus:
        return self.counts.status


@dataclass(frozen=True, slots=True)
class BatchItem:
    """One photo of a batch.

    `status` and `job_id` are None without a job: the photo was refused, with the reason in
    `failure`, or retention deleted the job's row.
    """

    index: int
    name: str
    job_id: UUID | None
    status: JobStatus | None
    failure: Failure | None


@dataclass(frozen=True, slots=True)
class BatchPage:
    """A page of batches, newest first. `next_cursor` is opaque, and None on the last page."""

    batches: Sequence[JobBatch]
    next_cursor: str | None


def item_name(name: str) -> str:
    """Return a file name that is safe to store and show.

    It is cut to MAX_ITEM_NAME_CHARS. Control characters, which can move a terminal's cursor, and
    characters that change the direction of text are replaced by U+FFFD.
    """
    # Other spaces and joiners are kept: ordinary names contain them.
    kept = (
        "\N{REPLACEMENT CHARACTER}"
        if unicodedata.category(char) in _HARMFUL or char in _TURNING
        else char
        for char in name[:MAX_ITEM_NAME_CHARS]
    )
    return "".join(kept)
