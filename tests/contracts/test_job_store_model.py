"""Compare random sequences of JobStore calls with a small model of the expected behaviour."""

from __future__ import annotations

import asyncio
import itertools
from collections import Counter
from collections.abc import Coroutine
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any, TypeVar
from uuid import UUID, uuid4

import pytest
from hypothesis import HealthCheck, assume, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    Bundle,
    RuleBasedStateMachine,
    initialize,
    invariant,
    multiple,
    rule,
    run_state_machine_as_test,
)
from sqlalchemy import Connection, func, select

from persistence.postgres.database import Database
from persistence.postgres.jobs import PostgresJobStore
from persistence.postgres.tables import jobs, owners, turns
from restoration.errors import LeaseLost
from restoration.jobs import (
    AttemptOutcome,
    AttemptRef,
    Failure,
    Job,
    JobStatus,
    NewJob,
    Priority,
)
from tests.support.samples import artifact, new_job

_T = TypeVar("_T")
FAILURE = Failure("engine_crashed", "the engine died")
OWNED = {JobStatus.RUNNING, JobStatus.CANCELLING}
MAX_ATTEMPTS = 2
LEASES_S = st.sampled_from([-1.0, 60.0])  # one that has lapsed, and one that has not
Turn = tuple[str, Priority]


@dataclass
class _Expected:
    status: JobStatus = JobStatus.QUEUED
    attempt: int = 0
    failed_attempts: int = 0
    overdue: bool = False
    turn: Turn = ("", Priority.INTERACTIVE)
    history: list[AttemptOutcome] = field(default_factory=list)
    retry_of: UUID | None = None
    lapsed: bool = False

    @property
    def can_start(self) -> bool:
        return self.status is JobStatus.QUEUED and not (self.overdue and self.attempt == 0)

    def end(self, status: JobStatus, outcome: AttemptOutcome) -> None:
        self.status = status
        self.lapsed = False
        self.history.append(outcome)

    def hand_back(self, *, failed: bool) -> None:
        if self.status is JobStatus.CANCELLING:
            self.end(JobStatus.CANCELLED, AttemptOutcome.CANCELLED)
            return
        self.failed_attempts += failed
        spent = failed and self.failed_attempts >= MAX_ATTEMPTS
        outcome = AttemptOutcome.FAILED if failed else AttemptOutcome.HANDED_BACK
        self.end(JobStatus.FAILED if spent else JobStatus.QUEUED, outcome)


