"""JSON models of batches."""

from __future__ import annotations

from dataclasses import asdict
from datetime import datetime
from typing import Literal
from uuid import UUID

from pydantic import Field

from restoration.batches import BatchItem, BatchStatus, JobBatch
from restoration.jobs import JobStatus
from serve_app.schemas.restorations import FailureView, View


class BatchCountsView(View):
    """The number of the batch's photos in each status; together they make up its size."""

    queued: int
    running: int
    cancelling: int
    succeeded: int
    failed: int
    cancelled: int
    refused: int = Field(description="photos that could not be used, and so have no job")
    expired: int = Field(description="jobs that ended so long ago that they are forgotten")


class BatchLinks(View):
    """Paths of related resources on this host."""

    self_: str = Field(alias="self")
    items: str
    events: str
    cancel: str


class BatchProgress(View):
    """The status of a batch; also the data of its event stream."""

    status: BatchStatus = Field(
        description="`running` until every job has ended; then `cancelled` if any job was, "
        "`succeeded` if every photo is restored, `failed` if none is, else `partly_failed`"
    )
    counts: BatchCountsView


class BatchView(BatchProgress):
    """Photos that were submitted together."""

    id: UUID
    size: int
    created_at: datetime
    links: BatchLinks


class BatchItemView(View):
    """One photo of a batch: its job, or the reason why it has none."""

    index: int = Field(description="its place in the submission, from 0")
    name: str = Field(description="the file's name as it was sent")
    status: JobStatus | Literal["refused", "expired"]
    job_id: UUID | None = Field(description="the restoration's id; null when there is none")
    failure: FailureView | None = Field(description="why the job failed or the photo was refused")


class BatchItems(View):
    """A page of a batch's photos, in the order of submission."""

    items: tuple[BatchItemView, ...]
    next: str | None = Field(description="path of the next page; null on the last")


class SubmittedBatchView(BatchView):
    """A batch with all of its photos."""

    items: tuple[BatchItemView, ...]


class BatchList(View):
    """A page of batches, newest first."""

    batches: tuple[BatchView, ...]
    next: str | None = Field(description="path of the next page; null on the last")


def batch_view(batch: JobBatch, links: BatchLinks) -> BatchView:
    return BatchView(
        **dict(BatchProgress.model_validate(batch)),
        id=batch.id,
        size=batch.counts.total,
        created_at=batch.created_at,
        links=links,
    )


def batch_item_view(item: BatchItem) -> BatchItemView:
    status = item.status or ("refused" if item.failure else "expired")
    return BatchItemView.model_validate(asdict(item) | {"status": status})
