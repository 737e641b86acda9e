"""Mark expired inputs and outputs in Postgres before S3 deletes them, and delete old rows.

An object is deleted only when no row needs it. This is decided under the locks of the rows that
name the object. A retry, which uses the input of an earlier job, locks that job's row and checks
its `input_expired_at` in the same transaction, so the two cannot interleave.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from datetime import timedelta
from functools import partial

from sqlalchemy import ColumnElement, Connection, delete, exists, func, or_, select, update

from persistence.objects.keys import job_of
from persistence.postgres.database import Database
from persistence.postgres.owner_counters import forget_idle, lock_owners_of
from persistence.postgres.tables import OWNED, batches, deliveries, jobs
from persistence.postgres.uploads import expire_uploads
from restoration.webhooks.messages import DeliveryStatus


class Retention:
    """Retention of rows and objects. Each call is one small transaction; sweepers may overlap."""

    def __init__(self, database: Database) -> None:
        self._database = database

    async def expire_inputs(self, kept_s: float, limit: int) -> Sequence[str]:
        """Mark inputs whose jobs all ended at least `kept_s` ago, and return their keys."""
        other = jobs.alias()
        needed = exists().where(
            other.c.input_key == jobs.c.input_key,
            other.c.input_expired_at.is_(None),
            or_(
                other.c.finished_at.is_(None),
                other.c.finished_at > func.now() - timedelta(seconds=kept_s),
            ),
        )
        is_kept = jobs.c.input_expired_at.is_(None)
        candidates = (
            select(jobs.c.input_key)
            .where(_ended_before(kept_s), is_kept, ~needed)
            .order_by(jobs.c.finished_at)
            .limit(limit)
        )

        def work(connection: Connection) -> list[str]:
            is_candidate = jobs.c.input_key.in_(set(connection.scalars(candidates)))
            # Lock all rows of each key in one order, so that two sweepers cannot deadlock. Then
            # check again in a new statement, which sees what was committed in the meantime.
            locked = select(jobs.c.id).where(is_candidate, is_kept).order_by(jobs.c.id)
            lock_owners_of(connection.scalars(locked.with_for_update()).all(), connection)
            statement = (
                update(jobs)
                .where(is_candidate, is_kept, ~needed)
                .values(input_expired_at=func.now())
                .returning(jobs.c.input_key)
            )
            return sorted(set(connection.scalars(statement)))

        return await self._database.run(work)

    async def expire_outputs(self, kept_s: float, limit: int) -> Sequence[str]:
        """Mark results of jobs that ended at least `kept_s` ago, and return their keys."""
        chosen = (
            select(jobs.c.id)
            .where(
                _ended_before(kept_s),
                jobs.c.output_key.is_not(None),
                jobs.c.output_expired_at.is_(None),
            )
            .order_by(jobs.c.finished_at)
            .limit(limit)
            .with_for_update(skip_locked=True)
        )

        def work(connection: Connection) -> list[str]:
            job_ids = connection.scalars(chosen).all()
            lock_owners_of(job_ids, connection)
            statement = (
                update(jobs)
                .where(jobs.c.id.in_(job_ids))
                .values(output_expired_at=func.now())
                .returning(jobs.c.output_key)
            )
            return list(connection.scalars(statement))

        return await self._database.run(work)

    async def delete_rows(self, kept_s: float, limit: int) -> int:
        """Delete jobs that ended at least `kept_s` ago, and return how many.

        Keeps jobs with an unexpired object or a pending webhook.
        """
        undelivered = exists().where(
            deliveries.c.job_id == jobs.c.id, deliveries.c.status == DeliveryStatus.PENDING
        )
        chosen = (
            select(jobs.c.id)
            .where(
                _ended_before(kept_s),
                jobs.c.input_expired_at.is_not(None),
                or_(jobs.c.output_key.is_(None), jobs.c.output_expired_at.is_not(None)),
                ~undelivered,
            )
            .order_by(jobs.c.finished_at)
            .limit(limit)
            .with_for_update(skip_locked=True)
            .cte("chosen")
        )
        statement = delete(jobs).where(jobs.c.id.in_(select(chosen.c.id)))
        return await self._database.run(lambda connection: connection.execute(statement).rowcount)

    async def forget_emptied(self, kept_s: float) -> None:
        """Delete batches without jobs that are at least `kept_s` old, and owners without jobs.

        Call it once after `delete_rows`, because it scans all of them.
        """
        old = batches.c.created_at < func.now() - timedelta(seconds=kept_s)
        has_jobs = exists().where(jobs.c.batch_id == batches.c.id)

        def work(connection: Connection) -> None:
            connection.execute(delete(batches).where(old, ~has_jobs))
            forget_idle(connection)

        await self._database.run(work)

    async def expire_uploads(self, limit: int) -> Sequence[str]:
        """Delete direct uploads that were not used in time, and return their keys."""
        return await self._database.run(partial(expire_uploads, limit))

    async def wanted_inputs(self, keys: Collection[str]) -> Collection[str]:
        """Return those of the keys that are the unexpired input of a job."""
        query = select(jobs.c.input_key).where(
            jobs.c.input_key.in_(keys), jobs.c.input_expired_at.is_(None)
        )
        return await self._database.run(lambda connection: set(connection.scalars(query)))

    async def wanted_outputs(self, keys: Collection[str]) -> Collection[str]:
        """Return those of the keys that are a job's unexpired result, or whose job is running."""
        job_ids = {key: job_of(key) for key in keys}
        query = select(jobs.c.id, jobs.c.status, jobs.c.output_key, jobs.c.output_expired_at).where(
            jobs.c.id.in_(set(job_ids.values()))
        )

        def work(connection: Connection) -> set[str]:
            rows = {row.id: row for row in connection.execute(query)}
            return {
                key
                for key, job_id in job_ids.items()
                if (row := rows.get(job_id)) is not None
                and (
                    row.status in OWNED or (row.output_key == key and row.output_expired_at is None)
                )
            }

        return await self._database.run(work)


def _ended_before(kept_s: float) -> ColumnElement[bool]:
    return jobs.c.finished_at <= func.now() - timedelta(seconds=kept_s)
