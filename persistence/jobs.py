"""JobStore on Postgres: what it reads and inserts. What changes a state is in `transitions`.

Each call is one transaction in which nothing depends on an earlier one, so that a call whose
answer was lost may be made again.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any
from uuid import UUID

from sqlalchemy import Connection, Select, or_, select, tuple_
from sqlalchemy.dialects.postgresql import insert

from persistence import deliveries, transitions
from persistence.cursors import Cursor
from persistence.database import Database
from persistence.tables import jobs, new_row, to_job
from persistence.transitions import BEST_FIRST, CAN_BE_CLAIMED, RECLAIM_BATCH
from restoration.errors import IdempotencyConflict
from restoration.jobs import Artifact, AttemptRef, Failure, Job, JobPage, JobStatus, NewJob
from restoration.webhooks import Delivery

_NEWEST_FIRST = (jobs.c.created_at.desc(), jobs.c.id.desc())


class PostgresJobStore:
    """Holds nothing but the database; any number of stores may work on the same jobs."""

    def __init__(self, database: Database) -> None:
        self._database = database

    async def insert(self, job: NewJob) -> tuple[Job, bool]:
        """As the port says. Inserting an id again is taken for a repetition of the call."""
        return await self._database.run(partial(_insert, job))

    async def find_by_key(self, owner: str, idempotency_key: str) -> Job | None:
        key_used = (jobs.c.owner == owner) & (jobs.c.idempotency_key == idempotency_key)
        found = await self._database.run(partial(_fetch, select(jobs).where(key_used)))
        return found[0] if found else None

    async def get(self, job_id: UUID, owner: str | None = None) -> Job:
        query = select(jobs).where(jobs.c.id == job_id)
        if owner is not None:
            query = query.where(jobs.c.owner == owner)
        found = await self._database.run(partial(_fetch, query))
        if not found:
            raise transitions.job_not_found(job_id)
        return found[0]

    async def ended(self, job_ids: Sequence[UUID]) -> Sequence[Job]:
        final = [status for status in JobStatus if status.is_final]
        query = select(jobs).where(jobs.c.id.in_(job_ids), jobs.c.status.in_(final))
        return await self._database.run(partial(_fetch, query))

    async def list(
        self,
        owner: str,
        statuses: Sequence[JobStatus] = (),
        cursor: str | None = None,
        limit: int = 50,
    ) -> JobPage:
        query = select(jobs).where(jobs.c.owner == owner).order_by(*_NEWEST_FIRST)
        if statuses:
            query = query.where(jobs.c.status.in_(statuses))
        if cursor is not None:
            last = Cursor.decode(cursor)
            position = tuple_(jobs.c.created_at, jobs.c.id)
            query = query.where(position < tuple_(last.created_at, last.id))
        # One more than asked for tells whether there is another page.
        found = await self._database.run(partial(_fetch, query.limit(limit + 1)))
        page = tuple(found[:limit])
        if len(found) <= limit:
            return JobPage(page, next_cursor=None)
        return JobPage(page, Cursor(page[-1].created_at, page[-1].id).encode())

    async def claim(self, worker: str, lease_s: float, workflows: Sequence[str]) -> Job | None:
        return await self._database.run(partial(transitions.claim, worker, lease_s, workflows))

    async def heartbeat(self, ref: AttemptRef, lease_s: float) -> JobStatus:
        return await self._database.run(partial(transitions.heartbeat, ref, lease_s))

    async def succeed(
        self, ref: AttemptRef, output: Artifact, timings_s: Mapping[str, float]
    ) -> Job:
        work = partial(transitions.succeed, ref, output, dict(timings_s))
        return await self._database.run(work)

    async def fail(self, ref: AttemptRef, failure: Failure) -> Job:
        return await self._database.run(partial(transitions.fail, ref, failure))

    async def release(self, ref: AttemptRef, failure: Failure | None, delay_s: float = 0) -> Job:
        return await self._database.run(partial(transitions.release, ref, failure, delay_s))

    async def request_cancel(self, job_id: UUID, owner: str | None = None) -> Job:
        """As the port says; a job that has ended is returned as it is."""
        return await self._database.run(partial(transitions.request_cancel, job_id, owner))

    async def reclaim(self, worker: str | None = None) -> Sequence[Job]:
        """As the port says, in transactions of a few jobs each."""
        reclaimed: list[Job] = []
        while True:
            batch = await self._database.run(partial(transitions.reclaim, worker))
            reclaimed += batch
            if len(batch) < RECLAIM_BATCH:
                return reclaimed

    async def waiting(self, limit: int) -> Sequence[AttemptRef]:
        query = select(jobs).where(CAN_BE_CLAIMED).order_by(*BEST_FIRST).limit(limit)
        found = await self._database.run(partial(_fetch, query))
        return [AttemptRef(job.id, job.attempt + 1) for job in found]

    async def deliveries(self, job_ids: Sequence[UUID]) -> Mapping[UUID, Delivery]:
        return await self._database.run(partial(deliveries.of_jobs, job_ids))

    async def ping(self) -> None:
        await self._database.run(_ping)


def _fetch(query: Select[Any], connection: Connection) -> list[Job]:
    return [to_job(row) for row in connection.execute(query).mappings()]


def _insert(job: NewJob, connection: Connection) -> tuple[Job, bool]:
    # While another transaction inserts the same key, this waits until that one has ended.
    statement = insert(jobs).values(new_row(job)).on_conflict_do_nothing().returning(jobs)
    row = connection.execute(statement).mappings().first()
    if row is not None:
        transitions.announce(connection)
        return to_job(row), True
    return _earlier(job, connection), False


def _earlier(job: NewJob, connection: Connection) -> Job:
    same = jobs.c.id == job.id
    if job.idempotency_key is not None:
        same = or_(same, jobs.c.idempotency_key == job.idempotency_key)
    query = select(jobs).where(jobs.c.owner == job.owner, same)
    row = connection.execute(query).mappings().one()
    if row["request_digest"] != job.request_digest:
        raise IdempotencyConflict(
            "the idempotency key was used for another request; send a new key",
            job_id=str(row["id"]),
        )
    return to_job(row)


def _ping(connection: Connection) -> None:
    connection.execute(select(1))
