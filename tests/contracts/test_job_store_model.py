"""Any sequence of calls on the JobStore, compared with a few lines that say what it should do."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine
from dataclasses import dataclass
from typing import Any, TypeVar
from uuid import UUID, uuid4

import pytest
from hypothesis import HealthCheck, settings
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

from persistence.database import Database
from persistence.jobs import PostgresJobStore
from restoration.errors import LeaseLost
from restoration.jobs import AttemptRef, Failure, JobStatus
from tests.samples import artifact, new_job

_T = TypeVar("_T")
FAILURE = Failure("engine_crashed", "the engine died")
OWNED = {JobStatus.RUNNING, JobStatus.CANCELLING}
MAX_ATTEMPTS = 2


@dataclass
class _Expected:
    status: JobStatus = JobStatus.QUEUED
    attempt: int = 0
    failed_attempts: int = 0

    def hand_back(self, *, failed: bool) -> None:
        if self.status is JobStatus.CANCELLING:
            self.status = JobStatus.CANCELLED
            return
        self.failed_attempts += failed
        spent = failed and self.failed_attempts >= MAX_ATTEMPTS
        self.status = JobStatus.FAILED if spent else JobStatus.QUEUED


class _Jobs(RuleBasedStateMachine):
    """`refs` holds every attempt there ever was, so that most calls come from stale ones."""

    database_url: str
    refs = Bundle("refs")

    def __init__(self) -> None:
        super().__init__()
        self._runner = asyncio.Runner()
        self._database = Database(self.database_url, pool_size=1)
        self._store = PostgresJobStore(self._database)
        self._owner_name = str(uuid4())  # the rows of earlier runs stay in the table
        self._expected: dict[UUID, _Expected] = {}

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

    @initialize(target=refs)
    def begin(self) -> AttemptRef:
        return self._insert()

    @rule(target=refs)
    def insert(self) -> AttemptRef:
        return self._insert()

    def _insert(self) -> AttemptRef:
        asked = new_job(owner=self._owner_name, max_attempts=MAX_ATTEMPTS)
        job, _ = self._do(self._store.insert(asked))
        self._expected[job.id] = _Expected()
        return job.ref

    @rule(target=refs, lease_s=st.sampled_from([-1.0, 60.0]))
    def claim(self, lease_s: float) -> Any:
        job = self._do(self._store.claim("w", lease_s, ["restore"]))
        waiting = [k for k, e in self._expected.items() if e.status is JobStatus.QUEUED]
        if job is None:
            assert not waiting
            return multiple()
        assert job.id == waiting[0]  # the oldest, since dicts keep the order of insertion
        expected = self._expected[job.id]
        expected.status = JobStatus.RUNNING
        expected.attempt += 1
        return job.ref

    @rule(ref=refs)
    def succeed(self, ref: AttemptRef) -> None:
        call = self._store.succeed(ref, artifact(), {})
        expected = self._expected[ref.job_id]
        if self._owner(ref):
            self._do(call)
            expected.status = JobStatus.SUCCEEDED
        elif (expected.attempt, expected.status) == (ref.attempt, JobStatus.SUCCEEDED):
            self._do(call)
        else:
            self._refused(call)

    @rule(ref=refs)
    def fail(self, ref: AttemptRef) -> None:
        call = self._store.fail(ref, FAILURE)
        if expected := self._owner(ref):
            self._do(call)
            expected.status = JobStatus.FAILED
            expected.failed_attempts += 1
        else:
            self._refused(call)

    @rule(ref=refs, failure=st.sampled_from([None, FAILURE]))
    def release(self, ref: AttemptRef, failure: Failure | None) -> None:
        call = self._store.release(ref, failure)
        if expected := self._owner(ref):
            self._do(call)
            expected.hand_back(failed=failure is not None)
        else:
            self._refused(call)

    @rule(ref=refs)
    def heartbeat(self, ref: AttemptRef) -> None:
        call = self._store.heartbeat(ref, 60)
        if expected := self._owner(ref):
            assert self._do(call) is expected.status
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

    @rule()
    def lose_the_worker(self) -> None:
        held = {k for k, e in self._expected.items() if e.status in OWNED}
        assert {job.id for job in self._do(self._store.reclaim("w"))} == held
        for job_id in held:
            self._expected[job_id].hand_back(failed=True)

    @invariant()
    def rows_are_as_expected(self) -> None:
        rows = self._do(self._store.list(self._owner_name, limit=100)).jobs
        assert self._expected == {
            job.id: _Expected(job.status, job.attempt, job.failed_attempts) for job in rows
        }


def test_any_sequence_of_calls(database_url: str) -> None:
    """Whatever is called in whatever order, rows change as the table of transitions says."""
    machine = type("Jobs", (_Jobs,), {"database_url": database_url})
    run_state_machine_as_test(
        machine,
        settings=settings(
            max_examples=20,
            stateful_step_count=30,
            deadline=None,
            suppress_health_check=[HealthCheck.too_slow],
        ),
    )
