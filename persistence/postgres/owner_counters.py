"""Counters of each owner: running jobs, their limit, and stored bytes.

Triggers on `jobs` and `uploads` (see the migration) count in the transaction that changes the row.
While an owner's running jobs are at the limit, they also mark its turns as `held`, and claims pass
over these.

Lock order: an owner's row before its turns, and owners in the order of `lock_owners`.
"""

from __future__ import annotations

from collections.abc import Collection
from uuid import UUID

from sqlalchemy import Connection, Select, collate, delete, exists, select

from persistence.postgres.tables import jobs, owners

# SQLSTATE with which the triggers refuse a claim over the owner's limit, because a concurrent claim
# took the last place. It is serialization_failure, which means that a retry may succeed.
CLAIMED_BY_ANOTHER = "40001"


def lock_owners_of(job_ids: Collection[UUID], connection: Connection) -> None:
    """Lock the rows of the jobs' owners. Call it before changing several owners' stored bytes."""
    lock_owners(select(jobs.c.owner).where(jobs.c.id.in_(job_ids)), connection)


def lock_owners(names: Collection[str] | Select[tuple[str]], connection: Connection) -> None:
    """Lock the rows of these owners, by code points as `sorted` by `fair_queue.by_turn` does."""
    query = select(owners.c.owner).where(owners.c.owner.in_(names))
    connection.execute(query.order_by(collate(owners.c.owner, "C")).with_for_update())


def forget_idle(connection: Connection) -> None:
    """Delete the rows of owners without jobs and stored bytes."""
    nothing = (owners.c.running == 0) & (owners.c.stored_bytes == 0)
    has_jobs = exists().where(jobs.c.owner == owners.c.owner)
    connection.execute(delete(owners).where(nothing, ~has_jobs))
