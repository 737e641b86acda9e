"""JSON models for operators. Unlike the other models, they name workers and nodes."""

from __future__ import annotations

from dataclasses import asdict
from datetime import datetime
from uuid import UUID

from pydantic import Field

from restoration.jobs import Priority
from restoration.workers import EngineState, Stage, WorkerSnapshot, WorkerState
from serve_app.schemas.restorations import View


class JobInHandView(View):
    job_id: UUID
    workflow: str
    stage: Stage
    claimed_at: datetime


class WorkerView(View):
    """A GPU worker, as of its newest report."""

    id: str
    node: str
    engine_url: str = Field(description="as seen from its own node; the port tells which GPU")
    engine: EngineState
    engine_version: str = Field(description="of ComfyUI; empty while it has not said")
    engine_starts: int
    engine_restart_pending: bool = Field(description="ordered, and waiting for an empty engine")
    drained: bool = Field(description="claims no more jobs until it is undrained")
    started_at: datetime
    seen_at: datetime = Field(description="silent for more than seconds, it is probably lost")
    in_hand: tuple[JobInHandView, ...]

    @classmethod
    def of(cls, state: WorkerState) -> WorkerView:
        return cls(
            **asdict(state.report),
            engine_restart_pending=state.orders.restarts_asked > state.report.restarts_done,
            drained=state.orders.drained,
            started_at=state.started_at,
            seen_at=state.seen_at,
        )


class WorkerList(View):
    at: datetime = Field(description="now, by the clock that all times here are of")
    workers: tuple[WorkerView, ...]

    @classmethod
    def of(cls, roll: WorkerSnapshot) -> WorkerList:
        return cls(at=roll.at, workers=tuple(map(WorkerView.of, roll.workers)))


class QueueLineView(View):
    priority: Priority
    waiting: int
    running: int
    oldest_at: datetime | None = Field(description="when the longest waiting one was submitted")


class QueueView(View):
    """The waiting and the running jobs of each class."""

    at: datetime
    lines: tuple[QueueLineView, ...]
