"""Changes of a job's state in Postgres, as functions of a transaction's connection.

One UPDATE claims a job, and one (`_update_to`) makes all other changes. Both take the allowed
source states from `sources_of`. Both leave a row alone that another attempt owns or that has
changed since. Leases use only Postgres' clock.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from datetime import datetime, timedelta
from typing import Any
from uuid import UUID

from sqlalchemy import (
    ColumnElement,
    Connection,
    Interval,
    ScalarSelect,
    Select,
    and_,
    bindparam,
    func,
    select,
    update,
)
from sqlalchemy.exc import OperationalError
from sqlalchemy.sql.dml import ReturningUpdate

from persistence.postgres import webhook_outbox
from persistence.postgres.attempts import with_attempt
from persistence.postgres.fair_queue import (
    BEST,
    FIRST,
    by_turn,
    candidates,
    give_next_turn,
    is_overdue,
)
from persistence.postgres.leadership import LOOK, WAITING_CHANNEL
from persistence.postgres.owner_counters import CLAIMED_BY_ANOTHER
from persistence.postgres.rows import artifact_columns, failure_columns, to_job
from persistence.postgres.tables import OWNED, jobs
from restoration.affinity import Affinity
from restoration.errors import JobNotFound, LeaseLost, QueueTimeout
from restoration.jobs import (
    Artifact,
    AttemptOutcome,
    AttemptRef,
    Failure,
    Job,
    JobStatus,
    sources_of,
)

RECLAIM_BATCH = 50


def _claim(job_id: ScalarSelect[UUID]) -> ReturningUpdate[Any]:
    return (
        update(jobs)
        .where(jobs.c.id == job_id)
        .values(
            status=JobStatus.RUNNING,
            attempt=jobs.c.attempt + 1,
            worker=bindparam("for_worker"),
            lease_until=func.now() + bindparam("lease", type_=Interval()),
            started_at=func.now(),
        )
        .returning(jobs)
    )


# Built once, because building so large a statement takes longer than executing it.
_CLAIM_BEST, _CLAIM_FIRST = _claim(BEST), _claim(FIRST)


def _some(order: ColumnElement[datetime], *conditions: ColumnElement[bool]) -> Select[Any]:
    """Return the query that locks rows for a batch of changes, skipping rows locked by others."""
    of_batch = select(jobs).where(*conditions).order_by(order).limit(RECLAIM_BATCH)
    return of_batch.with_for_update(skip_locked=True)


_OWNED = jobs.c.status.in_(OWNED)
_LAPSED = _some(jobs.c.lease_until, _OWNED, jobs.c.lease_until <= func.now())
_HELD_BY = _some(jobs.c.lease_until, _OWNED, jobs.c.worker == bindparam("by_worker"))
_OVERDUE = _some(jobs.c.queue_deadline_at, is_overdue())


class Overtaken(Exception):
    """A concurrent claim took the owner's last place. A new claim passes over the owner."""


def claim(
    worker: str,
    lease_s: float,
    workflows: Sequence[str],
    connection: Connection,
    affinity: Affinity | None = None,
) -> Job | None:
    """Claim the next job (see WorkerQueue), skipping jobs that others are claiming.

    Raises Overtaken if a concurrent claim took the last place of the job's owner.
    """
    lease = timedelta(seconds=lease_s)
    values = {"for_worker": worker, "of_workflows": list(workflows), "lease": lease}
    try:
        row = None
        if affinity is not None:
            order = affinity.order(candidates(worker, workflows, connection))
            row = connection.execute(_CLAIM_FIRST, {**values, "order": order}).mappings().first()
        if row is None:  # others are claiming all candidates, or there are none
            row = connection.execute(_CLAIM_BEST, values).mappings().first()
    except OperationalError as error:
        if getattr(error.orig, "pgcode", None) == CLAIMED_BY_ANOTHER:
            raise Overtaken from error
        raise
    return None if row is None else to_job(row)


def heartbeat(ref: AttemptRef, lease_s: float, connection: Connection) -> JobStatus:
    values = {**_key(ref), "lease": timedelta(seconds=lease_s)}
    status = connection.execute(_HEARTBEAT, values).scalar()
    if status is None:
        raise _lease_lost(ref)
    return JobStatus(status)


