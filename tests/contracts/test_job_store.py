"""The rules of the JobStore port on the tests' Postgres."""

from __future__ import annotations

import asyncio
from collections import Counter
from datetime import UTC
from uuid import uuid4

import pytest

from persistence.postgres.database import Database
from persistence.postgres.jobs import PostgresJobStore
from restoration.errors import IdempotencyConflict, InvalidRequest, JobNotFound
from restoration.jobs import AttemptRef, Job, JobStatus, Priority
from tests.support.job_stores import FAILURE, LAPSED_S, LEASE_S, JobStore, claimed, queued
from tests.support.samples import artifact, new_job


@pytest.fixture
def store(database: Database) -> JobStore:
    return PostgresJobStore(database)


class TestInsertAndGet:
    async def test_a_job_comes_back_as_it_was_given(self, store: JobStore) -> None:
        """The row has all submitted values, with the type of each parameter; times are in UTC."""
        asked = new_job(
            params={"strength": 1.0, "tiles": 3, "fast": True, "note": "ü\n'; --", "seed": 1e22},
            idempotency_key="k",
            request_digest="d",
            priority=Priority.BATCH,
            run_limit_s=7.5,
            webhook_url="https://example.com/",
            keep_metadata=True,
        )
        job, created = await store.insert(asked)
        assert created
        assert job == await store.get(asked.id)
        assert job.status is JobStatus.QUEUED
        assert job.ref == AttemptRef(asked.id, 0)
        assert {k: (type(v), v) for k, v in job.params.items()} == {
            k: (type(v), v) for k, v in asked.params.items()
        }
        for name in ("owner", "workflow", "workflow_version", "output_format", "options"):
            assert getattr(job, name) == getattr(asked, name)
        assert (job.input, job.idempotency_key, job.request_digest) == (asked.input, "k", "d")
        assert job.created_at.tzinfo is UTC or job.created_at.utcoffset() == UTC.utcoffset(None)

    async def test_missing_and_foreign_jobs_look_the_same(self, store: JobStore) -> None:
        """Reading another owner's job raises the same error as reading an unknown one."""
        job = await queued(store, owner="alice")
        assert (await store.get(job.id, owner="alice")).id == job.id
        with pytest.raises(JobNotFound) as foreign:
            await store.get(job.id, owner="mallory")
        with pytest.raises(JobNotFound) as missing:
            await store.get(uuid4(), owner="mallory")
        assert foreign.value.message == missing.value.message
        with pytest.raises(JobNotFound):
            await store.request_cancel(job.id, owner="mallory")

    async def test_many_are_found_at_once(self, store: JobStore) -> None:
        """`find` returns existing jobs in any state, and leaves out unknown ones."""
        waiting, ended = await queued(store), await queued(store)
        await store.request_cancel(ended.id)
        found = await store.find([uuid4(), ended.id, waiting.id])
        assert {job.id: job.status for job in found} == {
            waiting.id: JobStatus.QUEUED,
            ended.id: JobStatus.CANCELLED,
        }
        assert await store.find([]) == []

    async def test_what_cannot_be_stored_is_the_callers_error(self, store: JobStore) -> None:
        """A value that Postgres refuses, here NaN in JSON, is an InvalidRequest and not a crash."""
        with pytest.raises(InvalidRequest):
            await store.insert(new_job(params={"strength": float("nan")}))


class TestIdempotency:
    async def test_the_same_key_is_the_same_job(self, store: JobStore) -> None:
        """A used key returns its job, but only for the same request of the same owner."""
        first, created = await store.insert(new_job(idempotency_key="k", request_digest="d"))
        again, created_again = await store.insert(new_job(idempotency_key="k", request_digest="d"))
        assert (created, created_again) == (True, False)
        assert again == first == await store.find_by_key("alice", "k")
        with pytest.raises(IdempotencyConflict):
            await store.insert(new_job(idempotency_key="k", request_digest="other"))
        _, created = await store.insert(
            new_job(owner="bob", idempotency_key="k", request_digest="other")
        )
        assert created
        assert await store.find_by_key("alice", "unused") is None

    async def test_jobs_without_a_key_never_collide(self, store: JobStore) -> None:
        """Jobs without a key are always new, unless the job's id repeats."""
        asked = new_job()
        first, _ = await store.insert(asked)
        second, created = await store.insert(new_job())
        assert created
        assert second.id != first.id
        assert await store.insert(asked) == (first, False)

    @pytest.mark.idempotency
    async def test_of_concurrent_inserts_of_a_key_one_creates(self, store: JobStore) -> None:
        """Concurrent inserts with one key create one job, and all of them return it."""
        inserts = [
            store.insert(new_job(idempotency_key="k", request_digest="d")) for _ in range(16)
        ]
        outcomes = await asyncio.gather(*inserts)
        assert len({job.id for job, _ in outcomes}) == 1
        assert sum(created for _, created in outcomes) == 1


