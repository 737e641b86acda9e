"""An in-memory WorkerRegistry, beside an in-memory job store."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from datetime import timedelta

from restoration.errors import DependencyUnavailable, WorkerNotFound
from restoration.jobs import JobStatus, Priority
from restoration.workers import (
    QueueLine,
    QueueState,
    WorkerOrders,
    WorkerReport,
    WorkerSnapshot,
    WorkerState,
)
from tests.fakes.job_store import MemoryJobStore

SHOWN = timedelta(seconds=60)


@dataclass
class MemoryWorkerRegistry:
    """Uses the clock of its job store."""

    jobs: MemoryJobStore = field(default_factory=MemoryJobStore)
    down: bool = False
    states: dict[str, WorkerState] = field(default_factory=dict)

    async def report(self, report: WorkerReport) -> WorkerOrders:
        self._answer()
        now = self.jobs.clock()
        known = self.states.get(report.id) or WorkerState(report, WorkerOrders(), now, now)
        self.states[report.id] = replace(known, report=report, seen_at=now)
        return known.orders

    async def leave(self, worker: str) -> None:
        self._answer()
        self.states.pop(worker, None)

    async def roll(self) -> WorkerSnapshot:
        self._answer()
        now = self.jobs.clock()
        there = [state for state in self.states.values() if state.seen_at > now - SHOWN]
        there.sort(key=lambda state: (state.report.node, state.report.engine_url))
        return WorkerSnapshot(now, tuple(there))

    async def drain(self, worker: str, *, drained: bool) -> WorkerState:
        return self._order(worker, drained=drained)

    async def restart_engine(self, worker: str) -> WorkerState:
        return self._order(worker, restarts=1)

    async def queue(self) -> QueueState:
        self._answer()
        return QueueState(self.jobs.clock(), tuple(map(self._line, Priority)))

    def _answer(self) -> None:
        if self.down:
            raise DependencyUnavailable("Postgres: refused at db.internal")

    def _order(self, worker: str, *, drained: bool | None = None, restarts: int = 0) -> WorkerState:
        self._answer()
        if (state := self.states.get(worker)) is None:
            raise WorkerNotFound("the worker does not exist", worker=worker)
        orders = WorkerOrders(
            state.orders.drained if drained is None else drained,
            state.orders.restarts_asked + restarts,
        )
        self.states[worker] = replace(state, orders=orders)
        return self.states[worker]

    def _line(self, priority: Priority) -> QueueLine:
        rows = [job for job in self.jobs.rows.values() if job.options.priority is priority]
        waiting = [job.created_at for job in rows if job.status is JobStatus.QUEUED]
        running = [job for job in rows if job.status in (JobStatus.RUNNING, JobStatus.CANCELLING)]
        return QueueLine(priority, len(waiting), len(running), min(waiting, default=None))
