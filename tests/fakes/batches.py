"""An in-memory BatchStore on the jobs of a MemoryJobStore."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from uuid import UUID

from restoration.batches import BatchCounts, BatchItem, BatchPage, JobBatch, NewBatch
from restoration.errors import BatchNotFound, IdempotencyConflict, InvalidRequest
from restoration.jobs import Job, NewJob
from restoration.limits.quotas import Quotas
from tests.fakes.job_store import MemoryJobStore


@dataclass
class MemoryBatchStore:
    """`rows` is ordered by insertion. The store is down while its job store is."""

    jobs: MemoryJobStore
    rows: dict[UUID, tuple[NewBatch, datetime]] = field(default_factory=dict)
    idempotency_ttl_s: float = 86_400

    async def insert(
        self, batch: NewBatch, jobs: Sequence[NewJob], quotas: Quotas | None = None
    ) -> tuple[JobBatch, bool]:
        await self.jobs.ping()
        earlier = self.rows.get(batch.id)
        if earlier is None and batch.idempotency_key is not None:
            earlier = self._by_key(batch.owner, batch.idempotency_key)
        if earlier is None:
            sent_bytes = sum(job.input.size_bytes for job in jobs)
            await self.jobs.check_room(batch.owner, quotas, sent_bytes, len(jobs))
            self.rows[batch.id] = (batch, self.jobs.clock())
            for job in jobs:
                await self.jobs.insert(job, quotas)
            return await self.get(batch.id), True
        if earlier[0].request_digest != batch.request_digest:
            raise IdempotencyConflict("the key was used", batch_id=str(earlier[0].id))
        return await self.get(earlier[0].id), False

    async def find_by_key(self, owner: str, idempotency_key: str) -> JobBatch | None:
        await self.jobs.ping()
        found = self._by_key(owner, idempotency_key)
        return None if found is None else await self.get(found[0].id)

    async def get(self, batch_id: UUID, owner: str | None = None) -> JobBatch:
        batch, created_at = await self._find(batch_id, owner)
        statuses = Counter(job.status.value for job in self._members(batch_id).values())
        left = len(batch.names) - len(batch.refusals) - statuses.total()
        counts = BatchCounts(**statuses, refused=len(batch.refusals), expired=left)
        return JobBatch(
            batch.id, batch.owner, created_at, counts, batch.idempotency_key, batch.request_digest
        )

    async def find(self, batch_ids: Sequence[UUID]) -> Sequence[JobBatch]:
        await self.jobs.ping()
        return [await self.get(batch_id) for batch_id in batch_ids if batch_id in self.rows]

    async def list(self, owner: str, cursor: str | None = None, limit: int = 50) -> BatchPage:
        await self.jobs.ping()
        ids = [batch.id for batch, _ in reversed(self.rows.values()) if batch.owner == owner]
        if cursor is not None:
            if cursor not in map(str, ids):
                raise InvalidRequest("the cursor is invalid; follow the `next` path of a page")
            ids = ids[ids.index(UUID(cursor)) + 1 :]
        page = [await self.get(batch_id) for batch_id in ids[:limit]]
        return BatchPage(page, str(page[-1].id) if len(ids) > limit else None)

    async def items(
        self, batch_id: UUID, owner: str | None = None, first: int = 0, limit: int = 1000
    ) -> Sequence[BatchItem]:
        batch, _ = await self._find(batch_id, owner)
        refusals = {refusal.index: refusal.reason for refusal in batch.refusals}
        members, items = self._members(batch_id), []
        for index in range(first, min(first + limit, len(batch.names))):
            name = batch.names[index]
            if (job := members.get(index)) is not None:
                items.append(BatchItem(index, name, job.id, job.status, job.failure))
            else:
                items.append(BatchItem(index, name, None, None, refusals.get(index)))
        return items

    async def request_cancel(self, batch_id: UUID, owner: str | None = None) -> JobBatch:
        await self._find(batch_id, owner)
        for job in self._members(batch_id).values():
            await self.jobs.request_cancel(job.id)
        return await self.get(batch_id)

    def _by_key(self, owner: str, key: str) -> tuple[NewBatch, datetime] | None:
        lives_from = self.jobs.clock() - timedelta(seconds=self.idempotency_ttl_s)
        rows = (row for row in self.rows.values() if row[1] > lives_from)
        return next((r for r in rows if (r[0].owner, r[0].idempotency_key) == (owner, key)), None)

    async def _find(self, batch_id: UUID, owner: str | None) -> tuple[NewBatch, datetime]:
        await self.jobs.ping()
        row = self.rows.get(batch_id)
        if row is None or owner not in (None, row[0].owner):
            raise BatchNotFound("the batch does not exist", batch_id=str(batch_id))
        return row

    def _members(self, batch_id: UUID) -> dict[int, Job]:
        return {
            job.batch_index: job
            for job in self.jobs.rows.values()
            if job.batch_id == batch_id and job.batch_index is not None
        }
