"""History, retries, deadlines, keys and limits of waiting jobs, on Postgres and in memory."""

from __future__ import annotations

import asyncio
from uuid import uuid4

import pytest

from persistence.postgres.fair_queue import ELSEWHERE_S
from persistence.postgres.transitions import RECLAIM_BATCH
from restoration.affinity import Affinity
from restoration.errors import EngineFailed, IdempotencyConflict, JobNotFound, QueueFull
from restoration.jobs import MAX_RECORDS, AttemptOutcome, AttemptRef, Failure, JobStatus, Priority
from restoration.limits.quotas import Quotas
from restoration.queue_policy import QueuePolicy, versioned
from tests.support.job_stores import FAILURE, LEASE_S, JobStore, OpenStore, claim, queued
from tests.support.samples import artifact, new_job

OVERDUE_S = -1.0  # a queue limit that is over when it is given


@pytest.fixture
def store(open_store: OpenStore) -> JobStore:
    return open_store(QueuePolicy())


class TestHistory:
    @pytest.mark.retry
    async def test_every_attempt_is_kept_with_what_became_of_it(self, store: JobStore) -> None:
        """The history has number, worker, times and outcome of each attempt, charged or not."""
        await queued(store)
        lost = await store.claim("w1", -1.0, ["restore"])
        await store.reclaim()
        drained = await claim(store, "w2")
        await store.release(drained.ref, None)
        failed = await claim(store, "w3")
        await store.release(failed.ref, FAILURE)
        done = await store.succeed((await claim(store, "w4")).ref, artifact(), {})
        assert [(r.attempt, r.worker, r.outcome, r.code) for r in done.attempts] == [
            (1, "w1", AttemptOutcome.FAILED, "worker_lost"),
            (2, "w2", AttemptOutcome.HANDED_BACK, None),
            (3, "w3", AttemptOutcome.FAILED, FAILURE.code),
            (4, "w4", AttemptOutcome.SUCCEEDED, None),
        ]
        assert done.attempts[2].message == FAILURE.message
        assert lost is not None
        assert done.attempts[0].started_at == lost.started_at
        assert all(r.started_at <= r.ended_at for r in done.attempts)
        assert await store.get(done.id) == done

    @pytest.mark.retry
    async def test_who_runs_out_of_attempts_fails_with_the_history(self, store: JobStore) -> None:
        """The job's failure is that of the last attempt, and the history has each of them."""
        await queued(store, max_attempts=2)
        await store.release((await claim(store, "w1")).ref, FAILURE)
        last = Failure("engine_out_of_memory", "no memory")
        ended = await store.release((await claim(store, "w2")).ref, last)
        assert (ended.status, ended.failure) == (JobStatus.FAILED, last)
        assert [r.code for r in ended.attempts] == [FAILURE.code, last.code]
        assert {r.outcome for r in ended.attempts} == {AttemptOutcome.FAILED}

    @pytest.mark.retry
    async def test_whatever_a_node_said_is_in_it(self, store: JobStore) -> None:
        """A message that Postgres' text and JSON cannot hold comes back in a readable form."""
        await queued(store)
        failure = Failure.of(EngineFailed("a NUL: \0, half a pair: \ud83d, é"))
        failed = await store.fail((await claim(store)).ref, failure)
        assert failed.failure == failure
        assert failed.attempts[0].message == "a NUL: \N{REPLACEMENT CHARACTER}, half a pair: ?, é"

    @pytest.mark.retry
    async def test_permanent_failures_and_cancels_are_in_it(self, store: JobStore) -> None:
        """An attempt ended by `fail` or by a cancel is recorded like any other."""
        await queued(store)
        failed = await store.fail((await claim(store)).ref, FAILURE)
        assert [r.outcome for r in failed.attempts] == [AttemptOutcome.FAILED]
        await queued(store)
        running = await claim(store)
        await store.request_cancel(running.id)
        cancelled = await store.release(running.ref, None)
        assert [r.outcome for r in cancelled.attempts] == [AttemptOutcome.CANCELLED]
        never_ran = await store.request_cancel((await queued(store)).id)
        assert never_ran.attempts == ()

    @pytest.mark.retry
    async def test_it_has_a_bound(self, store: JobStore) -> None:
        """The history of a job that is handed back again and again keeps the newest attempts."""
        job = await queued(store)
        for _ in range(MAX_RECORDS + 3):
            job = await store.release((await claim(store)).ref, None)
        assert [r.attempt for r in job.attempts] == list(range(4, MAX_RECORDS + 4))


