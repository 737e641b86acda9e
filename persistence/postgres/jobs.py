"""The store of jobs on Postgres: reads and inserts. `transitions` has the changes of state.

Each call changes a job in one transaction and does not depend on earlier calls, so a call whose
answer was lost may be repeated.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import suppress
from datetime import timedelta
from functools import partial
from typing import Any
from uuid import UUID

from sqlalchemy import Connection, Select, and_, bindparam, func, or_, select, tuple_, update

from persistence.postgres import fair_queue, queue_room, transitions, webhook_outbox
from persistence.postgres.cursors import Cursor
from persistence.postgres.database import Database
from persistence.postgres.leadership import LOOK, hint_of
from persistence.postgres.rows import insertion, to_job
from persistence.postgres.tables import jobs
from persistence.postgres.transitions import RECLAIM_BATCH
from persistence.postgres.uploads import end_upload
from restoration.affinity import Affinity
from restoration.errors import IdempotencyConflict, InputExpired, UploadUsed
from restoration.jobs import Artifact, AttemptRef, Failure, Job, JobPage, JobStatus, NewJob
from restoration.limits.quotas import Quotas
from restoration.queue_policy import QueuePolicy
from restoration.reuse import work_key
from restoration.scaling import Demand
from restoration.webhooks.messages import Delivery

# Limit of one call of `expire`, so that the leader can send tickets in between.
EXPIRE_AT_MOST = 20 * RECLAIM_BATCH

_NEWEST_FIRST = (jobs.c.created_at.desc(), jobs.c.id.desc())

# Built once, because building a statement with so many columns takes longer than executing it.
_ONE = select(jobs).where(jobs.c.id == bindparam("job_id"))
_ONE_OF_OWNER = _ONE.where(jobs.c.owner == bindparam("of_owner"))


class PostgresJobStore:
    """All ports of `restoration.ports.jobs`, without state: any number may share a database."""

    def __init__(self, database: Database, policy: QueuePolicy | None = None) -> None:
        self._database = database
        self._policy = policy or QueuePolicy()

    async def insert(self, job: NewJob, quotas: Quotas | None = None) -> tuple[Job, bool]:
        """See JobSubmissions. Inserting the same id again counts as a repetition of the call."""
        return await self._database.run(partial(_insert, job, self._policy, quotas))

    async def find_by_key(self, owner: str, idempotency_key: str) -> Job | None:
        key_used = (jobs.c.owner == owner) & (jobs.c.idempotency_key == idempotency_key)
        lives = jobs.c.created_at > func.now() - timedelta(seconds=self._policy.idempotency_ttl_s)
        found = await self._fetch(select(jobs).where(key_used, lives))
        return found[0] if found else None

    async def check_room(
        self, owner: str, quotas: Quotas | None = None, more_bytes: int = 0
    ) -> None:
        work = partial(queue_room.check_room, self._policy, owner, quotas, more_bytes)
        await self._database.run(work, atomic=False)

    async def get(self, job_id: UUID, owner: str | None = None) -> Job:
        query = _ONE if owner is None else _ONE_OF_OWNER
        found = await self._fetch(query, {"job_id": job_id, "of_owner": owner})
        if not found:
            raise transitions.job_not_found(job_id)
        return found[0]

    async def find_result(self, job: NewJob) -> Job | None:
        query = (
            select(jobs)
            .where(
                jobs.c.work_key == work_key(job),
                jobs.c.owner == job.owner,
                jobs.c.status == JobStatus.SUCCEEDED,
                jobs.c.output_expired_at.is_(None),
            )
            .order_by(jobs.c.finished_at.desc())
            .limit(1)
        )
        found = await self._fetch(query)
        return found[0] if found else None

    async def find(self, job_ids: Sequence[UUID]) -> Sequence[Job]:
        return await self._fetch(select(jobs).where(jobs.c.id.in_(job_ids)))

    async def ended(self, job_ids: Sequence[UUID]) -> Sequence[Job]:
        final = [status for status in JobStatus if status.is_final]
        query = select(jobs).where(jobs.c.id.in_(job_ids), jobs.c.status.in_(final))
        return await self._fetch(query)

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
        # Fetch one more than asked for, to know whether there is another page.
        found = await self._fetch(query.limit(limit + 1))
        page = tuple(found[:limit])
        if len(found) <= limit:
            return JobPage(page, next_cursor=None)
        return JobPage(page, Cursor(page[-1].created_at, page[-1].id).encode())

    async def claim(
        self,
        worker: str,
        lease_s: float,
        workflows: Sequence[str],
        affinity: Affinity | None = None,
    ) -> Job | None:
        work = partial(transitions.claim, worker, lease_s, workflows, affinity=affinity)
        while True:
            with suppress(transitions.Overtaken):
                return await self._database.run(work, atomic=False)

    async def heartbeat(self, ref: AttemptRef, lease_s: float) -> JobStatus:
        return await self._database.run(partial(transitions.heartbeat, ref, lease_s), atomic=False)

    async def succeed(
        self, ref: AttemptRef, output: Artifact, timings_s: Mapping[str, float]
    ) -> Job:
        timings_s = dict(timings_s)
        quick = partial(transitions.succeed_quietly, ref, output, timings_s)
        if (done := await self._database.run(quick, atomic=False)) is not None:
            return done
        return await self._database.run(partial(transitions.succeed, ref, output, timings_s))

    async def fail(self, ref: AttemptRef, failure: Failure) -> Job:
        return await self._database.run(partial(transitions.fail, ref, failure))

    async def release(
        self,
        ref: AttemptRef,
        failure: Failure | None,
        delay_s: float = 0,
        *,
        charged: bool = True,
    ) -> Job:
        work = partial(transitions.release, ref, failure, delay_s, charged)
        return await self._database.run(work)

    async def request_cancel(self, job_id: UUID, owner: str | None = None) -> Job:
        """See JobAccess. A job that has ended is returned unchanged."""
        return await self._database.run(partial(transitions.request_cancel, job_id, owner))

    async def reclaim(self, worker: str | None = None) -> Sequence[Job]:
        """See LeaderQueue. Uses a transaction for every RECLAIM_BATCH jobs."""
        reclaimed: list[Job] = []
        while True:
            batch = await self._database.run(partial(transitions.reclaim, worker))
            reclaimed += batch
            if len(batch) < RECLAIM_BATCH:
                return reclaimed

    async def expire(self) -> Sequence[Job]:
        """See LeaderQueue. Uses a transaction for every RECLAIM_BATCH jobs."""
        expired: list[Job] = []
        while len(expired) < EXPIRE_AT_MOST:
            batch = await self._database.run(transitions.expire)
            expired += batch
            if len(batch) < RECLAIM_BATCH:
                break
        return expired

    async def promote(self) -> None:
        await self._database.run(partial(fair_queue.promote, self._policy.aging_s))

    async def waiting(self, limit: int) -> Sequence[AttemptRef]:
        return await self._database.run(partial(fair_queue.waiting, limit), atomic=False)

    async def demand(self) -> Demand:
        return await self._database.run(fair_queue.demand, atomic=False)

    async def deliveries(self, job_ids: Sequence[UUID]) -> Mapping[UUID, Delivery]:
        return await self._database.run(partial(webhook_outbox.of_jobs, job_ids), atomic=False)

    async def ping(self) -> None:
        await self._database.run(lambda connection: connection.execute(select(1)), atomic=False)

    async def _fetch(
        self, query: Select[Any], values: Mapping[str, object] | None = None
    ) -> Sequence[Job]:
        def work(connection: Connection) -> Sequence[Job]:
            return [to_job(row) for row in connection.execute(query, values).mappings()]

        return await self._database.run(work, atomic=False)


def _insert(
    job: NewJob, policy: QueuePolicy, quotas: Quotas | None, connection: Connection
) -> tuple[Job, bool]:
    if job.idempotency_key is not None:
        expired = and_(
            jobs.c.owner == job.owner,
            jobs.c.idempotency_key == job.idempotency_key,
            jobs.c.created_at <= func.now() - timedelta(seconds=policy.idempotency_ttl_s),
        )
        connection.execute(update(jobs).where(expired).values(idempotency_key=None))
    if job.retry_of is not None:
        _hold_input(job.retry_of, connection)
    running_limit = policy.running_limit(quotas, is_retry=job.retry_of is not None)
    hint = hint_of(AttemptRef(job.id, 1)) if running_limit == 0 else LOOK
    # This waits for another transaction that inserts the same key.
    row = connection.execute(*insertion(job, hint)).mappings().first()
    if row is None:
        return _earlier(job, connection), False
    end_upload(job.id, connection)  # a job made from an upload has the upload's id
    queue_room.admit(policy, job.owner, quotas, running_limit, connection)
    if job.reused is not None:
        webhook_outbox.enqueue(job, connection)
    return to_job(row), True


def _hold_input(source_id: UUID, connection: Connection) -> None:
    """Lock the row of the retried job, so that the sweeper does not delete its input.

    The sweeper skips locked rows, and inputs that another row still needs. Raises JobNotFound, or
    InputExpired if the input is deleted already.
    """
    query = select(jobs.c.input_expired_at).where(jobs.c.id == source_id).with_for_update()
    source = connection.execute(query).first()
    if source is None:
        raise transitions.job_not_found(source_id)
    if source.input_expired_at is not None:
        raise InputExpired("the photo has expired and was removed; submit it again")


def _earlier(job: NewJob, connection: Connection) -> Job:
    same = jobs.c.id == job.id
    if job.idempotency_key is not None:
        same = or_(same, jobs.c.idempotency_key == job.idempotency_key)
    if job.retry_of is not None:
        same = or_(same, jobs.c.retry_of == job.retry_of)
    query = select(jobs).where(jobs.c.owner == job.owner, same)
    # Two rows match if the key is of one job and the id of another: that is no repetition.
    row, *others = connection.execute(query).mappings().all()
    if not others and row["request_digest"] == job.request_digest:
        return to_job(row)
    key_used = job.idempotency_key is not None and row["idempotency_key"] == job.idempotency_key
    if not others and not key_used and row["id"] == job.id:  # only an upload's id is used again
        raise UploadUsed(
            "the upload was already used for another job; upload the photo again",
            job_id=str(row["id"]),
        )
    raise IdempotencyConflict(
        "this Idempotency-Key was used for a different request; use a new key",
        job_id=str(row["id"]),
    )
