"""Default values for tests that need a job or an artifact but are not about it."""

from __future__ import annotations

from dataclasses import fields
from datetime import UTC, datetime
from typing import Any
from uuid import uuid4

from restoration.jobs import (
    Artifact,
    AttemptOutcome,
    AttemptRecord,
    Job,
    JobOptions,
    JobStatus,
    NewJob,
    OutputFormat,
)

_OPTIONS = frozenset(option.name for option in fields(JobOptions))


def new_job(**changes: Any) -> NewJob:
    """Return a job ready to insert; `changes` replace its fields and its options."""
    options = {name: changes.pop(name) for name in _OPTIONS & changes.keys()}
    values: dict[str, Any] = {
        "id": uuid4(),
        "owner": "alice",
        "workflow": "restore",
        "workflow_version": "1",
        "params": {},
        "output_format": OutputFormat.PNG,
        "options": JobOptions(**options),
        "input": artifact("inputs/1.png"),
        "max_attempts": 3,
    }
    return NewJob(**values | changes)


def ended_job(**changes: Any) -> Job:
    """Return a job that succeeded at its only attempt; `changes` replace its fields."""
    new, now = new_job(batch_id=uuid4(), batch_index=3), datetime.now(UTC)
    asked = {each.name for each in fields(Job)} & {each.name for each in fields(new)}
    values: dict[str, Any] = {
        **{name: getattr(new, name) for name in asked},
        **dict.fromkeys(("created_at", "available_at", "queue_deadline_at", "finished_at"), now),
        "status": JobStatus.SUCCEEDED,
        "attempt": 1,
        "output": artifact(),
        "timings_s": {"engine": 0.25},
        "attempts": (AttemptRecord(1, "worker-1", now, now, AttemptOutcome.SUCCEEDED),),
    }
    return Job(**values | changes)


def artifact(key: str = "outputs/1/1.png") -> Artifact:
    """Return an artifact without a stored object."""
    return Artifact(key=key, sha256="0" * 64, size_bytes=1, content_type="image/png")
