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
    engine_url: str = Field(
        description="URL on the worker's own node. The port identifies the GPU."
    )
    engine: EngineState
    engine_version: str = Field(description="ComfyUI's version, or empty if not known yet.")
    engine_starts: int
    engine_restart_pending: bool = Field(
        description="A restart was requested, and waits until no job is in the engine."
    )
    drained: bool = Field(description="The worker claims no jobs until it is undrained.")
    started_at: datetime
    seen_at: datetime = Field(
        description="Time of the newest report. A worker that has not reported for several "
        "seconds is probably lost."
    )
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
    at: datetime = Field(description="Current time, by the clock of all times in this response.")
    workers: tuple[WorkerView, ...]

    @classmethod
    def of(cls, roll: WorkerSnapshot) -> WorkerList:
        return cls(at=roll.at, workers=tuple(map(WorkerView.of, roll.workers)))


class QueueLineView(View):
    priority: Priority
    waiting: int
    running: int
    oldest_at: datetime | None = Field(
        description="Submission time of the job that has waited longest."
    )


class QueueView(View):
    """The waiting and running jobs of each priority."""

    at: datetime
    lines: tuple[QueueLineView, ...]
