"""UsageLedger on Postgres: one row for each attempt that an engine has executed.

`began_at` is set once, because it is indexed: changing it whenever `gpu_s` grows would update the
index too.
"""

from __future__ import annotations

from collections.abc import Sequence
from datetime import datetime

from sqlalchemy import Connection, exists, func, or_, select
from sqlalchemy.dialects.postgresql import insert

from persistence.postgres.database import Database
from persistence.postgres.tables import gpu_usage
from restoration.observability.usage import Cost, Usage

_NEW = insert(gpu_usage)
_RECORD = _NEW.on_conflict_do_update(
    index_elements=[gpu_usage.c.job_id, gpu_usage.c.attempt],
    set_={"gpu_s": func.greatest(gpu_usage.c.gpu_s, _NEW.excluded.gpu_s)},
)


class PostgresUsageLedger:
    """UsageLedger on Postgres; see `restoration.observability.usage.UsageLedger`."""

    def __init__(self, database: Database) -> None:
        self._database = database

    async def record(self, costs: Sequence[Cost]) -> None:
        rows = [
            {
                "job_id": cost.job.id,
                "attempt": cost.job.attempt,
                "owner": cost.job.owner,
                "workflow": cost.job.workflow,
                "gpu_s": cost.gpu_s,
            }
            for cost in costs
        ]
        await self._database.run(lambda connection: connection.execute(_RECORD, rows))

    async def since(self, since: datetime, owner: str | None = None) -> Sequence[Usage]:
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

        def work(connection: Connection) -> list[Usage]:
            return [Usage(**row) for row in connection.execute(query).mappings()]

        return await self._database.run(work)