class _Jobs(RuleBasedStateMachine):
    """Random calls for any attempt that ever existed, most of them stale, or for unclaimed jobs."""

    database_url: str
    waits = Bundle("waits")
    runs = Bundle("runs")
    refs = st.one_of(runs, waits)

    def __init__(self) -> None:
        super().__init__()
        self._runner = asyncio.Runner()
        self._database = Database(self.database_url, pool_size=1)
        self._store = PostgresJobStore(self._database)
        # because rows of earlier examples stay in the table
        self._owners = [str(uuid4()) for _ in range(2)]
        self._expected: dict[UUID, _Expected] = {}
        # The last claim in each turn, numbered from 1, or 0 for a turn that began without one.
        self._turns: dict[Turn, tuple[int, int]] = {}
        # turns that count as interactive in any class
        self._raised: set[Turn] = set()
        self._clock = 0
        self._workers = 0

    def teardown(self) -> None:
        for job_id in self._expected:
            job = self._do(self._store.request_cancel(job_id))
            if not job.status.is_final:
                self._do(self._store.release(job.ref, None))
        self._do(self._database.aclose())
        self._runner.close()

    def _do(self, call: Coroutine[Any, Any, _T]) -> _T:
        return self._runner.run(call)

    def _owner(self, ref: AttemptRef) -> _Expected | None:
        expected = self._expected[ref.job_id]
        owns = expected.attempt == ref.attempt and expected.status in OWNED
        return expected if owns else None

    def _refused(self, call: Coroutine[Any, Any, object]) -> None:
        with pytest.raises(LeaseLost):
            self._do(call)

    @initialize(target=waits)
    def one_waits(self) -> Any:
        return self.insert(0, Priority.INTERACTIVE, overdue=False)

    @initialize(target=runs, leases_s=st.lists(LEASES_S, min_size=1, max_size=4))
    def some_run(self, leases_s: list[float]) -> Any:
        """Start with running jobs; most random sequences would have none."""
        for owner, priority in itertools.product((0, 1), Priority):
            self.insert(owner, priority, overdue=False)
        return multiple(*[self.claim(lease_s) for lease_s in leases_s])

    @rule(
        target=waits,
        owner=st.integers(0, 1),
        priority=st.sampled_from(Priority),
        overdue=st.sampled_from([False, False, True]),
    )
    def insert(self, owner: int, priority: Priority, overdue: bool) -> AttemptRef:
        asked = new_job(
            owner=self._owners[owner],
            priority=priority,
            max_attempts=MAX_ATTEMPTS,
            queue_limit_s=-1.0 if overdue else 3600.0,
        )
        return self._insert(asked)

    def _insert(self, asked: NewJob) -> AttemptRef:
        job, created = self._do(self._store.insert(asked))
        assert created
        turn, overdue = (asked.owner, asked.options.priority), asked.queue_limit_s < 0
        self._expected[job.id] = _Expected(turn=turn, overdue=overdue, retry_of=asked.retry_of)
        self._waits(turn)
        return job.ref

    def _waits(self, turn: Turn) -> None:
        """Add a waiting job: an idle turn starts in its class, before all turns that have had a
        claim."""
        if [e.turn for e in self._waiting()].count(turn) > 1:
            return
        self._clock += 1
        self._turns[turn] = max(self._turns.get(turn, (0, 0)), (0, self._clock))
        self._raised.discard(turn)

    def _waiting(self) -> list[_Expected]:
        return [e for e in self._expected.values() if e.status is JobStatus.QUEUED]

    @rule(target=waits, ref=refs)
    def send_again(self, ref: AttemptRef) -> Any:
        expected = self._expected[ref.job_id]
        assume(expected.status in {JobStatus.FAILED, JobStatus.CANCELLED})
        owner, priority = expected.turn
        again = new_job(
            owner=owner, priority=priority, max_attempts=MAX_ATTEMPTS, retry_of=ref.job_id
        )
        earlier = [k for k, e in self._expected.items() if e.retry_of == ref.job_id]
        if not earlier:
            return self._insert(again)
        job, created = self._do(self._store.insert(again))
        assert (job.id, created) == (earlier[0], False)
        return multiple()

    @rule()
    def expire(self) -> None:
        overdue = {
            k for k, e in self._expected.items() if e.status is JobStatus.QUEUED and not e.can_start
        }
        assert {job.id for job in self._do(self._store.expire())} == overdue
        for job_id in overdue:
            self._expected[job_id].status = JobStatus.FAILED

    @rule()
    def promote(self) -> None:
        """Promote the turns with started jobs; no job here is old enough to be promoted by age."""
        self._do(self._store.promote())
        self._raised = {e.turn for e in self._waiting() if e.attempt > 0}

    @rule(target=runs, lease_s=LEASES_S)
    def claim(self, lease_s: float) -> Any:
        self._workers += 1  # each its own: none is passed over
        job = self._do(self._store.claim(f"w{self._workers}", lease_s, ["restore"]))
        # Dicts keep the order of insertion, so that the first job of a turn is its oldest.
        waiting = {e.turn: k for k, e in reversed(self._expected.items()) if e.can_start}
        if job is None:
            assert not waiting
            return multiple()
        turn = min(waiting, key=self._place)
        assert job.id == waiting[turn]
        self._clock += 1
        self._turns[turn] = (1, self._clock)
        expected = self._expected[job.id]
        expected.status = JobStatus.RUNNING
        expected.attempt += 1
        expected.lapsed = lease_s < 0
        return job.ref

    def _place(self, turn: Turn) -> tuple[int, tuple[int, int]]:
        return list(Priority).index(self._counts_as(turn)), self._turns[turn]

    def _counts_as(self, turn: Turn) -> Priority:
        return Priority.INTERACTIVE if turn in self._raised else turn[1]

    @rule(ref=refs)
    def succeed(self, ref: AttemptRef) -> None:
        call = self._store.succeed(ref, artifact(), {})
        expected = self._expected[ref.job_id]
        if self._owner(ref):
            self._do(call)
            expected.end(JobStatus.SUCCEEDED, AttemptOutcome.SUCCEEDED)
        elif (expected.attempt, expected.status) == (ref.attempt, JobStatus.SUCCEEDED):
            self._do(call)
        else:
            self._refused(call)

    @rule(ref=refs)
    def fail(self, ref: AttemptRef) -> None:
        call = self._store.fail(ref, FAILURE)
        if expected := self._owner(ref):
            self._do(call)
            expected.end(JobStatus.FAILED, AttemptOutcome.FAILED)
            expected.failed_attempts += 1
        else:
            self._refused(call)

    @rule(ref=refs, failure=st.sampled_from([None, FAILURE]), charged=st.booleans())
    def release(self, ref: AttemptRef, failure: Failure | None, charged: bool) -> None:
        call = self._store.release(ref, failure, charged=charged)
        if expected := self._owner(ref):
            self._do(call)
            self._hand_back(expected, failed=failure is not None and charged)
        else:
            self._refused(call)

    @rule(ref=refs, lease_s=LEASES_S)
    def heartbeat(self, ref: AttemptRef, lease_s: float) -> None:
        call = self._store.heartbeat(ref, lease_s)
        if expected := self._owner(ref):
            assert self._do(call) is expected.status
            expected.lapsed = lease_s < 0
        else:
            self._refused(call)

    @rule(ref=refs)
    def cancel(self, ref: AttemptRef) -> None:
        self._do(self._store.request_cancel(ref.job_id))
        expected = self._expected[ref.job_id]
        if expected.status is JobStatus.QUEUED:
            expected.status = JobStatus.CANCELLED
        elif expected.status is JobStatus.RUNNING:
            expected.status = JobStatus.CANCELLING

    @rule(ref=refs)
    def lose_the_worker(self, ref: AttemptRef) -> None:
        """Reclaim from a dead worker: its only job waits again, and has the next turn."""
        expected = self._expected[ref.job_id]
        if expected.status not in OWNED:
            return
        worker = self._do(self._store.get(ref.job_id)).worker
        assert worker is not None
        assert [job.id for job in self._do(self._store.reclaim(worker))] == [ref.job_id]
        self._lose(expected)

    @rule()
    def reclaim(self) -> None:
        """Reclaim exactly the jobs whose lease has lapsed since their last heartbeat."""
        reclaimed = [job.id for job in self._do(self._store.reclaim())]
        assert Counter(reclaimed) == Counter(k for k, e in self._expected.items() if e.lapsed)
        for job_id in reclaimed:
            self._lose(self._expected[job_id])

    def _lose(self, expected: _Expected) -> None:
        self._hand_back(expected, failed=True)
        if expected.status is JobStatus.QUEUED:
            self._clock += 1
            self._turns[expected.turn] = (-1, self._clock)
            self._raised.add(expected.turn)

    def _hand_back(self, expected: _Expected, *, failed: bool) -> None:
        expected.hand_back(failed=failed)
        if expected.status is JobStatus.QUEUED:
            self._waits(expected.turn)

    @invariant()
    def turns_count_as_they_should(self) -> None:
        """A turn counts as interactive while one of its jobs lost its worker, and not at all when
        idle."""
        expected = {e.turn: self._counts_as(e.turn) for e in self._waiting()}
        assert self._do(self._database.run(_counting)) == expected

    @invariant()
    def rows_are_as_expected(self) -> None:
        rows = [
            row
            for owner in self._owners
            for row in self._do(self._store.list(owner, limit=100)).jobs
        ]
        assert self._expected == {
            job.id: _Expected(
                job.status,
                job.attempt,
                job.failed_attempts,
                overdue=job.queue_deadline_at < job.created_at,
                turn=(job.owner, job.options.priority),
                history=[record.outcome for record in job.attempts],
                retry_of=job.retry_of,
                lapsed=job.lease_until is not None and job.lease_until < datetime.now(UTC),
            )
            for job in rows
        }
        assert all(_is_consistent(job) for job in rows)

    @invariant()
    def turns_count_what_waits(self) -> None:
        assert self._do(self._database.run(_counted)) == self._do(self._database.run(_waiting))

    @invariant()
    def owners_have_what_their_jobs_have(self) -> None:
        assert self._do(self._database.run(_owned)) == self._do(self._database.run(_recounted))