class TestClaim:
    async def test_a_claim_is_a_new_attempt_with_a_lease(self, store: JobStore) -> None:
        """A claim increments the attempt, and records the worker and the end of its lease."""
        job = await claimed(store)
        assert (job.status, job.attempt, job.worker) == (JobStatus.RUNNING, 1, "w")
        assert job.lease_until is not None
        assert job.started_at is not None
        assert (job.lease_until - job.started_at).total_seconds() == LEASE_S
        assert await store.claim("w", LEASE_S, ["restore"]) is None

    async def test_best_first(self, store: JobStore) -> None:
        """Interactive jobs come before batch jobs and older ones first, also in `waiting`."""
        batch = await queued(store, priority=Priority.BATCH)
        older = await queued(store)
        newer = await queued(store)
        expected = [older.id, newer.id, batch.id]
        waiting = await store.waiting(10)
        assert list(waiting) == [AttemptRef(job_id, 1) for job_id in expected]
        assert list(await store.waiting(2)) == list(waiting[:2])
        claimed = [await store.claim("w", LEASE_S, ["restore"]) for _ in expected]
        assert [job.ref for job in claimed if job] == list(waiting)
        assert list(await store.waiting(10)) == []

    async def test_only_workflows_that_the_worker_has(self, store: JobStore) -> None:
        """A worker never gets a job of a workflow that it did not name."""
        await queued(store, workflow="enlarge")
        assert await store.claim("w", LEASE_S, ["restore"]) is None
        assert await store.claim("w", LEASE_S, []) is None
        assert await store.claim("w", LEASE_S, ["restore", "enlarge"]) is not None

    async def test_concurrent_claims_share_the_jobs_out(self, store: JobStore) -> None:
        """With 200 jobs and 8 concurrent claimers, each job is claimed exactly once."""
        inserted = await asyncio.gather(*(store.insert(new_job()) for _ in range(200)))
        claimed: list[AttemptRef] = []

        async def work(name: str) -> None:
            while (job := await store.claim(name, LEASE_S, ["restore"])) is not None:
                assert job.worker == name
                claimed.append(job.ref)

        await asyncio.gather(*(work(f"w{n}") for n in range(8)))
        assert Counter(claimed) == Counter(AttemptRef(job.id, 1) for job, _ in inserted)


class TestFinish:
    async def test_success(self, store: JobStore) -> None:
        """A success stores the output and ends the lease; repeating the call changes nothing."""
        job = await claimed(store)
        done = await store.succeed(job.ref, artifact(), {"engine": 1.5})
        assert (done.status, done.output) == (JobStatus.SUCCEEDED, artifact())
        assert (done.timings_s, done.lease_until) == ({"engine": 1.5}, None)
        assert done.finished_at is not None
        again = await store.succeed(job.ref, artifact("other"), {})
        assert again == done == await store.get(job.id)

    async def test_failure(self, store: JobStore) -> None:
        """`fail` ends the job with the reason, even if attempts are left."""
        job = await claimed(store)
        done = await store.fail(job.ref, FAILURE)
        assert (done.status, done.failure, done.failed_attempts) == (JobStatus.FAILED, FAILURE, 1)
        assert done.finished_at is not None
        assert await store.claim("w", LEASE_S, ["restore"]) is None

    @pytest.mark.lease
    async def test_heartbeats_extend_the_lease(self, store: JobStore) -> None:
        """A heartbeat extends a lapsed lease before it is reclaimed, and reports a cancel."""
        job = await claimed(store, LAPSED_S)
        assert await store.heartbeat(job.ref, LEASE_S) is JobStatus.RUNNING
        assert list(await store.reclaim()) == []
        await store.request_cancel(job.id)
        assert await store.heartbeat(job.ref, LEASE_S) is JobStatus.CANCELLING


