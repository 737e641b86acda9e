"""How many jobs there are, by what metrics tell them apart: aggregates, no job by itself.

The counts come from the jobs' own rows, so that they are right whoever ended a job: a worker, a
cancel, a deadline, a batch.
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

# A job's `finished_at` is the moment at which its transaction began; it is seen when that commits.
# The statement that ends it may take 10 s (`persistence.postgres.database`): what is younger comes
# next time.
_SETTLED = timedelta(seconds=15)

_OWNER_CLASS: ColumnElement[str] = case(
    (jobs.c.owner.endswith(MACHINE_SUFFIX, autoescape=True), OwnerClass.MACHINE.value),
    (jobs.c.owner.contains(PERSON_SEPARATOR, autoescape=True), OwnerClass.PERSON.value),
    else_=OwnerClass.OTHER.value,
)
_GROUP = (jobs.c.status, jobs.c.priority, _OWNER_CLASS.label("owner_class"), jobs.c.workflow)


@dataclass(frozen=True, slots=True)
class Group:
    """Jobs of one kind; `oldest_age_s` since the submission of the oldest."""

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


# Two queries, each of which has an index that holds its jobs and no others.
_UNFINISHED = union_all(
    _grouped(jobs.c.status == JobStatus.QUEUED), _grouped(jobs.c.status.in_(OWNED))
)


class Census:
    """Reads; changes nothing."""

    def __init__(self, database: Database) -> None:
        self._database = database

    async def unfinished(self) -> list[Group]:
        """All jobs that have not ended. Raises DependencyUnavailable."""
        return await self._database.run(partial(_groups, _UNFINISHED))

    async def finished(self, since: datetime | None) -> tuple[list[Group], datetime]:
        """Jobs that have ended since then, and the time to ask about next.

        None begins: with no jobs. Raises DependencyUnavailable.
        """
        return await self._database.run(partial(_finished, since))


def _finished(since: datetime | None, connection: Connection) -> tuple[list[Group], datetime]:
    until: datetime = connection.execute(select(func.now() - _SETTLED)).scalar_one()
    if since is None:
        return [], until
    # The index of inputs that are kept has all jobs that have just ended.
    ended = (jobs.c.finished_at > since, jobs.c.finished_at <= until)
    return _groups(_grouped(*ended, jobs.c.input_expired_at.is_(None)), connection), until


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
