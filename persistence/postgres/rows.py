"""Conversion between jobs and rows of the `jobs` table."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, fields
from datetime import datetime, timedelta
from typing import Any

from sqlalchemy import Insert, Interval, RowMapping, bindparam, func
from sqlalchemy.dialects.postgresql import insert

from persistence.postgres.leadership import WAITING_CHANNEL
from persistence.postgres.tables import jobs
from restoration.jobs import (
    Artifact,
    AttemptOutcome,
    AttemptRecord,
    Failure,
    Job,
    JobOptions,
    JobStatus,
    NewJob,
    OutputFormat,
)
from restoration.reuse import work_key

_OPTIONS = tuple(option.name for option in fields(JobOptions))
_OUTPUT = ("output_key", "output_sha256", "output_size_bytes", "output_content_type")


def artifact_columns(prefix: str, artifact: Artifact) -> dict[str, Any]:
    """Return the values of the four columns of an artifact, whose names begin with `prefix`."""
    return {
        f"{prefix}_key": artifact.key,
        f"{prefix}_sha256": artifact.sha256,
        f"{prefix}_size_bytes": artifact.size_bytes,
        f"{prefix}_content_type": artifact.content_type,
    }


def failure_columns(failure: Failure) -> dict[str, Any]:
    return {"failure_code": failure.code, "failure_message": failure.message}


# Built once, because building such a statement takes longer than executing it.
_NEW = (
    insert(jobs)
    .values(queue_deadline_at=func.now() + bindparam("queue_limit", type_=Interval()))
    .on_conflict_do_nothing()
)
_INSERT = _NEW.returning(jobs, func.pg_notify(WAITING_CHANNEL, bindparam("hint")))
_INSERT_ENDED = _NEW.values(finished_at=func.now()).returning(jobs)


def insertion(job: NewJob, hint: str) -> tuple[Insert, dict[str, Any]]:
    """Return the statement that inserts `job`, and its values.

    The statement returns the new row, or nothing on a conflict. Unless the job is recorded as
    succeeded, it notifies the dispatcher with `hint` on commit.
    """
    values = _plain_values(job) | {"queue_limit": timedelta(seconds=job.queue_limit_s)}
    return (_INSERT_ENDED, values) if job.reused else (_INSERT, {**values, "hint": hint})


def new_row(job: NewJob) -> dict[str, Any]:
    """Return all values of a new job's row, for a statement that inserts several."""
    return _plain_values(job) | {
        "finished_at": func.now() if job.reused else None,
        "queue_deadline_at": func.now() + timedelta(seconds=job.queue_limit_s),
    }


def _plain_values(job: NewJob) -> dict[str, Any]:
    """Return the values of a new job's row, queued or with its result, but not its times.

    The times are SQL expressions of the server's clock.
    """
    reused = job.reused
    ended = artifact_columns("output", reused.output) if reused else dict.fromkeys(_OUTPUT)
    return {
        **ended,
        "status": JobStatus.SUCCEEDED if reused else JobStatus.QUEUED,
        "reused_from": reused.source if reused else None,
        "work_key": work_key(job),
        "id": job.id,
        "owner": job.owner,
        "workflow": job.workflow,
        "workflow_version": job.workflow_version,
        "params": dict(job.params),
        "output_format": job.output_format,
        **asdict(job.options),
        **artifact_columns("input", job.input),
        "max_attempts": job.max_attempts,
        "idempotency_key": job.idempotency_key,
        "request_digest": job.request_digest,
        "retry_of": job.retry_of,
        "batch_id": job.batch_id,
        "batch_index": job.batch_index,
        "traceparent": job.traceparent,
    }


def to_job(row: RowMapping) -> Job:
    return Job(
        id=row["id"],
        owner=row["owner"],
        status=JobStatus(row["status"]),
        workflow=row["workflow"],
        workflow_version=row["workflow_version"],
        params=row["params"],
        output_format=OutputFormat(row["output_format"]),
        options=JobOptions(**{name: row[name] for name in _OPTIONS}),
        input=_artifact(row, "input"),
        created_at=row["created_at"],
        available_at=row["available_at"],
        queue_deadline_at=row["queue_deadline_at"],
        attempt=row["attempt"],
        failed_attempts=row["failed_attempts"],
        max_attempts=row["max_attempts"],
        worker=row["worker"],
        lease_until=row["lease_until"],
        started_at=row["started_at"],
        finished_at=row["finished_at"],
        output=None if row["output_key"] is None else _artifact(row, "output"),
        failure=None
        if row["failure_code"] is None
        else Failure(row["failure_code"], row["failure_message"]),
        idempotency_key=row["idempotency_key"],
        request_digest=row["request_digest"],
        timings_s=row["timings_s"],
        retry_of=row["retry_of"],
        attempts=tuple(map(_record, row["attempts"])),
        input_expired_at=row["input_expired_at"],
        output_expired_at=row["output_expired_at"],
        batch_id=row["batch_id"],
        batch_index=row["batch_index"],
        traceparent=row["traceparent"],
        reused_from=row["reused_from"],
    )


def _record(stored: Mapping[str, Any]) -> AttemptRecord:
    return AttemptRecord(
        attempt=stored["attempt"],
        worker=stored["worker"],
        started_at=datetime.fromisoformat(stored["started_at"]),
        ended_at=datetime.fromisoformat(stored["ended_at"]),
        outcome=AttemptOutcome(stored["outcome"]),
        code=stored["code"],
        message=stored["message"],
    )


def _artifact(row: RowMapping, prefix: str) -> Artifact:
    return Artifact(
        key=row[f"{prefix}_key"],
        sha256=row[f"{prefix}_sha256"],
        size_bytes=row[f"{prefix}_size_bytes"],
        content_type=row[f"{prefix}_content_type"],
    )