def succeed_quietly(
    ref: AttemptRef, output: Artifact, timings_s: dict[str, float], connection: Connection
) -> Job | None:
    """Do what `succeed` does in one statement, without a transaction around it.

    Return None and change nothing if the job has a webhook, or if `ref` does not own it.
    """
    values = {**_key(ref), **artifact_columns("output", output), "timings_s": timings_s}
    row = connection.execute(_SUCCEED_QUIETLY, values).mappings().first()
    return None if row is None else to_job(row)


def succeed(
    ref: AttemptRef, output: Artifact, timings_s: dict[str, float], connection: Connection
) -> Job:
    values = {**artifact_columns("output", output), "timings_s": timings_s}
    try:
        return _apply(_SUCCEED, ref, connection, values)
    except LeaseLost:
        # An earlier call may have succeeded and its answer been lost.
        row = connection.execute(_SUCCEEDED, _key(ref)).mappings().first()
        if row is None:
            raise
        return to_job(row)


def fail(ref: AttemptRef, failure: Failure, connection: Connection) -> Job:
    values = {
        **failure_columns(failure),
        "failed_attempts": jobs.c.failed_attempts + 1,
        "attempts": with_attempt(AttemptOutcome.FAILED, failure),
    }
    return _move(connection, ref, OWNED, JobStatus.FAILED, values)


def release(
    ref: AttemptRef,
    failure: Failure | None,
    delay_s: float,
    charged: bool,
    connection: Connection,
) -> Job:
    row = connection.execute(_LOCK_OWNED, _key(ref)).mappings().first()
    if row is None:
        raise _lease_lost(ref)
    return _hand_back(connection, to_job(row), failure, delay_s, charged=charged)


def reclaim(worker: str | None, connection: Connection) -> list[Job]:
    """Hand back at most RECLAIM_BATCH jobs with an expired lease, or of a dead `worker`."""
    query = _LAPSED if worker is None else _HELD_BY
    held = [to_job(row) for row in connection.execute(query, {"by_worker": worker}).mappings()]
    reclaimed = []
    for job in sorted(held, key=by_turn):
        lost = Failure("worker_lost", f"the worker was lost during attempt {job.attempt}")
        after = _hand_back(connection, job, lost, delay_s=0)
        if after.status is JobStatus.QUEUED:
            give_next_turn(after, connection)
        reclaimed.append(after)
    return reclaimed


def expire(connection: Connection) -> list[Job]:
    """Fail at most RECLAIM_BATCH jobs that did not start by their queue deadline."""
    overdue = [to_job(row) for row in connection.execute(_OVERDUE).mappings()]
    failure = Failure(QueueTimeout.code, "the job did not start before its queue deadline")
    values = failure_columns(failure)
    return [
        _move(connection, job.ref, {JobStatus.QUEUED}, JobStatus.FAILED, values)
        for job in sorted(overdue, key=by_turn)
    ]


def request_cancel(job_id: UUID, owner: str | None, connection: Connection) -> Job:
    query = select(jobs).where(jobs.c.id == job_id).with_for_update()
    if owner is not None:
        query = query.where(jobs.c.owner == owner)
    row = connection.execute(query).mappings().first()
    if row is None:
        raise job_not_found(job_id)
    return cancel(to_job(row), connection)


def cancel(job: Job, connection: Connection) -> Job:
    """Cancel a job, whose row the caller has locked (see `JobAccess.request_cancel`)."""
    match job.status:
        case JobStatus.QUEUED:
            return _move(connection, job.ref, {job.status}, JobStatus.CANCELLED)
        case JobStatus.RUNNING:
            return _move(connection, job.ref, {job.status}, JobStatus.CANCELLING)
        case _:
            return job


def announce(connection: Connection) -> None:
    """Notify the dispatcher, when this transaction commits, that jobs wait."""
    connection.execute(_ANNOUNCE)


def job_not_found(job_id: UUID) -> JobNotFound:
    return JobNotFound("the job does not exist", job_id=str(job_id))