def _is_consistent(job: Job) -> bool:
    """Return whether the history has each ended attempt once, and charged ones are counted."""
    over = job.attempt - (job.status in OWNED)
    charged = [r for r in job.attempts if r.outcome is AttemptOutcome.FAILED]
    return (
        [r.attempt for r in job.attempts] == list(range(1, over + 1))
        and len(charged) == job.failed_attempts <= job.max_attempts
        and (job.status is not JobStatus.SUCCEEDED or job.attempts[-1].attempt == job.attempt)
    )


def _counting(connection: Connection) -> dict[Turn, Priority]:
    query = select(turns.c.owner, turns.c.priority, turns.c.counts_as)
    rows = connection.execute(query.where(turns.c.counts_as.is_not(None)))
    return {(owner, priority): counts_as for owner, priority, counts_as in rows}


def _counted(connection: Connection) -> dict[Turn, int]:
    query = select(turns.c.owner, turns.c.priority, turns.c.waiting).where(turns.c.waiting > 0)
    return {(owner, priority): count for owner, priority, count in connection.execute(query)}


def _waiting(connection: Connection) -> dict[Turn, int]:
    query = (
        select(jobs.c.owner, jobs.c.priority, func.count())
        .where(jobs.c.status == JobStatus.QUEUED)
        .group_by(jobs.c.owner, jobs.c.priority)
    )
    return {(owner, priority): count for owner, priority, count in connection.execute(query)}


def _owned(connection: Connection) -> set[tuple[str, int, int]]:
    query = select(owners.c.owner, owners.c.running, owners.c.stored_bytes)
    return {tuple(row) for row in connection.execute(query)}


def _recounted(connection: Connection) -> set[tuple[str, int, int]]:
    running = func.count().filter(jobs.c.status.in_(OWNED))
    inputs = func.coalesce(func.sum(jobs.c.input_size_bytes).filter(jobs.c.retry_of.is_(None)), 0)
    outputs = func.coalesce(func.sum(jobs.c.output_size_bytes), 0)
    query = select(jobs.c.owner, running, inputs + outputs).group_by(jobs.c.owner)
    return {(owner, count, int(size)) for owner, count, size in connection.execute(query)}


def test_any_sequence_of_calls(database_url: str) -> None:
    """Rows change as the table of transitions says, in any order of calls."""
    machine = type("Jobs", (_Jobs,), {"database_url": database_url})
    run_state_machine_as_test(
        machine,
        settings=settings(
            max_examples=40,
            stateful_step_count=30,
            deadline=None,
            suppress_health_check=[HealthCheck.too_slow],
        ),
    )
