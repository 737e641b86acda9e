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
    """Number of the batch's photos in each status. The sum is the batch's size."""

    queued: int
    running: int
    cancelling: int
    succeeded: int
    failed: int
    cancelled: int
    refused: int = Field(description="Photos that were refused and have no job.")
    expired: int = Field(
        description="Photos whose jobs were removed at the end of their retention."
    )


class BatchLinks(View):
    """Paths of related resources on this host."""

    self_: str = Field(alias="self")
    items: str
    events: str
    cancel: str


class BatchProgress(View):
    """The status of a batch; also the data of its event stream."""

    status: BatchStatus = Field(
        description="`running` until all jobs have ended; then `cancelled` if any job was "
        "cancelled, `succeeded` if all photos are restored, `failed` if none is, otherwise "
        "`partly_failed`."
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

    index: int = Field(description="Position of the photo in the submission, from 0.")
    name: str = Field(description="Name of the file as it was sent.")
    status: JobStatus | Literal["refused", "expired"]
    job_id: UUID | None = Field(description="Id of the photo's job, or null if it has none.")
    failure: FailureView | None = Field(
        description="Reason why the job failed or the photo was refused."
    )


class BatchItems(View):
    """A page of a batch's photos, in the order of submission."""

    items: tuple[BatchItemView, ...]
    next: str | None = Field(description="Path of the next page, or null on the last page.")


class SubmittedBatchView(BatchView):
    """A batch with all of its photos."""

    items: tuple[BatchItemView, ...]


class BatchList(View):
    """A page of batches, newest first."""

    batches: tuple[BatchView, ...]
    next: str | None = Field(description="Path of the next page, or null on the last page.")


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
