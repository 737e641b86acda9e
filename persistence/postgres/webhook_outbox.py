"""The webhook outbox in Postgres.

Only the transaction that ends a job inserts its delivery. A claim is a lease: it postpones the next
try until the current one must have ended, so a sender that dies delays its deliveries but loses
none. All times are of Postgres' clock.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from datetime import datetime, timedelta
from typing import Any
from uuid import UUID

from sqlalchemy import ColumnElement, Connection, and_, extract, func, select, true, update
from sqlalchemy.dialects.postgresql import insert
from sqlalchemy.sql.dml import ReturningUpdate

from persistence.postgres.database import Database
from persistence.postgres.leadership import DELIVERY_CHANNEL
from persistence.postgres.rows import to_job
from persistence.postgres.tables import deliveries, jobs
from restoration.jobs import Job, NewJob
from restoration.webhooks.messages import Delivery, DeliveryStatus, DueDelivery
from restoration.webhooks.urls import host_of

_IS_DUE = and_(
    deliveries.c.status == DeliveryStatus.PENDING, deliveries.c.next_try_at <= func.now()
)


def enqueue(job: Job | NewJob, connection: Connection) -> None:
    """Insert the delivery of `job`, if it has a webhook URL, and notify the sender on commit.

    Call it in the transaction that ends the job.
    """
    if (url := job.options.webhook_url) is None:
        return
    connection.execute(insert(deliveries).values(job_id=job.id, host=host_of(url)))
    connection.execute(select(func.pg_notify(DELIVERY_CHANNEL, "")))


def of_jobs(job_ids: Sequence[UUID], connection: Connection) -> dict[UUID, Delivery]:
    query = select(deliveries).where(deliveries.c.job_id.in_(job_ids))
    return {
        row.job_id: Delivery(DeliveryStatus(row.status), row.tries, row.last_error, row.next_try_at)
        for row in connection.execute(query)
    }


class Outbox:
    """The sender's side of the outbox. Any number of senders may share it."""

    def __init__(self, database: Database) -> None:
        self._database = database

    async def claim(
        self, limit: int, per_host: int, lease_s: float, without: Collection[str] = ()
    ) -> Sequence[DueDelivery]:
        """Claim up to `limit` due deliveries for `lease_s`.

        Owners take turns, each with its longest overdue delivery, so that an owner of many hosts
        does not delay the others. At most `per_host` are of one host, and none of a host in
        `without`, so that a slow host delays only its own deliveries.
        """
        statement = _claim(limit, per_host, lease_s, without)

        def work(connection: Connection) -> list[DueDelivery]:
            taken = connection.execute(statement).all()
            query = select(jobs).where(jobs.c.id.in_([row.job_id for row in taken]))
            ended = {row["id"]: to_job(row) for row in connection.execute(query).mappings()}
            return [
                DueDelivery(ended[row.job_id], row.host, row.tries, float(row.age_s))
                for row in taken
            ]

        return await self._database.run(work)

    async def delivered(self, due: DueDelivery) -> None:
        """Mark a pending delivery as delivered, even if a later try has begun."""
        await self._update(
            _is_pending(due), {"status": DeliveryStatus.DELIVERED, "next_try_at": None}
        )

    async def failed(self, due: DueDelivery, error: str, retry_in_s: float | None) -> None:
        """Record a failed try. Retry in `retry_in_s`, or mark the delivery dead if None.

        Changes nothing if a later try has begun.
        """
        next_try: dict[str, object] = {"status": DeliveryStatus.DEAD, "next_try_at": None}
        if retry_in_s is not None:
            next_try = {"next_try_at": _from_now(retry_in_s)}
        is_newest = and_(_is_pending(due), deliveries.c.tries == due.tries)
        await self._update(is_newest, {"last_error": error, **next_try})

    async def _update(self, where: ColumnElement[bool], values: Mapping[str, object]) -> None:
        statement = update(deliveries).where(where).values(values)
        await self._database.run(lambda connection: connection.execute(statement))


def _claim(
    limit: int, per_host: int, lease_s: float, without: Collection[str]
) -> ReturningUpdate[Any]:
    """Return the statement that claims due deliveries, and returns them with their age."""
    hosts = select(deliveries.c.host).where(_IS_DUE, deliveries.c.host.not_in(without))
    host = hosts.distinct().subquery("host")
    # Each host's deliveries come from its index, so a backlog is scanned only for names of hosts.
    head = (
        select(deliveries.c.job_id, deliveries.c.next_try_at)
        .where(_IS_DUE, deliveries.c.host == host.c.host)
        .order_by(deliveries.c.next_try_at)
        .limit(per_host)
        .lateral("head")
    )
    in_line = func.row_number().over(partition_by=jobs.c.owner, order_by=head.c.next_try_at)
    placed = (
        select(head.c.job_id, in_line.label("of_owner"))
        .select_from(host.join(head, true()).join(jobs, jobs.c.id == head.c.job_id))
        .subquery()
    )
    # As a CTE it runs once, so the rows it locks are exactly those it claims.
    chosen = (
        select(deliveries.c.job_id)
        .join(placed, placed.c.job_id == deliveries.c.job_id)
        .where(_IS_DUE)
        .order_by(placed.c.of_owner, deliveries.c.next_try_at)
        .limit(limit)
        .with_for_update(of=deliveries, skip_locked=True)
        .cte("chosen")
    )
    return (
        update(deliveries)
        .where(deliveries.c.job_id.in_(select(chosen.c.job_id)))
        .values(tries=deliveries.c.tries + 1, next_try_at=_from_now(lease_s))
        .returning(
            deliveries.c.job_id,
            deliveries.c.host,
            deliveries.c.tries,
            extract("epoch", func.now() - deliveries.c.created_at).label("age_s"),
        )
    )


def _is_pending(due: DueDelivery) -> ColumnElement[bool]:
    return and_(deliveries.c.job_id == due.job.id, deliveries.c.status == DeliveryStatus.PENDING)


def _from_now(delay_s: float) -> ColumnElement[datetime]:
    return func.now() + timedelta(seconds=delay_s)
