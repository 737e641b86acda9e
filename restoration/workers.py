"""Reports of workers, orders to them, and the state of the queue, for operators.

A worker reports with every heartbeat and receives its orders in return. So an order takes effect
within about a second, and does not depend on the process that gave it.
"""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime
from enum import StrEnum
from uuid import UUID

from restoration.jobs import Priority


class EngineState(StrEnum):
    READY = "ready"
    DOWN = "down"  # being started, or about to be
    BROKEN = "broken"  # does not start; the worker will be replaced


class Stage(StrEnum):
    """Stage of a claimed job: being fetched, staged in the engine, executing, or being stored."""

    FETCHING = "fetching"
    STAGED = "staged"
    EXECUTING = "executing"
    STORING = "storing"


@dataclass(frozen=True, slots=True)
class JobInHand:
    job_id: UUID
    workflow: str
    stage: Stage
    claimed_at: datetime


@dataclass(frozen=True, slots=True)
class WorkerReport:
    """A worker's report.

    `engine_starts` counts all starts of the engine, `restarts_done` the restarts done on orders.
    `engine_version` is as the engine reports it, or empty.
    """

    id: str
    node: str
    engine_url: str
    engine: EngineState
    engine_starts: int
    in_hand: tuple[JobInHand, ...] = ()
    restarts_done: int = 0
    engine_version: str = ""


@dataclass(frozen=True, slots=True)
class WorkerOrders:
    """Orders to a worker.

    A `drained` worker claims no more jobs. `restarts_asked` counts the orders to restart the
    engine.
    """

    drained: bool = False
    restarts_asked: int = 0


@dataclass(frozen=True, slots=True)
class WorkerState:
    """A worker's newest report, and its current orders."""

    report: WorkerReport
    orders: WorkerOrders
    started_at: datetime
    seen_at: datetime


@dataclass(frozen=True, slots=True)
class WorkerSnapshot:
    """All live workers at the time `at`, which is of the same clock as their times."""

    at: datetime
    workers: tuple[WorkerState, ...]


@dataclass(frozen=True, slots=True)
class QueueLine:
    """Jobs of one class. `oldest_at` is the submission time of the longest-waiting job."""

    priority: Priority
    waiting: int
    running: int
    oldest_at: datetime | None


@dataclass(frozen=True, slots=True)
class QueueState:
    """State of the queue, with one line for each class."""

    at: datetime
    lines: tuple[QueueLine, ...]
