"""BatchStore on Postgres.

A batch and its jobs are inserted in one transaction. Its status is counted from the jobs on each
read. As in `jobs`, calls may be repeated.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from datetime import timedelta
from functools import partial
from typing import Any
from uuid import UUID

from sqlalchemy import (
    ColumnElement,
    Connection,
    Select,
    func,
    or_,
    select,
    tuple_,
    update,
)
from sqlalchemy.dialects.postgresql import insert

from persistence.postgres import queue_room, transitions, webhook_outbox
from persistence.postgres.cursors import Cursor
from persistence.postgres.database import Database
from persistence.postgres.rows import new_row, to_job
from persistence.postgres.tables import batches, jobs
from restoration.batches import (
    BatchCounts,
    BatchItem,
    BatchPage,
    JobBatch,
    NewBatch,
)
from restoration.errors import BatchNotFound, IdempotencyConflict
from restoration.jobs import Failure, JobStatus, NewJob
from restoration.limits.quotas import Quotas
from restoration.queue_policy import QueuePolicy

# A cancel locks this many jobs at a time, so that no other transaction waits long for it.
CANCEL_BATCH = 100

_NEWEST_FIRST = (batches.c.created_at.desc(), batches.c.id.desc())
_SUMMARY = select(
    batches.c.id,
    batches.c.owner,
    batches.c.created_at,
    batches.c.idempotency_key,
    batches.c.request_digest,
    batches.c.size,
    func.json_array_length(batches.c.refusals).label("refused"),
)
_CAN_BE_CANCELLED = (JobStatus.QUEUED, JobStatus.RUNNING)


class PostgresBatchStore:
    """BatchStore without state of its own, on the database that holds the jobs."""

    def __init__(self, database: Database, policy: QueuePolicy | None = None) -> None:
        self._database = database
        self._policy = policy or QueuePolicy()

    async def insert(
        self, batch: NewBatch, jobs: Sequence[NewJob], quotas: Quotas | None = None
    ) -> tuple[JobBatch, bool]:
        """See BatchStore. Inserting the same id again counts as a repetition of the call."""
        return await self._database.run(partial(_insert, batch, jobs, self._policy, quotas))

    async def find_by_key(self, owner: str, idempotency_key: str) -> JobBatch | None:
        lives = ~_key_expired(self._policy.idempotency_ttl_s)
        query = _SUMMARY.where(_key_used(owner, idempotency_key), lives)
        found = await self._database.run(partial(_fetch, query))
        return found[0] if found else None

    async def get(self, batch_id: UUID, owner: str | None = None) -> JobBatch:
        return await self._database.run(partial(_get, batch_id, owner))

    async def find(self, batch_ids: Sequence[UUID]) -> Sequence[JobBatch]:
        query = _SUMMARY.where(batches.c.id.in_(batch_ids))
        return await self._database.run(partial(_fetch, query))

    async def list(self, owner: str, cursor: str | None = None, limit: int = 50) -> BatchPage:
        query = _SUMMARY.where(batches.c.owner == owner).order_by(*_NEWEST_FIRST)
        if cursor is not None:
            last = Cursor.decode(cursor)
            position = tuple_(batches.c.created_at, batches.c.id)
            query = query.where(position < tuple_(last.created_at, last.id))
        # Fetch one more than asked for, to know whether there is another page.
        found = await self._database.run(partial(_fetch, query.limit(limit + 1)))
        page = found[:limit]
        if len(found) <= limit:
            return BatchPage(page, next_cursor=None)
        return BatchPage(page, Cursor(page[-1].created_at, page[-1].id).encode())

    async def items(
        self, batch_id: UUID, owner: str | None = None, first: int = 0, limit: int = 1000
    ) -> Sequence[BatchItem]:
        query = _owned(select(batches.c.names, batches.c.refusals), batch_id, owner)
        in_page = jobs.c.batch_index.between(first, first + limit - 1)
        members = select(jobs).where(jobs.c.batch_id == batch_id, in_page)

        def work(connection: Connection) -> Sequence[BatchItem]:
            row = connection.execute(query).mappings().first()
            if row is None:
                raise _not_found(batch_id)
            refusals = {each["index"]: each for each in row["refusals"]}
            found = map(to_job, connection.execute(members).mappings())
            accepted = {job.batch_index: job for job in found}
            items = []
            for index, name in list(enumerate(row["names"]))[first : first + limit]:
                if (job := accepted.get(index)) is not None:
                    items.append(BatchItem(index, name, job.id, job.status, job.failure))
                else:
                    refusal = refusals.get(index)
                    reason = Failure(refusal["code"], refusal["message"]) if refusal else None
                    items.append(BatchItem(index, name, None, None, reason))
            return items

        return await self._database.run(work)

    async def request_cancel(self, batch_id: UUID, owner: str | None = None) -> JobBatch:
        """See BatchStore. Uses a transaction for every CANCEL_BATCH jobs."""
        await self.get(batch_id, owner)
        query = (
            select(jobs)
            .where(jobs.c.batch_id == batch_id, jobs.c.status.in_(_CAN_BE_CANCELLED))
            .order_by(jobs.c.batch_index)
            .limit(CANCEL_BATCH)
            .with_for_update()
        )

        def cancel_some(connection: Connection) -> int:
            found = [to_job(row) for row in connection.execute(query).mappings()]
            for job in found:
                transitions.cancel(job, connection)
            return len(found)

        while await self._database.run(cancel_some) == CANCEL_BATCH:
            pass
        return await self.get(batch_id, owner)


def _insert(
    batch: NewBatch,
    new_jobs: Sequence[NewJob],
    policy: QueuePolicy,
    quotas: Quotas | None,
    connection: Connection,
) -> tuple[JobBatch, bool]:
    if batch.idempotency_key is not None:
        key_used = _key_used(batch.owner, batch.idempotency_key)
        free = update(batches).where(key_used, _key_expired(policy.idempotency_ttl_s))
        connection.execute(free.values(idempotency_key=None))
    refusals = [
        {"index": refusal.index, "code": refusal.reason.code, "message": refusal.reason.message}
        for refusal in batch.refusals
    ]
    statement = insert(batches).values(
        id=batch.id,
        owner=batch.owner,
        size=len(batch.names),
        names=list(batch.names),
        refusals=refusals,
        idempotency_key=batch.idempotency_key,
        request_digest=batch.request_digest,
    )
    # This waits for another transaction that inserts the same key.
    recorded = statement.on_conflict_do_nothing().returning(batches.c.id)
    if connection.execute(recorded).first() is None:
        return _earlier(batch, connection), False
    if new_jobs:
        # One statement, because executemany does not accept the rows' SQL expressions (now()).
        connection.execute(insert(jobs).values([new_row(job) for job in new_jobs]))
        queue_room.admit(policy, batch.owner, quotas, policy.running_limit(quotas), connection)
        transitions.announce(connection)
        for job in new_jobs:
            if job.reused is not None:
                webhook_outbox.enqueue(job, connection)
    return _get(batch.id, batch.owner, connection), True


def _key_used(owner: str, key: str) -> ColumnElement[bool]:
    return (batches.c.owner == owner) & (batches.c.idempotency_key == key)


def _key_expired(ttl_s: float) -> ColumnElement[bool]:
    return batches.c.created_at <= func.now() - timedelta(seconds=ttl_s)


def _earlier(batch: NewBatch, connection: Connection) -> JobBatch:
    same = batches.c.id == batch.id
    if batch.idempotency_key is not None:
        same = or_(same, batches.c.idempotency_key == batch.idempotency_key)
    [earlier] = _fetch(_SUMMARY.where(batches.c.owner == batch.owner, same), connection)
    if earlier.request_digest != batch.request_digest:
        raise IdempotencyConflict(
            "this Idempotency-Key was used for a different batch; use a new key",
            batch_id=str(earlier.id),
        )
    return earlier


def _fetch(query: Select[Any], connection: Connection) -> Sequence[JobBatch]:
    rows = connection.execute(query).mappings().all()
    counting = (
        select(jobs.c.batch_id, jobs.c.status, func.count())
        .where(jobs.c.batch_id.in_([row["id"] for row in rows]))
        .group_by(jobs.c.batch_id, jobs.c.status)
    )
    by_status: dict[UUID, dict[str, int]] = defaultdict(dict)
    for batch_id, status, count in connection.execute(counting):
        by_status[batch_id][status] = count
    found = []
    for row in rows:
        counts = by_status[row["id"]]
        left = row["size"] - row["refused"] - sum(counts.values())
        found.append(
            JobBatch(
                id=row["id"],
                owner=row["owner"],
                created_at=row["created_at"],
                counts=BatchCounts(**counts, refused=row["refused"], expired=left),
                idempotency_key=row["idempotency_key"],
                request_digest=row["request_digest"],
            )
        )
    return found


def _get(batch_id: UUID, owner: str | None, connection: Connection) -> JobBatch:
    found = _fetch(_owned(_SUMMARY, batch_id, owner), connection)
    if not found:
        raise _not_found(batch_id)
    return found[0]


def _owned(query: Select[Any], batch_id: UUID, owner: str | None) -> Select[Any]:
    query = query.where(batches.c.id == batch_id)
    return query if owner is None else query.where(batches.c.owner == owner)


def _not_found(batch_id: UUID) -> BatchNotFound:
    return BatchNotFound("the batch does not exist", batch_id=str(batch_id))
