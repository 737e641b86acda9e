"""Attempts that lose their job: fencing, cancels and silent workers, all on Postgres."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from uuid import uuid4

import pytest

from persistence.postgres.database import Database
from persistence.postgres.jobs import PostgresJobStore
from persistence.postgres.transitions import RECLAIM_BATCH
from restoration.errors import LeaseLost
from restoration.jobs import AttemptRef, JobStatus
from tests.support.job_stores import FAILURE, LAPSED_S, LEASE_S, JobStore, claimed, queued
from tests.support.samples import artifact, new_job


@pytest.fixture
def store(database: Database) -> JobStore:
    return PostgresJobStore(database)


class TestFencing:
    @pytest.mark.lease
    @pytest.mark.parametrize("how", ["released", "reclaimed", "claimed again"])
    async def test_an_attempt_that_lost_the_job_cannot_touch_it(
        self, store: JobStore, how: str
    ) -> None:
        """Once a job has been taken away, no call for the old attempt changes its row."""
        job = await claimed(store, LAPSED_S)
        if how == "released":
            await store.release(job.ref, None)
        else:
            await store.reclaim()
        if how == "claimed again":
            assert await store.claim("other", LEASE_S, ["restore"]) is not None
        await _assert_refused(store, job.ref)

    @pytest.mark.lease
    @pytest.mark.parametrize("end", ["succeed", "fail", "cancel"])
    async def test_what_has_ended_stays_as_it_is(self, store: JobStore, end: str) -> None:
        """No call changes a final state; only success may be repeated."""
        job = await claimed(store)
        match end:
            case "succeed":
                await store.succeed(job.ref, artifact(), {})
            case "fail":
                await store.fail(job.ref, FAILURE)
            case _:
                await store.request_cancel(job.id)
                await store.release(job.ref, None)
        await _assert_refused(store, job.ref, repeatable=end == "succeed")
        before = await store.get(job.id)
        assert await store.request_cancel(job.id) == before

    async def test_a_job_that_never_ran_has_no_owner(self, store: JobStore) -> None:
        """Attempt 0 of a waiting job, and an unknown job, own no lease."""
        job = await queued(store)
        await _assert_refused(store, job.ref)
        with pytest.raises(LeaseLost):
            await store.heartbeat(AttemptRef(uuid4(), 1), LEASE_S)


async def _assert_refused(store: JobStore, ref: AttemptRef, *, repeatable: bool = False) -> None:
    before = await store.get(ref.job_id)
    calls: list[Callable[[], Awaitable[object]]] = [
        lambda: store.heartbeat(ref, LEASE_S),
        lambda: store.fail(ref, FAILURE),
        lambda: store.release(ref, None),
        lambda: store.release(ref, FAILURE),
    ]
    if not repeatable:
        calls.append(lambda: store.succeed(ref, artifact(), {}))
    for call in calls:
        with pytest.raises(LeaseLost):
            await call()
    assert await store.get(ref.job_id) == before


class TestCancel:
    @pytest.mark.cancel
    async def test_of_a_waiting_job_is_immediate(self, store: JobStore) -> None:
        """A waiting job is cancelled at once, and a second cancel changes nothing."""
        job = await queued(store)
        done = await store.request_cancel(job.id)
        assert done.status is JobStatus.CANCELLED
        assert done.finished_at is not None
        assert await store.request_cancel(job.id) == done
        assert await store.claim("w", LEASE_S, ["restore"]) is None

    @pytest.mark.cancel
    async def test_of_a_running_job_asks_its_worker(self, store: JobStore) -> None:
        """A running job becomes CANCELLING, and its attempt keeps owning it."""
        job = await claimed(store)
        asked = await store.request_cancel(job.id, owner="alice")
        assert (asked.status, asked.worker) == (JobStatus.CANCELLING, "w")
        assert await store.request_cancel(job.id) == asked

    @pytest.mark.cancel
    @pytest.mark.parametrize("cancel_first", [True, False])
    async def test_success_wins_over_a_cancel_that_came_too_late(
        self, store: JobStore, cancel_first: bool
    ) -> None:
        """An attempt that succeeds keeps its result, whether the cancel comes before or after
        it."""
        job = await claimed(store)
        if cancel_first:
            await store.request_cancel(job.id)
        await store.succeed(job.ref, artifact(), {})
        assert (await store.request_cancel(job.id)).status is JobStatus.SUCCEEDED

    @pytest.mark.cancel
    async def test_racing_a_finish_leaves_one_truth(self, store: JobStore) -> None:
        """A concurrent cancel and success always end in success."""
        for _ in range(20):
            job = await claimed(store)
            done, seen = await asyncio.gather(
                store.succeed(job.ref, artifact(), {}), store.request_cancel(job.id)
            )
            assert done.status is JobStatus.SUCCEEDED
            assert seen.status in {JobStatus.CANCELLING, JobStatus.SUCCEEDED}
            assert await store.get(job.id) == done

    @pytest.mark.cancel
    async def test_racing_a_claim_leaves_one_truth(self, store: JobStore) -> None:
        """Either the claim wins and its worker is asked to stop, or the job is cancelled
        unclaimed."""
        for _ in range(20):
            job = await queued(store)
            claimed, seen = await asyncio.gather(
                store.claim("w", LEASE_S, ["restore"]), store.request_cancel(job.id)
            )
            expected = JobStatus.CANCELLED if claimed is None else JobStatus.CANCELLING
            assert seen.status is expected


class TestReclaim:
    @pytest.mark.lease
    async def test_a_lapsed_lease_costs_an_attempt(self, store: JobStore) -> None:
        """A job whose worker fell silent waits again until its attempts are used up."""
        job = await claimed(store, LAPSED_S, max_attempts=2)
        [back] = await store.reclaim()
        assert (back.id, back.status, back.failed_attempts) == (job.id, JobStatus.QUEUED, 1)
        assert await store.claim("other", LAPSED_S, ["restore"]) is not None
        [ended] = await store.reclaim()
        assert (ended.status, ended.failed_attempts) == (JobStatus.FAILED, 2)
        assert ended.failure is not None
        assert ended.failure.code == "worker_lost"

    @pytest.mark.cancel
    async def test_a_lost_worker_that_was_cancelling_has_cancelled(self, store: JobStore) -> None:
        """The job was to be cancelled, so it does not run again."""
        job = await claimed(store, LAPSED_S)
        await store.request_cancel(job.id)
        assert [j.status for j in await store.reclaim()] == [JobStatus.CANCELLED]

    @pytest.mark.lease
    async def test_of_a_dead_worker_does_not_wait_for_leases(self, store: JobStore) -> None:
        """Only the jobs of a worker known to be dead are reclaimed before their leases lapse."""
        job = await claimed(store)
        await queued(store)
        kept = await store.claim("other", LEASE_S, ["restore"])
        assert kept is not None
        assert list(await store.reclaim()) == []
        assert [back.id for back in await store.reclaim("w")] == [job.id]
        assert (await store.get(kept.id)).status is JobStatus.RUNNING

    async def test_more_than_a_batch(self, store: JobStore) -> None:
        """One call reclaims all lapsed jobs, even more than one transaction takes."""
        await _lapsed(store, RECLAIM_BATCH + 5)
        assert len(await store.reclaim()) == RECLAIM_BATCH + 5
        assert len(await store.waiting(2 * RECLAIM_BATCH)) == RECLAIM_BATCH + 5

    async def test_two_at_once_share_the_jobs_out(self, store: JobStore) -> None:
        """Two concurrent reclaims charge each lapsed lease once."""
        await _lapsed(store, RECLAIM_BATCH)
        one, other = await asyncio.gather(store.reclaim(), store.reclaim())
        assert len({job.id for job in [*one, *other]}) == len(one) + len(other) == RECLAIM_BATCH
        assert {job.failed_attempts for job in [*one, *other]} == {1}


async def _lapsed(store: JobStore, count: int) -> None:
    """Insert so many jobs, and claim them with lapsed leases."""
    await asyncio.gather(*(store.insert(new_job()) for _ in range(count)))
    await asyncio.gather(*(store.claim("w", LAPSED_S, ["restore"]) for _ in range(count)))
