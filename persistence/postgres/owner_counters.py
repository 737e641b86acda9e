"""What each owner has: jobs that run, bytes that are stored, and how many may run at a time.

Triggers on `jobs` and `uploads` count, in the transaction that changes the row (migrations 0009
and 0015); while as many
run as may, they also mark the owner's turns as `held`, and claims pass over these.

Lock order: an owner's row comes before its turns, and owners in the order of `in_order`.
"""

from __future__ import annotations

from collections.abc import Collection
from uuid import UUID

from sqlalchemy import ColumnElement, Connection, collate, delete, exists, select, update

from persistence.postgres.tables import jobs, owners

# The SQLSTATE with which the triggers refuse a claim that would go over the owner's limit: another
# claim was quicker. It is that of a transaction to be tried again.
CLAIMED_BY_ANOTHER = "40001"


def limit_running(owner: str, max_running: int, connection: Connection) -> None:
    """From now on so many of the owner's jobs may run at a time; 0: any number."""
    statement = update(owners).where(owners.c.owner == owner)
    connection.execute(statement.values(max_running=max_running))


def lock_owners_of(job_ids: Collection[UUID], connection: Connection) -> None:
    """To come before a statement that changes what several owners have stored."""
    concerned = select(jobs.c.owner).where(jobs.c.id.in_(job_ids))
    query = select(owners.c.owner).where(owners.c.owner.in_(concerned)).order_by(in_order())
    connection.execute(query.with_for_update())


def lock_owners(names: Collection[str], connection: Connection) -> None:
    """As `lock_owners_of`, for owners that are known."""
    query = select(owners.c.owner).where(owners.c.owner.in_(names)).order_by(in_order())
    connection.execute(query.with_for_update())


def in_order() -> ColumnElement[str]:
    """By code points, as `sorted` has them: what `turns.by_turn` goes by."""
    return collate(owners.c.owner, "C")


def forget_idle(connection: Connection) -> None:
    """Delete the rows of owners who have nothing left."""
    nothing = (owners.c.running == 0) & (owners.c.stored_bytes == 0)
    has_jobs = exists().where(jobs.c.owner == owners.c.owner)
    connection.execute(delete(owners).where(nothing, ~has_jobs))
