"""The UsageLedger on Postgres: one row for each attempt that an engine has executed.

`began_at` is set once: an index on it, and a figure that grows with each heartbeat, would
otherwise make each of those an update of the index.
"""

from __future__ import annotations

from collections.abc import Sequence
from datetime import datetime
from functools import partial
from typing import Any

from sqlalchemy import Connection, Insert, Select, func, select
from sqlalchemy.dialects.postgresql import insert

from persistence.database import Database
from persistence.tables import gpu_usage
from restoration.jobs import Job
from restoration.usage import Cost, Usage


class PostgresUsageLedger:
    """See `restoration.usage.UsageLedger`."""

    def __init__(self, database: Database) -> None:
        self._database = database

    async def record(self, costs: Sequence[Cost]) -> None:
        await self._database.run(partial(_record, costs))

    async def since(self, since: datetime, owner: str | None = None) -> Sequence[Usage]:
        of_time = select(gpu_usage).where(gpu_usage.c.began_at >= since)
        if owner is not None:
            of_time = of_time.where(gpu_usage.c.owner == owner)
        return await self._database.run(partial(_sums, of_time))


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


def _sums(of_time: Select[Any], connection: Connection) -> list[Usage]:
    each = of_time.subquery()
    gpu_s = func.sum(each.c.gpu_s).label("gpu_s")
    query = (
        select(
            each.c.owner,
            each.c.workflow,
            func.count(each.c.job_id.distinct()).label("jobs"),
            func.count().label("attempts"),
            gpu_s,
        )
        .group_by(each.c.owner, each.c.workflow)
        .order_by(gpu_s.desc(), each.c.owner, each.c.workflow)
    )
    return [Usage(**row) for row in connection.execute(query).mappings()]