class TestRetries:
    @pytest.mark.retry
    async def test_a_failure_that_is_not_charged_never_ends_a_job(self, store: JobStore) -> None:
        """It is in the history, but charges no attempt, however often it happens."""
        await queued(store, max_attempts=1)
        for n in range(3):
            back = await store.release((await claim(store, f"w{n}")).ref, FAILURE, charged=False)
        assert (back.status, back.failed_attempts) == (JobStatus.QUEUED, 0)
        assert [(r.outcome, r.code) for r in back.attempts] == [
            (AttemptOutcome.HANDED_BACK, FAILURE.code)
        ] * 3

    @pytest.mark.retry
    async def test_another_worker_is_preferred(self, store: JobStore) -> None:
        """The worker that just failed a job is passed over; any other gets it at once."""
        job = await queued(store)
        await store.release((await claim(store, "w1")).ref, FAILURE)
        assert await store.claim("w1", LEASE_S, ["restore"]) is None
        assert list(await store.waiting(1)) == [AttemptRef(job.id, 2)]
        assert (await claim(store, "w2")).id == job.id

    @pytest.mark.retry
    async def test_but_not_waited_for_in_vain(self, store: JobStore) -> None:
        """If no other worker took the job for a while, the same one may have it."""
        job = await queued(store)
        await store.release((await claim(store, "w1")).ref, FAILURE, delay_s=-ELSEWHERE_S - 1)
        assert (await claim(store, "w1")).id == job.id

    @pytest.mark.retry
    async def test_who_is_passed_over_takes_the_next_job(self, store: JobStore) -> None:
        """A worker that is passed over for one job gets another, even of the same owner."""
        await queued(store)
        other = await queued(store)
        await store.release((await claim(store, "w1")).ref, FAILURE)
        assert (await claim(store, "w1")).id == other.id

    @pytest.mark.retry
    async def test_a_job_is_sent_again_once(self, store: JobStore) -> None:
        """Several retries of one job, even concurrent ones, create one new job."""
        source = await store.request_cancel((await queued(store, request_digest="d")).id)
        inserts = [store.insert(new_job(retry_of=source.id, request_digest="d")) for _ in range(8)]
        outcomes = await asyncio.gather(*inserts)
        assert sum(created for _, created in outcomes) == 1
        assert len({job.id for job, _ in outcomes}) == 1
        assert outcomes[0][0].retry_of == source.id

    @pytest.mark.retry
    async def test_a_job_whose_row_is_gone_is_not_sent_again(self, store: JobStore) -> None:
        """The row, and perhaps the photo, were removed between the request and the retry."""
        with pytest.raises(JobNotFound):
            await store.insert(new_job(retry_of=uuid4()))


class TestQueueDeadline:
    @pytest.mark.deadlines
    async def test_a_job_that_starts_too_late_never_starts(self, store: JobStore) -> None:
        """After its deadline a job is not claimed, and `expire` fails it with queue_timeout."""
        late = await queued(store, queue_limit_s=OVERDUE_S)
        in_time = await queued(store)
        assert [ref.job_id for ref in await store.waiting(5)] == [in_time.id]
        assert (await claim(store)).id == in_time.id
        [failed] = await store.expire()
        assert (failed.id, failed.status, failed.attempts) == (late.id, JobStatus.FAILED, ())
        assert failed.failure is not None
        assert failed.failure.code == "queue_timeout"
        assert list(await store.expire()) == []

    @pytest.mark.deadlines
    async def test_the_deadline_is_for_the_first_start(self, store: JobStore) -> None:
        """A job that has started once may wait for its next attempt without a limit."""
        await queued(store, queue_limit_s=3)
        back = await store.release((await claim(store)).ref, None)
        async with asyncio.timeout(300):
            late = await queued(store, owner="bob", queue_limit_s=3)
            while not (expired := await store.expire()):  # noqa: ASYNC110 # Postgres' own time
                await asyncio.sleep(0.05)
        assert [job.id for job in expired] == [late.id]
        assert (await claim(store)).id == back.id

    @pytest.mark.deadlines
    async def test_more_than_a_batch(self, store: JobStore) -> None:
        """One call fails all overdue jobs, even more than RECLAIM_BATCH."""
        count = RECLAIM_BATCH + 5
        for n in range(count):
            await queued(store, owner=f"o{n % 3}", queue_limit_s=OVERDUE_S)
        assert len(await store.expire()) == count
        assert list(await store.waiting(1)) == []

    @pytest.mark.deadlines
    async def test_the_limits_of_a_job_come_back(self, store: JobStore) -> None:
        """The deadline counts from the submission; the run limit is that of the request, if any."""
        job = await queued(store, queue_limit_s=90, run_limit_s=7)
        assert (job.queue_deadline_at - job.created_at).total_seconds() == 90
        assert job.options.run_limit_s == 7
        assert (await queued(store)).options.run_limit_s is None


