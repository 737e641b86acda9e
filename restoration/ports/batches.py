"""The port to the store of batches."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol
from uuid import UUID

from restoration.batches import BatchItem, BatchPage, JobBatch, NewBatch
from restoration.jobs import NewJob
from restoration.limits.quotas import Quotas


class BatchStore(Protocol):
    """The authoritative store of batches, whose jobs are in the store of jobs.

    Methods raise BatchNotFound for a missing batch and, with `owner`, for another owner's.
    """

    async def insert(
        self, batch: NewBatch, jobs: Sequence[NewJob], quotas: Quotas | None = None
    ) -> tuple[JobBatch, bool]:
        """Record the batch and all its jobs in one transaction, and return (batch, True).

        Each job carries the batch's id. If the owner has used the idempotency key already, return
        (the earlier batch, False), or raise IdempotencyConflict if the request digests differ.
        `quotas` work as in `JobSubmissions.insert`.
        """

    async def find_by_key(self, owner: str, idempotency_key: str) -> JobBatch | None: ...

    async def get(self, batch_id: UUID, owner: str | None = None) -> JobBatch: ...

    async def find(self, batch_ids: Sequence[UUID]) -> Sequence[JobBatch]:
        """Return those of the batches that exist, in any order."""

    async def list(self, owner: str, cursor: str | None = None, limit: int = 50) -> BatchPage:
        """Return a page of batches, newest first. Raises InvalidRequest for a foreign cursor."""

    async def items(
        self, batch_id: UUID, owner: str | None = None, first: int = 0, limit: int = 1000
    ) -> Sequence[BatchItem]:
        """Return up to `limit` photos in the order of their index, starting at index `first`."""

    async def request_cancel(self, batch_id: UUID, owner: str | None = None) -> JobBatch:
        """Cancel each job of the batch as `JobAccess.request_cancel` does. Idempotent."""
