"""Numbers of jobs, grouped by the labels of metrics.

The counts come from the jobs' rows, so they include every job, whether a worker, a cancel or a
deadline ended it.
"""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime, timedelta
from functools import partial
from typing import Any

from sqlalchemy import ColumnElement, Connection, Select, case, extract, func, select, union_all

from persistence.postgres.database import Database
from persistence.postgres.tables import OWNED, jobs
from restoration.jobs import JobStatus, Priority
from restoration.limits.owner_classes import MACHINE_SUFFIX, PERSON_SEPARATOR, OwnerClass

# `finished_at` is the time at which a job's last transaction began; others see it after the commit.
# A statement may take 10 s (`persistence.postgres.database`), so younger jobs are counted later.
_SETTLED = timedelta(seconds=15)

_OWNER_CLASS: ColumnElement[str] = case(
    (jobs.c.owner.endswith(MACHINE_SUFFIX, autoescape=True), OwnerClass.MACHINE.value),
    (jobs.c.owner.contains(PERSON_SEPARATOR, autoescape=True), OwnerClass.PERSON.value),
    else_=OwnerClass.OTHER.value,
)
_GROUP = (jobs.c.status, jobs.c.priority, _OWNER_CLASS.label("owner_class"), jobs.c.workflow)


@dataclass(frozen=True, slots=True)
class Group:
    """A group of jobs. `oldest_age_s` is the time since the submission of the oldest."""

    status: JobStatus
    priority: Priority
    owner_class: OwnerClass
    workflow: str
    jobs: int
    oldest_age_s: float


def _grouped(*conditions: ColumnElement[bool]) -> Select[Any]:
    age_s = extract("epoch", func.now() - func.min(jobs.c.created_at))
    query = select(*_GROUP, func.count().label("jobs"), age_s.label("oldest_age_s"))
    return query.where(*conditions).group_by(*_GROUP)


# Two queries, because each has a partial index with exactly its jobs.
_UNFINISHED = union_all(
    _grouped(jobs.c.status == JobStatus.QUEUED), _grouped(jobs.c.status.in_(OWNED))
)


class Census:
    """Counts jobs for the queue's metrics. Read-only."""

    def __init__(self, database: Database) -> None:
        self._database = database

    async def unfinished(self) -> list[Group]:
        """Return the groups of all jobs that have not ended. Raises DependencyUnavailable."""
        return await self._database.run(partial(_groups, _UNFINISHED))

    async def finished(self, since: datetime | None) -> tuple[list[Group], datetime]:
        """Return the groups of jobs that ended after `since`, and the `since` of the next call.

        For None the list is empty. Raises DependencyUnavailable.
        """

        def work(connection: Connection) -> tuple[list[Group], datetime]:
            until: datetime = connection.execute(select(func.now() - _SETTLED)).scalar_one()
            if since is None:
                return [], until
            # The condition on inputs makes the index of kept inputs usable, which has all of them.
            ended = _grouped(
                jobs.c.finished_at > since,
                jobs.c.finished_at <= until,
                jobs.c.input_expired_at.is_(None),
            )
            return _groups(ended, connection), until

        return await self._database.run(work)


def _groups(query: Any, connection: Connection) -> list[Group]:
    return [
        Group(
            JobStatus(row.status),
            row.priority,
            OwnerClass(row.owner_class),
            row.workflow,
            row.jobs,
            float(row.oldest_age_s),
        )
        for row in connection.execute(query)
    ]
