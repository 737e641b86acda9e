"""What workers say of themselves, what they are told, and what waits: an operator's view.

A worker reports with every heartbeat and reads its orders from the answer, so an order takes
effect within about a second and outlives whoever gave it.
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
    BROKEN = "broken"  # it does not start; the worker will be replaced


class Stage(StrEnum):
    """Where a job in hand is: on its way into the engine, ready in it, executing, or out of it."""

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
    """`engine_starts` counts all starts; `restarts_done` the orders to restart that were obeyed;
    `engine_version` is what the engine said of itself, empty if it did not."""

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
    """A `drained` worker claims no more. `restarts_asked` counts orders to restart the engine."""

    drained: bool = False
    restarts_asked: int = 0


@dataclass(frozen=True, slots=True)
class WorkerState:
    """The newest report, and what has been ordered since."""

    report: WorkerReport
    orders: WorkerOrders
    started_at: datetime
    seen_at: datetime


@dataclass(frozen=True, slots=True)
class WorkerSnapshot:
    """All workers that are there, as they stood `at`, by the clock that their times are of."""

    at: datetime
    workers: tuple[WorkerState, ...]


@dataclass(frozen=True, slots=True)
class QueueLine:
    """Jobs of one class; `oldest_at` is when the one that has waited longest was submitted."""

    priority: Priority
    waiting: int
    running: int
    oldest_at: datetime | None


@dataclass(frozen=True, slots=True)
class QueueState:
    """A line for each class."""

    at: datetime
    lines: tuple[QueueLine, ...]
