"""UsageLedger on Postgres: one row for each attempt that an engine has executed.

`began_at` is set once, because it is indexed: changing it whenever `gpu_s` grows would update the
index too.
"""

from __future__ import annotations

from collections.abc import Sequence
from datetime import datetime
from functools import partial

from sqlalchemy import Connection, Insert, exists, func, or_, select
from sqlalchemy.dialects.postgresql import insert

from persistence.postgres.database import Database
from persistence.postgres.tables import gpu_usage
from restoration.jobs import Job
from restoration.observability.usage import Cost, Usage


class PostgresUsageLedger:
    """UsageLedger on Postgres; see `restoration.observability.usage.UsageLedger`."""

    def __init__(self, database: Database) -> None:
        self._database = database

    async def record(self, costs: Sequence[Cost]) -> None:
        await self._database.run(partial(_record, costs))

    async def since(self, since: datetime, owner: str | None = None) -> Sequence[Usage]:
        return await self._database.run(partial(_sums, since, owner))


def _recording() -> Insert:
    new = insert(gpu_usage)
    more = func.greatest(gpu_usage.c.gpu_s, new.excluded.gpu_s)
    return new.on_conflict_do_update(
        index_elements=[gpu_usage.c.job_id, gpu_usage.c.attempt], set_={"gpu_s": more}
    )


_RECORD = _recording()


def _record(costs: Sequence[Cost], connection: Connection) -> None:
    connection.execute(_RECORD, [_row(cost.job, cost.gpu_s) for cost in costs])


def _row(job: Job, gpu_s: float) -> dict[str, object]:
    of_job = {"job_id": job.id, "owner": job.owner, "workflow": job.workflow}
    return {**of_job, "attempt": job.attempt, "gpu_s": gpu_s}


def _sums(since: datetime, owner: str | None, connection: Connection) -> list[Usage]:
    each, earlier = gpu_usage.c, gpu_usage.alias("earlier").c
    # Jobs are counted by their first attempts. For count(DISTINCT) Postgres would sort all
    # attempts, and few of them are not the first.
    before = exists().where(
        earlier.job_id == each.job_id, earlier.attempt < each.attempt, earlier.began_at >= since
    )
    first = or_(each.attempt == 1, ~before)
    gpu_s = func.sum(each.gpu_s).label("gpu_s")
    query = (
        select(
            each.owner,
            each.workflow,
            func.count().filter(first).label("jobs"),
            func.count().label("attempts"),
            gpu_s,
        )
        .where(each.began_at >= since)
        .group_by(each.owner, each.workflow)
        .order_by(gpu_s.desc(), each.owner, each.workflow)
    )
    if owner is not None:
        query = query.where(each.owner == owner)
    return [Usage(**row) for row in connection.execute(query).mappings()]