class TestRelease:
    async def test_in_good_order_costs_no_attempt(self, store: JobStore) -> None:
        """A job released without a failure waits for a new attempt, and none is charged."""
        job = await claimed(store)
        back = await store.release(job.ref, None)
        assert (back.status, back.attempt, back.failed_attempts) == (JobStatus.QUEUED, 1, 0)
        assert (back.worker, back.started_at, back.lease_until) == (None, None, None)
        assert list(await store.waiting(1)) == [AttemptRef(job.id, 2)]

    async def test_failures_add_up(self, store: JobStore) -> None:
        """A failed job waits again until a failure uses up `max_attempts`."""
        job = await claimed(store, max_attempts=2)
        back = await store.release(job.ref, FAILURE)
        assert (back.status, back.failed_attempts, back.failure) == (JobStatus.QUEUED, 1, None)
        again = await store.claim("other", LEASE_S, ["restore"])
        assert again is not None
        ended = await store.release(again.ref, FAILURE)
        assert (ended.status, ended.failed_attempts) == (JobStatus.FAILED, 2)
        assert ended.failure == FAILURE

    async def test_a_delay_keeps_it_back(self, store: JobStore) -> None:
        """Until its delay is over, a job is neither claimed nor listed as waiting."""
        job = await claimed(store)
        back = await store.release(job.ref, None, delay_s=60)
        assert (back.available_at - back.created_at).total_seconds() > 59
        assert await store.claim("w", LEASE_S, ["restore"]) is None
        assert list(await store.waiting(1)) == []

    async def test_keeps_its_place_in_the_line(self, store: JobStore) -> None:
        """A released job keeps its age, and goes before jobs submitted later."""
        job = await claimed(store)
        later = await queued(store)
        await store.release(job.ref, FAILURE)
        assert [ref.job_id for ref in await store.waiting(2)] == [job.id, later.id]

    async def test_of_a_job_being_cancelled_ends_it(self, store: JobStore) -> None:
        """A worker that releases a job being cancelled completes the cancel."""
        job = await claimed(store)
        await store.request_cancel(job.id)
        assert (await store.release(job.ref, FAILURE)).status is JobStatus.CANCELLED


class TestList:
    async def test_newest_first_and_own_only(self, store: JobStore) -> None:
        """A listing has only its owner's jobs, and only those with the requested statuses."""
        mine = [await queued(store) for _ in range(3)]
        await queued(store, owner="bob")
        await store.request_cancel(mine[0].id)
        page = await store.list("alice")
        assert [job.id for job in page.jobs] == [job.id for job in reversed(mine)]
        assert page.next_cursor is None
        cancelled = await store.list("alice", [JobStatus.CANCELLED, JobStatus.FAILED])
        assert [job.id for job in cancelled.jobs] == [mine[0].id]

    async def test_pages_neither_skip_nor_repeat_while_jobs_arrive(self, store: JobStore) -> None:
        """Each job that existed at the start is on exactly one page, despite inserts in between."""
        there = [await queued(store) for _ in range(10)]
        seen: list[Job] = []
        cursor = None
        for _ in range(4):
            page = await store.list("alice", cursor=cursor, limit=3)
            seen += page.jobs
            cursor = page.next_cursor
            await queued(store)
        assert cursor is None
        assert [job.id for job in seen] == [job.id for job in reversed(there)]

    async def test_the_last_full_page_has_no_cursor(self, store: JobStore) -> None:
        """A page that ends with the last job has no cursor."""
        for _ in range(4):
            await queued(store)
        first = await store.list("alice", limit=2)
        assert first.next_cursor is not None
        assert (await store.list("alice", cursor=first.next_cursor, limit=2)).next_cursor is None

    async def test_a_garbled_cursor_is_refused(self, store: JobStore) -> None:
        """A cursor that this service did not issue is an InvalidRequest."""
        with pytest.raises(InvalidRequest):
            await store.list("alice", cursor="bm90IG91cnM=")
