"""WorkerRegistry on Postgres: a row for each worker, written by its reports and by orders.

Reports and orders write different columns, so neither overwrites the other.
"""

from __future__ import annotations

from datetime import datetime, timedelta
from uuid import UUID

from sqlalchemy import Connection, RowMapping, and_, delete, func, select, true, update
from sqlalchemy.dialects.postgresql import insert

from persistence.postgres.database import Database
from persistence.postgres.tables import OWNED, jobs, turns, workers
from restoration.errors import WorkerNotFound
from restoration.jobs import JobStatus, Priority
from restoration.workers import (
    EngineState,
    JobInHand,
    QueueLine,
    QueueState,
    Stage,
    WorkerOrders,
    WorkerReport,
    WorkerSnapshot,
    WorkerState,
)

# A silent worker is listed for SHOWN_S. Its row is kept for KEPT_S, because it may only have lost
# its connection, and its orders must still apply when it is back.
SHOWN_S = 60.0
KEPT_S = 24 * 3600.0


class PostgresWorkerRegistry:
    """WorkerReports and WorkerRegistry, without state of its own."""

    def __init__(self, database: Database) -> None:
        self._database = database

    async def report(self, report: WorkerReport) -> WorkerOrders:
        values = {
            "node": report.node,
            "engine_url": report.engine_url,
            "engine": report.engine,
            "engine_starts": report.engine_starts,
            "engine_version": report.engine_version,
            "in_hand": [
                {
                    "job_id": str(job.job_id),
                    "workflow": job.workflow,
                    "stage": job.stage,
                    "claimed_at": job.claimed_at.isoformat(),
                }
                for job in report.in_hand
            ],
            "restarts_done": report.restarts_done,
        }
        statement = (
            insert(workers)
            .values(id=report.id, **values)
            .on_conflict_do_update(index_elements=["id"], set_={**values, "seen_at": func.now()})
            .returning(workers.c.drained, workers.c.restarts_asked)
        )
        row = await self._database.run(lambda connection: connection.execute(statement).one())
        return WorkerOrders(row.drained, row.restarts_asked)

    async def leave(self, worker: str) -> None:
        forgotten = workers.c.seen_at < func.now() - timedelta(seconds=KEPT_S)
        statement = delete(workers).where((workers.c.id == worker) | forgotten)
        await self._database.run(lambda connection: connection.execute(statement))

    async def roll(self) -> WorkerSnapshot:
        there = workers.c.seen_at > func.now() - timedelta(seconds=SHOWN_S)
        query = select(workers).where(there).order_by(workers.c.node, workers.c.engine_url)

        def work(connection: Connection) -> WorkerSnapshot:
            states = tuple(map(_state, connection.execute(query).mappings()))
            return WorkerSnapshot(_now(connection), states)

        return await self._database.run(work)

    async def drain(self, worker: str, *, drained: bool) -> WorkerState:
        return await self._order(worker, drained=drained)

    async def restart_engine(self, worker: str) -> WorkerState:
        return await self._order(worker, restarts_asked=workers.c.restarts_asked + 1)

    async def _order(self, worker: str, **values: object) -> WorkerState:
        statement = update(workers).where(workers.c.id == worker).values(values).returning(workers)
        row = await self._database.run(
            lambda connection: connection.execute(statement).mappings().first()
        )
        if row is None:
            raise WorkerNotFound("the worker does not exist", worker=worker)
        return _state(row)

    async def queue(self) -> QueueState:
        of_turn = and_(jobs.c.owner == turns.c.owner, jobs.c.priority == turns.c.priority)
        oldest = (  # one lookup for each owner, in the index of waiting jobs
            select(func.min(jobs.c.created_at).label("at"))
            .where(of_turn, jobs.c.status == JobStatus.QUEUED)
            .lateral("oldest")
        )
        waiting = (
            select(turns.c.priority, func.sum(turns.c.waiting), func.min(oldest.c.at))
            .select_from(turns.join(oldest, true()))
            .where(turns.c.counts_as.is_not(None))
            .group_by(turns.c.priority)
        )
        running = (
            select(jobs.c.priority, func.count())
            .where(jobs.c.status.in_(OWNED))
            .group_by(jobs.c.priority)
        )

        def work(connection: Connection) -> QueueState:
            counts = {row[0]: (row[1], row[2]) for row in connection.execute(waiting)}
            in_hand = {row[0]: row[1] for row in connection.execute(running)}
            lines = (
                QueueLine(priority, waits, in_hand.get(priority, 0), oldest_at)
                for priority in Priority
                for waits, oldest_at in [counts.get(priority, (0, None))]
            )
            return QueueState(_now(connection), tuple(lines))

        return await self._database.run(work)


def _now(connection: Connection) -> datetime:
    return connection.execute(select(func.now())).scalar_one()


def _state(row: RowMapping) -> WorkerState:
    in_hand = tuple(
        JobInHand(
            UUID(job["job_id"]),
            job["workflow"],
            Stage(job["stage"]),
            datetime.fromisoformat(job["claimed_at"]),
        )
        for job in row["in_hand"]
    )
    report = WorkerReport(
        id=row["id"],
        node=row["node"],
        engine_url=row["engine_url"],
        engine=EngineState(row["engine"]),
        engine_starts=row["engine_starts"],
        in_hand=in_hand,
        restarts_done=row["restarts_done"],
        engine_version=row["engine_version"],
    )
    orders = WorkerOrders(row["drained"], row["restarts_asked"])
    return WorkerState(report, orders, row["started_at"], row["seen_at"])