def _hand_back(
    connection: Connection,
    job: Job,
    failure: Failure | None,
    delay_s: float,
    *,
    charged: bool = True,
) -> Job:
    """End the current attempt of `job` without a result. The caller has locked its row."""
    if job.status is JobStatus.CANCELLING:
        ended = {"attempts": with_attempt(AttemptOutcome.CANCELLED, failure)}
        return _move(connection, job.ref, OWNED, JobStatus.CANCELLED, ended)
    held_against_it = charged and failure is not None
    failed_attempts = job.failed_attempts + held_against_it
    if failure is not None and held_against_it and failed_attempts >= job.max_attempts:
        return fail(job.ref, failure, connection)
    outcome = AttemptOutcome.FAILED if held_against_it else AttemptOutcome.HANDED_BACK
    values = {
        "failed_attempts": failed_attempts,
        "available_at": func.now() + timedelta(seconds=delay_s),
        "worker": None,
        "started_at": None,
        "last_worker": job.worker if failure else None,
        "attempts": with_attempt(outcome, failure),
    }
    announce(connection)
    return _move(connection, job.ref, OWNED, JobStatus.QUEUED, values)


def _update_to(
    sources: Collection[JobStatus], target: JobStatus, values: Mapping[str, object] | None = None
) -> ReturningUpdate[Any]:
    """Return the UPDATE that moves the job of `_key` to `target`.

    It matches only in those of `sources` from which TRANSITIONS allows `target`.
    """
    changes: dict[str, object] = {"status": target, **(values or {})}
    if target not in OWNED:
        changes["lease_until"] = None
    if target.is_final:
        changes["finished_at"] = func.now()
    allowed = sources_of(target).intersection(sources)
    return update(jobs).where(_is_attempt(allowed)).values(changes).returning(jobs)


def _move(
    connection: Connection,
    ref: AttemptRef,
    sources: Collection[JobStatus],
    target: JobStatus,
    values: Mapping[str, object] | None = None,
) -> Job:
    """Move the job to `target` and return it.

    Raises LeaseLost unless `ref` is its newest attempt, and its state is one of `sources` from
    which TRANSITIONS allows `target`.
    """
    return _apply(_update_to(sources, target, values), ref, connection)


def _apply(
    statement: ReturningUpdate[Any],
    ref: AttemptRef,
    connection: Connection,
    values: Mapping[str, object] | None = None,
) -> Job:
    row = connection.execute(statement, {**_key(ref), **(values or {})}).mappings().first()
    if row is None:
        raise _lease_lost(ref)
    job = to_job(row)
    if job.status.is_final:
        webhook_outbox.enqueue(job, connection)
    return job


def _key(ref: AttemptRef) -> dict[str, object]:
    return {"this_job": ref.job_id, "this_attempt": ref.attempt}


def _is_attempt(statuses: Collection[JobStatus]) -> ColumnElement[bool]:
    """Return the condition that a job is in the attempt `_key`, and in one of these states."""
    this_attempt = jobs.c.attempt == bindparam("this_attempt")
    return and_(jobs.c.id == bindparam("this_job"), this_attempt, jobs.c.status.in_(statuses))


# Built once, like `_CLAIM_BEST`.
_HEARTBEAT = (
    update(jobs)
    .where(_is_attempt(OWNED))
    .values(lease_until=func.now() + bindparam("lease", type_=Interval()))
    .returning(jobs.c.status)
)
_SUCCEED = _update_to(
    OWNED, JobStatus.SUCCEEDED, {"attempts": with_attempt(AttemptOutcome.SUCCEEDED)}
)
_SUCCEEDED = select(jobs).where(_is_attempt({JobStatus.SUCCEEDED}))
_LOCK_OWNED = select(jobs).where(_is_attempt(OWNED)).with_for_update()
_SUCCEED_QUIETLY = _SUCCEED.where(jobs.c.webhook_url.is_(None))
_ANNOUNCE = select(func.pg_notify(WAITING_CHANNEL, LOOK))


def _lease_lost(ref: AttemptRef) -> LeaseLost:
    return LeaseLost(
        f"attempt {ref.attempt} does not own job {ref.job_id}",
        job_id=str(ref.job_id),
        attempt=ref.attempt,
    )
