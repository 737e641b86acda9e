"""A batch: up to a thousand photos that were submitted, are watched and cancelled as one.

Its jobs are jobs like any other. A batch has no state of its own: how it stands is computed from
its jobs, and from the photos that were refused when it came in. Pure.
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
_HARMFUL = frozenset({"Cc", "Cs", "Zl", "Zp"})  # controls, surrogates, breaks of lines
_TURNING = frozenset("\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069")
# From a batch's first photo to its rows. Objects without a row are kept for longer than that.
PUT_TOGETHER_S = 6 * 3600.0


def utc_now() -> datetime:
    return datetime.now(UTC)


class BatchStatus(StrEnum):
    RUNNING = "running"  # at least one of its jobs has not ended
    SUCCEEDED = "succeeded"  # every photo is restored
    PARTLY_FAILED = "partly_failed"  # some are restored, others failed or were refused
    FAILED = "failed"  # none is restored
    CANCELLED = "cancelled"  # all has ended, and some of it because of a cancel

    @property
    def is_final(self) -> bool:
        return self is not BatchStatus.RUNNING


@dataclass(frozen=True, slots=True)
class BatchCounts:
    """How many of a batch's photos are where: its jobs by status, and the photos without one.

    `expired` are jobs that ended so long ago that their rows are gone; the others say how it went.
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
    """Why the photo at `index` was not accepted; `reason` is that of the error that refused it."""

    index: int
    reason: Failure


@dataclass(frozen=True, slots=True)
class NewBatch:
    """What a submission writes. Photo `index` of `names` has either a job or a refusal."""

    id: UUID
    owner: str
    names: tuple[str, ...]  # the files' names, for people
    refusals: tuple[Refusal, ...]
    idempotency_key: str | None = None
    # sha256 over everything the request asked for: the same key must mean the same request
    request_digest: str | None = None
    begun_at: datetime = field(default_factory=utc_now)  # before its first photo was stored

    @property
    def is_stale(self) -> bool:
        """Whether its photos may be gone soon, if they are not already."""
        return utc_now() - self.begun_at > timedelta(seconds=PUT_TOGETHER_S)


@dataclass(frozen=True, slots=True)
class JobBatch:
    """A batch as its rows have it. `created_at` is UTC and aware."""

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
    """One photo. `status` and `job_id` are None when there is no job: it was refused, and
    `failure` says why, or its row is gone."""

    index: int
    name: str
    job_id: UUID | None
    status: JobStatus | None
    failure: Failure | None


@dataclass(frozen=True, slots=True)
class BatchPage:
    """Newest first. `next_cursor` is opaque, and None on the last page."""

    batches: Sequence[JobBatch]
    next_cursor: str | None


def item_name(name: str) -> str:
    """A file's name, fit to be stored and shown: short, and without what moves a terminal's
    cursor or turns the direction of its text."""
    return "".join(c if _is_harmless(c) else "\N{REPLACEMENT CHARACTER}" for c in name)[
        :MAX_ITEM_NAME_CHARS
    ]


def _is_harmless(char: str) -> bool:
    """Spaces of every width and joiners of letters stand in ordinary names."""
    return unicodedata.category(char) not in _HARMFUL and char not in _TURNING
