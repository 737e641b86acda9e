"""An in-memory store of jobs; the contract suites run on it too.

Interactive jobs come first, each class in the order of submission: only Postgres lets owners take
turns, promotes old jobs and bounds a worker's choice.

Tests can set its clock, and take it down: with `down = True` every call raises
DependencyUnavailable.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from datetime import datetime, timedelta
from uuid import UUID

from persistence.postgres.fair_queue import ELSEWHERE_S
from restoration.affinity import Affinity, Candidate
from restoration.errors import (
    DependencyUnavailable,
    IdempotencyConflict,
    InputExpired,
    InvalidRequest,
    JobNotFound,
    LeaseLost,
    QueueTimeout,
    UploadUsed,
)
from restoration.jobs import (
    MAX_RECORDS,
    TRANSITIONS,
    Artifact,
    AttemptOutcome,
    AttemptRecord,
    AttemptRef,
    Failure,
    Job,
    JobPage,
    JobStatus,
    NewJob,
    Priority,
    Reused,
)
from restoration.limits.quotas import Quotas
from restoration.queue_policy import Load, QueuePolicy, versioned
from restoration.reuse import work_key
from restoration.scaling import Demand
from restoration.webhooks.messages import Delivery
from tests.fakes.stores import utc_now

_OWNED = frozenset({JobStatus.RUNNING, JobStatus.CANCELLING})
_CLASSES = list(Priority)


def _stored_bytes(row: Job) -> int:
    keeps_input = row.input_expired_at is None and row.retry_of is None
    kept = [row.input] if keeps_input else []
    if row.output is not None and row.output_expired_at is None:
        kept.append(row.output)
    return sum(artifact.size_bytes for artifact in kept)


@dataclass
class MemoryJobStore:
    """`rows` maps ids to jobs in the order of insertion."""

    clock: Callable[[], datetime] = utc_now
    rows: dict[UUID, Job] = field(default_factory=dict)
    outbox: dict[UUID, Delivery] = field(default_factory=dict)
    down: bool = False
    policy: QueuePolicy = field(default_factory=QueuePolicy)
    # the worker that handed a job back with a failure, and may not have it for a moment
    last_worker: dict[UUID, str] = field(default_factory=dict)
    max_running: dict[str, int] = field(default_factory=dict)
    work_keys: dict[UUID, bytes] = field(default_factory=dict)
    # owner and size of direct uploads that have no job yet
    uploads: dict[UUID, tuple[str, int]] = field(default_factory=dict)

    async def insert(self, job: NewJob, quotas: Quotas | None = None) -> tuple[Job, bool]:
        self._check_up()
        earlier = self.rows.get(job.id) or next(
            (row for row in self.rows.values() if job.retry_of and row.retry_of == job.retry_of),
            None,
        )
        if job.idempotency_key is not None:
            earlier = await self.find_by_key(job.owner, job.idempotency_key) or earlier
        source = self.rows.get(job.retry_of) if job.retry_of else None
        if job.retry_of and source is None:
            raise JobNotFound("the job does not exist", job_id=str(job.retry_of))
        if source is not None and source.input_expired_at is not None:
            raise InputExpired("the photo has been removed")
        if earlier is None:
            more_bytes = 0 if job.retry_of else job.input.size_bytes
            if job.reused is not None:
                more_bytes += job.reused.output.size_bytes
            if job.id in self.uploads:
                more_bytes -= self.uploads[job.id][1]
            self._check_room(job.owner, quotas, more_bytes)
            self.uploads.pop(job.id, None)
            limit = self.policy.running_limit(quotas, is_retry=job.retry_of is not None)
            if limit is not None:
                self.max_running[job.owner] = limit
            now = self.clock()
            shared = {f.name: getattr(job, f.name) for f in fields(NewJob)}
            deadline_at = now + timedelta(seconds=shared.pop("queue_limit_s"))
            reused: Reused | None = shared.pop("reused")
            row = Job(
                **shared,
                status=JobStatus.QUEUED,
                created_at=now,
                available_at=now,
                queue_deadline_at=deadline_at,
            )
            self.work_keys[job.id] = work_key(job)
            if reused is not None:
                return self._end_reused(row, reused), True
            self.rows[job.id] = row
            return row, True
        if earlier.request_digest != job.request_digest:
            key_used = job.idempotency_key in {earlier.idempotency_key} - {None}
            if earlier.id == job.id and not key_used:
                raise UploadUsed("the upload was used", job_id=str(earlier.id))
            raise IdempotencyConflict(
                "the key was used for another request", job_id=str(earlier.id)
            )
        return earlier, False

    def _end_reused(self, row: Job, reused: Reused) -> Job:
        ended = replace(
            row,
            status=JobStatus.SUCCEEDED,
            output=reused.output,
            finished_at=row.created_at,
            reused_from=reused.source,
        )
        if row.options.webhook_url is not None:
            self.outbox[row.id] = Delivery(next_try_at=row.created_at)
        self.rows[row.id] = ended
        return ended

    async def find_result(self, job: NewJob) -> Job | None:
        self._check_up()
        same = [self.rows[id_] for id_, key in self.work_keys.items() if key == work_key(job)]
        stored = [row for row in same if row.output and row.output_expired_at is None]
        return stored[-1] if stored else None

    async def find_by_key(self, owner: str, idempotency_key: str) -> Job | None:
        self._check_up()
        wanted = (owner, idempotency_key)
        lives_from = self.clock() - timedelta(seconds=self.policy.idempotency_ttl_s)
        rows = [row for row in self.rows.values() if row.created_at > lives_from]
        return next((row for row in rows if (row.owner, row.idempotency_key) == wanted), None)

    async def check_room(
        self, owner: str, quotas: Quotas | None = None, more_bytes: int = 0, more: int = 1
    ) -> None:
        self._check_up()
        self._check_room(owner, quotas, more_bytes, more)

    def _check_room(
        self, owner: str, quotas: Quotas | None, more_bytes: int, more: int = 1
    ) -> None:
        waiting = [row for row in self.rows.values() if row.status is JobStatus.QUEUED]
        owned = [row for row in waiting if row.owner == owner]
        stored = sum(_stored_bytes(row) for row in self.rows.values() if row.owner == owner)
        stored += self.uploading_bytes(owner)
        load = Load(len(waiting) + more, len(owned) + more, stored + more_bytes)
        self.policy.check_room(load, quotas)

    def uploading_bytes(self, owner: str) -> int:
        return sum(size for name, size in self.uploads.values() if name == owner)

    async def get(self, job_id: UUID, owner: str | None = None) -> Job:
        self._check_up()
        row = self.rows.get(job_id)
        if row is None or owner not in (None, row.owner):
            raise JobNotFound("the job does not exist", job_id=str(job_id))
        return row

    async def find(self, job_ids: Sequence[UUID]) -> Sequence[Job]:
        self._check_up()
        return [self.rows[job_id] for job_id in job_ids if job_id in self.rows]

    async def ended(self, job_ids: Sequence[UUID]) -> Sequence[Job]:
        return [row for row in await self.find(job_ids) if row.status.is_final]

    async def list(
        self,
        owner: str,
        statuses: Sequence[JobStatus] = (),
        cursor: str | None = None,
        limit: int = 50,
    ) -> JobPage:
        self._check_up()
        newest_first = [row for row in reversed(self.rows.values()) if row.owner == owner]
        if cursor is not None:
            at = [i for i, row in enumerate(newest_first) if str(row.id) == cursor]
            if not at:
                raise InvalidRequest("the cursor is invalid; follow the `next` path of a page")
            newest_first = newest_first[at[0] + 1 :]
        found = [row for row in newest_first if not statuses or row.status in statuses]
        page = tuple(found[:limit])
        return JobPage(page, str(page[-1].id) if len(found) > limit else None)

    async def claim(
        self,
        worker: str,
        lease_s: float,
        workflows: Sequence[str],
        affinity: Affinity | None = None,
    ) -> Job | None:
        self._check_up()
        now = self.clock()
        elsewhere_from = now - timedelta(seconds=ELSEWHERE_S)
        able = []
        for row in self._waiting():
            names = {row.workflow, versioned(row.workflow, row.workflow_version)}
            failed_here = self.last_worker.get(row.id) == worker
            if names.isdisjoint(workflows) or (failed_here and row.available_at > elsewhere_from):
                continue
            able.append(row)
        if not able:
            return None
        best = able[0]
        if affinity is not None:
            of_class = [row for row in able if row.options.priority is best.options.priority]
            candidates = [Candidate(row.id, row.workflow) for row in of_class]
            best = self.rows[affinity.order(candidates)[0]]
        return self._move(
            best,
            JobStatus.RUNNING,
            attempt=best.attempt + 1,
            worker=worker,
            lease_until=now + timedelta(seconds=lease_s),
            started_at=now,
        )

    async def heartbeat(self, ref: AttemptRef, lease_s: float) -> JobStatus:
        row = self._owned(ref)
        lease_until = self.clock() + timedelta(seconds=lease_s)
        self.rows[row.id] = replace(row, lease_until=lease_until)
        return row.status

    async def succeed(
        self, ref: AttemptRef, output: Artifact, timings_s: Mapping[str, float]
    ) -> Job:
        row = self._owned(ref, or_in={JobStatus.SUCCEEDED})
        if row.status is JobStatus.SUCCEEDED:
            return row
        row = self._record(row, AttemptOutcome.SUCCEEDED)
        return self._move(row, JobStatus.SUCCEEDED, output=output, timings_s=timings_s)

    async def fail(self, ref: AttemptRef, failure: Failure) -> Job:
        row = self._owned(ref)
        charged = row.failed_attempts + 1
        row = self._record(row, AttemptOutcome.FAILED, failure)
        return self._move(row, JobStatus.FAILED, failure=failure, failed_attempts=charged)

    async def release(
        self,
        ref: AttemptRef,
        failure: Failure | None,
        delay_s: float = 0,
        *,
        charged: bool = True,
    ) -> Job:
        row = self._owned(ref)
        if row.status is JobStatus.CANCELLING:
            row = self._record(row, AttemptOutcome.CANCELLED, failure)
            return self._move(row, JobStatus.CANCELLED)
        charged = charged and failure is not None
        failed_attempts = row.failed_attempts + charged
        if failure is not None and charged and failed_attempts >= row.max_attempts:
            return await self.fail(ref, failure)
        outcome = AttemptOutcome.FAILED if charged else AttemptOutcome.HANDED_BACK
        self.last_worker.pop(row.id, None)
        if failure is not None and row.worker is not None:
            self.last_worker[row.id] = row.worker
        return self._move(
            self._record(row, outcome, failure),
            JobStatus.QUEUED,
            failed_attempts=failed_attempts,
            available_at=self.clock() + timedelta(seconds=delay_s),
            worker=None,
            started_at=None,
        )

    async def request_cancel(self, job_id: UUID, owner: str | None = None) -> Job:
        row = await self.get(job_id, owner)
        match row.status:
            case JobStatus.QUEUED:
                return self._move(row, JobStatus.CANCELLED)
            case JobStatus.RUNNING:
                return self._move(row, JobStatus.CANCELLING)
            case _:
                return row

    async def reclaim(self, worker: str | None = None) -> Sequence[Job]:
        self._check_up()
        now = self.clock()
        lost = [
            row
            for row in self.rows.values()
            if row.lease_until is not None
            and (row.lease_until <= now if worker is None else row.worker == worker)
        ]
        failure = Failure("worker_lost", "the worker was lost")
        return [await self.release(row.ref, failure) for row in lost]

    async def expire(self) -> Sequence[Job]:
        self._check_up()
        failure = Failure(QueueTimeout.code, "the job did not start before its queue deadline")
        overdue = [row for row in self.rows.values() if self._is_overdue(row)]
        return [self._move(row, JobStatus.FAILED, failure=failure) for row in overdue]

    async def promote(self) -> None:
        self._check_up()

    async def waiting(self, limit: int) -> Sequence[AttemptRef]:
        self._check_up()
        return [AttemptRef(row.id, row.attempt + 1) for row in self._waiting()[:limit]]

    async def demand(self) -> Demand:
        self._check_up()
        rows = self.rows.values()
        groups = {
            (row.owner, row.options.priority) for row in rows if row.status is JobStatus.QUEUED
        }
        waiting = {group: self._could_start(*group) for group in groups}
        in_hand = [row.options.priority for row in rows if row.status in _OWNED]
        interactive = [n for (_, kind), n in waiting.items() if kind is Priority.INTERACTIVE]
        return Demand(
            sum(waiting.values()),
            len(in_hand),
            sum(interactive),
            in_hand.count(Priority.INTERACTIVE),
        )

    async def deliveries(self, job_ids: Sequence[UUID]) -> Mapping[UUID, Delivery]:
        self._check_up()
        return {job_id: self.outbox[job_id] for job_id in job_ids if job_id in self.outbox}

    async def ping(self) -> None:
        self._check_up()

    def _check_up(self) -> None:
        if self.down:
            raise DependencyUnavailable("Postgres: refused at db.internal:5432")

    # A tuple, because `list` names a method here.
    def _waiting(self) -> tuple[Job, ...]:
        now = self.clock()
        ready = [
            row
            for row in self.rows.values()
            if row.status is JobStatus.QUEUED
            and row.available_at <= now
            and not self._is_overdue(row)
            and not self._is_full(row.owner)
        ]
        return tuple(
            sorted(ready, key=lambda row: (_CLASSES.index(row.options.priority), row.created_at))
        )

    def _could_start(self, owner: str, priority: Priority) -> int:
        rows = [row for row in self.rows.values() if row.owner == owner]
        waiting = [
            r for r in rows if r.status is JobStatus.QUEUED and r.options.priority is priority
        ]
        running = sum(row.status in _OWNED for row in rows)
        limit = self.max_running.get(owner, 0)
        return max(min(len(waiting), limit - running), 0) if limit else len(waiting)

    def _is_full(self, owner: str) -> bool:
        limit = self.max_running.get(owner, 0)
        running = [row for row in self.rows.values() if row.owner == owner and row.status in _OWNED]
        return 0 < limit <= len(running)

    def _is_overdue(self, row: Job) -> bool:
        unstarted = row.status is JobStatus.QUEUED and row.attempt == 0
        return unstarted and row.queue_deadline_at <= self.clock()

    def _record(self, row: Job, outcome: AttemptOutcome, failure: Failure | None = None) -> Job:
        assert row.worker is not None
        assert row.started_at is not None
        code, message = (failure.code, failure.message) if failure else (None, None)
        record = AttemptRecord(
            row.attempt, row.worker, row.started_at, self.clock(), outcome, code, message
        )
        return replace(row, attempts=(*row.attempts, record)[-MAX_RECORDS:])

    def _owned(self, ref: AttemptRef, or_in: Collection[JobStatus] = ()) -> Job:
        self._check_up()
        row = self.rows.get(ref.job_id)
        if row is None or row.ref != ref or row.status not in _OWNED.union(or_in):
            raise LeaseLost(f"attempt {ref.attempt} does not own job {ref.job_id}")
        return row

    def _move(self, row: Job, target: JobStatus, **changes: object) -> Job:
        assert target in TRANSITIONS[row.status]
        if target not in _OWNED:
            changes["lease_until"] = None
        if target.is_final:
            changes["finished_at"] = now = self.clock()
            if row.options.webhook_url is not None:
                self.outbox[row.id] = Delivery(next_try_at=now)
        self.rows[row.id] = replace(row, status=target, **changes)  # type: ignore[arg-type]
        return self.rows[row.id]