class TestKeysLive:
    @pytest.mark.idempotency
    async def test_the_same_key_is_the_same_job_while_it_lives(self, open_store: OpenStore) -> None:
        """During its lifetime a key stands for its first request."""
        store = open_store(QueuePolicy(idempotency_ttl_s=3600))
        first, _ = await store.insert(new_job(idempotency_key="k", request_digest="d"))
        again, created = await store.insert(new_job(idempotency_key="k", request_digest="d"))
        assert (again.id, created) == (first.id, False)
        with pytest.raises(IdempotencyConflict):
            await store.insert(new_job(idempotency_key="k", request_digest="other"))

    @pytest.mark.idempotency
    async def test_after_its_time_a_key_is_free(self, open_store: OpenStore) -> None:
        """An expired key creates a new job, even for another request; the earlier job goes on."""
        store = open_store(QueuePolicy(idempotency_ttl_s=1e-6))
        first, _ = await store.insert(new_job(idempotency_key="k", request_digest="d"))
        assert await store.find_by_key("alice", "k") is None
        second, created = await store.insert(new_job(idempotency_key="k", request_digest="other"))
        assert created
        assert second.id != first.id
        assert (await store.get(first.id)).status is JobStatus.QUEUED


class TestBackPressure:
    @pytest.mark.admission
    @pytest.mark.parametrize(
        "policy", [QueuePolicy(max_waiting=3), QueuePolicy(quotas=Quotas(waiting_jobs=3))]
    )
    async def test_beyond_the_limit_nothing_is_taken(
        self, open_store: OpenStore, policy: QueuePolicy
    ) -> None:
        """The refusal gives a time to retry, and a started job makes room at once."""
        store = open_store(policy)
        for _ in range(3):
            await store.check_room("alice")
            await queued(store)
        refused = new_job()
        for call in (store.check_room("alice"), store.insert(refused)):
            with pytest.raises(QueueFull) as caught:
                await call
            assert caught.value.details["retry_after_s"] == 10
        assert len((await store.list("alice")).jobs) == 3
        await claim(store)
        await store.insert(refused)

    @pytest.mark.admission
    async def test_one_owner_leaves_room_for_others(self, open_store: OpenStore) -> None:
        """An owner's limit covers both classes of that owner; the total limit covers all owners."""
        store = open_store(QueuePolicy(quotas=Quotas(waiting_jobs=2), max_waiting=3))
        await queued(store)
        await queued(store, priority=Priority.BATCH)
        with pytest.raises(QueueFull):
            await store.insert(new_job())
        await queued(store, owner="bob")
        with pytest.raises(QueueFull):
            await store.insert(new_job(owner="bob"))

    @pytest.mark.admission
    async def test_what_was_accepted_is_never_refused(self, open_store: OpenStore) -> None:
        """When the queue is full, used keys still work, released jobs wait again, and jobs can be
        read."""
        store = open_store(QueuePolicy(max_waiting=1))
        first = new_job(idempotency_key="k", request_digest="d")
        await store.insert(first)
        running = await claim(store)
        await queued(store)
        assert (await store.release(running.ref, None)).status is JobStatus.QUEUED
        again, created = await store.insert(new_job(idempotency_key="k", request_digest="d"))
        assert (again.id, created) == (first.id, False)
        assert (await store.get(first.id)).id == first.id

    @pytest.mark.admission
    async def test_the_limit_of_an_owner_holds_under_concurrency(
        self, open_store: OpenStore
    ) -> None:
        """Exactly as many concurrent submissions are accepted as there is room for."""
        store = open_store(QueuePolicy(quotas=Quotas(waiting_jobs=5)))
        outcomes = await asyncio.gather(
            *(store.insert(new_job()) for _ in range(20)), return_exceptions=True
        )
        refused = [outcome for outcome in outcomes if isinstance(outcome, QueueFull)]
        assert len(refused) == 15
        assert len((await store.list("alice")).jobs) == 5


@pytest.mark.versions
async def test_a_version_is_claimed_by_workers_that_know_it(store: JobStore) -> None:
    """During a release, jobs of either version wait for a worker that has their version."""
    old = await queued(store, workflow_version="1")
    new = await queued(store, workflow_version="2")
    assert await store.claim("later", LEASE_S, [versioned("restore", "3")]) is None
    for affinity in (None, Affinity(frozenset({"restore"}))):
        claimed = await store.claim("newer", LEASE_S, [versioned("restore", "2")], affinity)
        assert claimed is not None
        assert claimed.id == new.id
        await store.release(claimed.ref, None)
    both = [versioned("restore", "1"), versioned("restore", "2")]
    claimed = await store.claim("newest", LEASE_S, both)
    assert claimed is not None
    assert claimed.id == old.id
