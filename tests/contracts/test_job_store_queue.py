"""What waits, for how long, and whose turn it is: on Postgres and on the store in memory."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import AsyncExitStack

import pytest

from persistence.database import Database
from persistence.jobs import PostgresJobStore
from persistence.transitions import RECLAIM_BATCH
from persistence.turns import ELSEWHERE_S
from restoration.affinity import WINDOW_JOBS, WINDOW_TURNS, Affinity
from restoration.errors import IdempotencyConflict, QueueFull
from restoration.jobs import (
    MAX_RECORDS,
    AttemptOutcome,
    AttemptRef,
    Failure,
    Job,
    JobStatus,
    Priority,
)
from restoration.ports import JobStore
from restoration.queueing import QueuePolicy, versioned
from restoration.quotas import Quotas
from tests.fakes.stores import MemoryJobStore
from tests.samples import artifact, new_job

FAILURE = Failure("engine_crashed", "the engine died")
LEASE_S = 60.0
OVERDUE_S = -1.0  # a queue limit that has passed when it is given

OpenStore = Callable[[QueuePolicy], JobStore]


@pytest.fixture(params=["postgres", "memory"])
async def open_store(request: pytest.FixtureRequest) -> AsyncIterator[OpenStore]:
    """Makes stores with a policy; those on Postgres share one database."""
    if request.param == "memory":
        yield lambda policy: MemoryJobStore(policy=policy)
        return
    url = request.getfixturevalue("database_url")
    async with AsyncExitStack() as stack:
        database = Database(url)
        stack.push_async_callback(database.aclose)
        yield lambda policy: PostgresJobStore(database, policy)


@pytest.fixture
def store(open_store: OpenStore) -> JobStore:
    return open_store(QueuePolicy())


async def _queued(store: JobStore, **changes: object) -> Job:
    job, created = await store.insert(new_job(**changes))
    assert created
    return job


async def _claim(store: JobStore, worker: str = "w") -> Job:
    job = await store.claim(worker, LEASE_S, ["restore"])
    assert job is not None
    return job


async def _claimed_owners(store: JobStore, count: int) -> str:
    """The initials of the owners of the next so many jobs."""
    return "".join([(await _claim(store)).owner[0] for _ in range(count)])


class TestHistory:
    async def test_03_every_attempt_is_kept_with_what_became_of_it(self, store: JobStore) -> None:
        """Number, worker, times and outcome of each attempt, whether it counted or not."""
        await _queued(store)
        lost = await store.claim("w1", -1.0, ["restore"])
        await store.reclaim()
        drained = await _claim(store, "w2")
        await store.release(drained.ref, None)
        failed = await _claim(store, "w3")
        await store.release(failed.ref, FAILURE)
        done = await store.succeed((await _claim(store, "w4")).ref, artifact(), {})
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

    async def test_03_who_runs_out_of_attempts_fails_with_the_history(
        self, store: JobStore
    ) -> None:
        """The failure is the last attempt's, and the history has each of them."""
        await _queued(store, max_attempts=2)
        await store.release((await _claim(store, "w1")).ref, FAILURE)
        last = Failure("engine_out_of_memory", "no memory")
        ended = await store.release((await _claim(store, "w2")).ref, last)
        assert (ended.status, ended.failure) == (JobStatus.FAILED, last)
        assert [r.code for r in ended.attempts] == [FAILURE.code, last.code]
        assert {r.outcome for r in ended.attempts} == {AttemptOutcome.FAILED}

    async def test_03_permanent_failures_and_cancels_are_in_it(self, store: JobStore) -> None:
        """An attempt that `fail` or a cancel ends is recorded like any other."""
        await _queued(store)
        failed = await store.fail((await _claim(store)).ref, FAILURE)
        assert [r.outcome for r in failed.attempts] == [AttemptOutcome.FAILED]
        await _queued(store)
        running = await _claim(store)
        await store.request_cancel(running.id)
        cancelled = await store.release(running.ref, None)
        assert [r.outcome for r in cancelled.attempts] == [AttemptOutcome.CANCELLED]
        never_ran = await store.request_cancel((await _queued(store)).id)
        assert never_ran.attempts == ()

    async def test_03_it_has_a_bound(self, store: JobStore) -> None:
        """A job that is handed back without end keeps its newest attempts."""
        job = await _queued(store)
        for _ in range(MAX_RECORDS + 3):
            job = await store.release((await _claim(store)).ref, None)
        assert [r.attempt for r in job.attempts] == list(range(4, MAX_RECORDS + 4))


class TestRetries:
    async def test_03_a_failure_that_is_not_charged_never_ends_a_job(self, store: JobStore) -> None:
        """It is in the history, and costs no attempt, however often it happens."""
        await _queued(store, max_attempts=1)
        for n in range(3):
            back = await store.release((await _claim(store, f"w{n}")).ref, FAILURE, charged=False)
        assert (back.status, back.failed_attempts) == (JobStatus.QUEUED, 0)
        assert [(r.outcome, r.code) for r in back.attempts] == [
            (AttemptOutcome.HANDED_BACK, FAILURE.code)
        ] * 3

    async def test_03_another_worker_is_preferred(self, store: JobStore) -> None:
        """The worker that just failed a job is passed over; any other gets it at once."""
        job = await _queued(store)
        await store.release((await _claim(store, "w1")).ref, FAILURE)
        assert await store.claim("w1", LEASE_S, ["restore"]) is None
        assert list(await store.waiting(1)) == [AttemptRef(job.id, 2)]
        assert (await _claim(store, "w2")).id == job.id

    async def test_03_but_not_waited_for_in_vain(self, store: JobStore) -> None:
        """When nobody else took the job for a while, the same worker may have it."""
        job = await _queued(store)
        await store.release((await _claim(store, "w1")).ref, FAILURE, delay_s=-ELSEWHERE_S - 1)
        assert (await _claim(store, "w1")).id == job.id

    async def test_03_who_is_passed_over_takes_the_next_job(self, store: JobStore) -> None:
        """A worker that may not have one job is given another, of the same owner or not."""
        await _queued(store)
        other = await _queued(store)
        await store.release((await _claim(store, "w1")).ref, FAILURE)
        assert (await _claim(store, "w1")).id == other.id

    async def test_03_a_job_is_sent_again_once(self, store: JobStore) -> None:
        """Of several retries of one job, at once too, there is one new job."""
        source = await store.request_cancel((await _queued(store, request_digest="d")).id)
        inserts = [store.insert(new_job(retry_of=source.id, request_digest="d")) for _ in range(8)]
        outcomes = await asyncio.gather(*inserts)
        assert sum(created for _, created in outcomes) == 1
        assert len({job.id for job, _ in outcomes}) == 1
        assert outcomes[0][0].retry_of == source.id


class TestResumption:
    async def test_02_a_job_that_lost_its_worker_has_the_next_turn(self, store: JobStore) -> None:
        """Before every other owner, and a batch job before interactive ones: it had its turn."""
        await _queued(store, owner="bob", priority=Priority.BATCH)
        lost = await _claim(store, "dead")
        for owner in ("alice", "carol", "alice"):
            await _queued(store, owner=owner)
        await _queued(store, owner="bob", priority=Priority.BATCH)
        await store.reclaim("dead")
        await store.promote()
        assert [ref.job_id for ref in await store.waiting(1)] == [lost.id]
        assert (await _claim(store)).id == lost.id
        await store.promote()
        assert await _claimed_owners(store, 4) == "acab"

    async def test_02_so_have_all_jobs_of_an_owner_that_lost_theirs(self, store: JobStore) -> None:
        """Each counts as interactive until it runs again; the rest of the batch does not."""
        for _ in range(3):
            await _queued(store, owner="bob", priority=Priority.BATCH)
        lost = [await _claim(store, f"dead{n}") for n in range(2)]
        for _ in range(2):
            await _queued(store, owner="alice")
        for n in range(2):
            await store.reclaim(f"dead{n}")
        again = [await _claim(store)]
        await store.promote()
        again += [await _claim(store) for _ in range(2)]
        assert {job.id for job in again} > {job.id for job in lost}
        await store.promote()
        assert await _claimed_owners(store, 2) == "ab"


class TestQueueDeadline:
    async def test_06_a_job_that_starts_too_late_never_starts(self, store: JobStore) -> None:
        """Past its deadline it is not claimed, and fails with a code that says so."""
        late = await _queued(store, queue_limit_s=OVERDUE_S)
        in_time = await _queued(store)
        assert [ref.job_id for ref in await store.waiting(5)] == [in_time.id]
        assert (await _claim(store)).id == in_time.id
        [failed] = await store.expire()
        assert (failed.id, failed.status, failed.attempts) == (late.id, JobStatus.FAILED, ())
        assert failed.failure is not None
        assert failed.failure.code == "queue_timeout"
        assert list(await store.expire()) == []

    async def test_06_the_deadline_is_for_the_first_start(self, store: JobStore) -> None:
        """A job that has started once waits for its next attempt as long as it takes."""
        await _queued(store, queue_limit_s=0.5)
        back = await store.release((await _claim(store)).ref, None)
        async with asyncio.timeout(30):
            late = await _queued(store, owner="bob", queue_limit_s=0.5)
            while not (expired := await store.expire()):  # noqa: ASYNC110 # Postgres' own time
                await asyncio.sleep(0.05)
        assert [job.id for job in expired] == [late.id]
        assert (await _claim(store)).id == back.id

    async def test_06_more_than_a_batch(self, store: JobStore) -> None:
        """One call fails all that are overdue, up to a bound far above this."""
        count = RECLAIM_BATCH + 5
        for n in range(count):
            await _queued(store, owner=f"o{n % 3}", queue_limit_s=OVERDUE_S)
        assert len(await store.expire()) == count
        assert list(await store.waiting(1)) == []

    async def test_06_the_limits_of_a_job_come_back(self, store: JobStore) -> None:
        """The deadline counts from the submission; a run limit is the request's, if it had one."""
        job = await _queued(store, queue_limit_s=90, run_limit_s=7)
        assert (job.queue_deadline_at - job.created_at).total_seconds() == 90
        assert job.run_limit_s == 7
        assert (await _queued(store)).run_limit_s is None


class TestKeysLive:
    async def test_08_the_same_key_is_the_same_job_while_it_lives(
        self, open_store: OpenStore
    ) -> None:
        """Within its time a key means its first request."""
        store = open_store(QueuePolicy(idempotency_ttl_s=3600))
        first, _ = await store.insert(new_job(idempotency_key="k", request_digest="d"))
        again, created = await store.insert(new_job(idempotency_key="k", request_digest="d"))
        assert (again.id, created) == (first.id, False)
        with pytest.raises(IdempotencyConflict):
            await store.insert(new_job(idempotency_key="k", request_digest="other"))

    async def test_08_after_its_time_a_key_is_free(self, open_store: OpenStore) -> None:
        """An old key makes a new job, for another request too; the earlier job goes on."""
        store = open_store(QueuePolicy(idempotency_ttl_s=1e-6))
        first, _ = await store.insert(new_job(idempotency_key="k", request_digest="d"))
        assert await store.find_by_key("alice", "k") is None
        second, created = await store.insert(new_job(idempotency_key="k", request_digest="other"))
        assert created
        assert second.id != first.id
        assert (await store.get(first.id)).status is JobStatus.QUEUED


class TestBackPressure:
    @pytest.mark.parametrize(
        "policy", [QueuePolicy(max_waiting=3), QueuePolicy(quotas=Quotas(waiting_jobs=3))]
    )
    async def test_09_beyond_the_limit_nothing_is_taken(
        self, open_store: OpenStore, policy: QueuePolicy
    ) -> None:
        """The refusal says when to come back; room appears as soon as a job has started."""
        store = open_store(policy)
        for _ in range(3):
            await store.check_room("alice")
            await _queued(store)
        refused = new_job()
        for call in (store.check_room("alice"), store.insert(refused)):
            with pytest.raises(QueueFull) as caught:
                await call
            assert caught.value.details["retry_after_s"] == 10
        assert len((await store.list("alice")).jobs) == 3
        await _claim(store)
        await store.insert(refused)

    async def test_09_one_owner_leaves_room_for_others(self, open_store: OpenStore) -> None:
        """An owner's limit is that owner's, over both classes; the limit in all is everybody's."""
        store = open_store(QueuePolicy(quotas=Quotas(waiting_jobs=2), max_waiting=3))
        await _queued(store)
        await _queued(store, priority=Priority.BATCH)
        with pytest.raises(QueueFull):
            await store.insert(new_job())
        await _queued(store, owner="bob")
        with pytest.raises(QueueFull):
            await store.insert(new_job(owner="bob"))

    async def test_09_what_was_accepted_is_never_refused(self, open_store: OpenStore) -> None:
        """In a full system keys are answered, jobs handed back wait again, and all can be read."""
        store = open_store(QueuePolicy(max_waiting=1))
        first = new_job(idempotency_key="k", request_digest="d")
        await store.insert(first)
        running = await _claim(store)
        await _queued(store)
        assert (await store.release(running.ref, None)).status is JobStatus.QUEUED
        again, created = await store.insert(new_job(idempotency_key="k", request_digest="d"))
        assert (again.id, created) == (first.id, False)
        assert (await store.get(first.id)).id == first.id

    async def test_09_the_limit_of_an_owner_holds_under_concurrency(
        self, open_store: OpenStore
    ) -> None:
        """Of many submissions at once exactly as many are taken as there is room for."""
        store = open_store(QueuePolicy(quotas=Quotas(waiting_jobs=5)))
        outcomes = await asyncio.gather(
            *(store.insert(new_job()) for _ in range(20)), return_exceptions=True
        )
        refused = [outcome for outcome in outcomes if isinstance(outcome, QueueFull)]
        assert len(refused) == 15
        assert len((await store.list("alice")).jobs) == 5


class TestTurns:
    async def test_10_owners_take_turns(self, store: JobStore) -> None:
        """Each owner's oldest job, one owner after the other, whoever came first with many."""
        for owner, count in (("alice", 6), ("bob", 2), ("carol", 1)):
            for _ in range(count):
                await _queued(store, owner=owner)
        assert await _claimed_owners(store, 9) == "abcabaaaa"

    async def test_10_a_single_job_waits_for_nobodys_backlog(self, store: JobStore) -> None:
        """Whoever comes while others' backlogs are worked off has the next turn."""
        for _ in range(20):
            await _queued(store, owner="alice")
        assert await _claimed_owners(store, 3) == "aaa"  # three GPUs are busy
        await _queued(store, owner="bob")
        assert await _claimed_owners(store, 2) == "ba"
        await _queued(store, owner="bob")
        assert await _claimed_owners(store, 2) == "ba"

    async def test_10_interactive_before_batch(self, store: JobStore) -> None:
        """A class's turns come before the other's, and an owner has a turn in each."""
        for owner in ("alice", "alice", "bob"):
            await _queued(store, owner=owner, priority=Priority.BATCH)
        assert await _claimed_owners(store, 1) == "a"
        await _queued(store, owner="alice")
        await _queued(store, owner="carol")
        assert await _claimed_owners(store, 4) == "acba"

    async def test_10_waiting_long_raises_priority(self, open_store: OpenStore) -> None:
        """Batch jobs that have waited for `aging_s` take turns with interactive ones."""
        store = open_store(QueuePolicy(aging_s=1e-6))
        await _queued(store, owner="bob", priority=Priority.BATCH)
        await _queued(store, owner="bob", priority=Priority.BATCH)
        for _ in range(4):
            await _queued(store, owner="alice")
        assert await _claimed_owners(store, 1) == "a"
        await store.promote()
        assert await _claimed_owners(store, 4) == "baba"

    async def test_10_young_batch_jobs_are_not_promoted(self, store: JobStore) -> None:
        """Before its time a batch job waits for every interactive one."""
        await _queued(store, owner="bob", priority=Priority.BATCH)
        await _queued(store, owner="alice")
        await _queued(store, owner="alice")
        await store.promote()
        assert await _claimed_owners(store, 3) == "aab"

    async def test_10_a_job_kept_back_does_not_hold_up_its_owner(self, store: JobStore) -> None:
        """While one job of an owner waits for its delay, the owner's turn goes to the next."""
        await _queued(store, owner="alice")
        second = await _queued(store, owner="alice")
        await _queued(store, owner="bob")
        await store.release((await _claim(store)).ref, None, delay_s=60)
        assert await _claimed_owners(store, 1) == "b"
        assert (await _claim(store)).id == second.id

    async def test_10_turns_hold_under_concurrency(self, store: JobStore) -> None:
        """Eight workers at once: each job once, and no owner more than a turn a worker ahead.

        What is seen of it here may be ahead by eight more: each worker can have one claim that
        the store has made and that is not noted yet.
        """
        workers = 8
        for n in range(90):
            await _queued(store, owner=f"{'abc'[n // 30]}")
        order: list[str] = []
        claimed: list[AttemptRef] = []

        async def work(name: str) -> None:
            while (job := await store.claim(name, LEASE_S, ["restore"])) is not None:
                claimed.append(job.ref)
                order.append(job.owner)

        await asyncio.gather(*(work(f"w{n}") for n in range(workers)))
        assert len(claimed) == len(set(claimed)) == 90
        assert _greatest_lead(order) <= 1 + 2 * workers

    async def test_10_what_waits_is_listed_for_tickets(self, store: JobStore) -> None:
        """`waiting` names the best first, jobs of every owner, and no job twice."""
        for owner in ("alice", "alice", "bob"):
            await _queued(store, owner=owner)
        refs = list(await store.waiting(10))
        assert len(set(refs)) == 3
        assert (await _claim(store)).id == refs[0].job_id


class TestAffinity:
    async def test_03_a_worker_prefers_what_it_has_loaded(self, store: JobStore) -> None:
        """Of another owner, or later in the same one's line; without it, the best is taken."""
        for owner, workflow in (("alice", "restore"), ("bob", "enlarge"), ("alice", "enlarge")):
            await _queued(store, owner=owner, workflow=workflow)
        both = ["restore", "enlarge"]
        affinity = Affinity(frozenset({"enlarge"}))
        later = await store.claim("w1", LEASE_S, both, affinity)
        assert later is not None
        assert (later.owner, later.workflow) == ("alice", "enlarge")
        plain = await store.claim("w2", LEASE_S, both, Affinity())
        assert plain is not None
        assert (plain.owner, plain.workflow) == ("bob", "enlarge")

    async def test_03_a_worker_passes_a_job_over_once(self, store: JobStore) -> None:
        """However much of what it has loaded waits, the next job it takes is the best one."""
        await _queued(store, owner="bob", workflow="restore")
        for _ in range(6):
            await _queued(store, owner="alice", workflow="enlarge")
        affinity = Affinity(frozenset({"enlarge"}))
        jobs = [await store.claim("w", LEASE_S, ["restore", "enlarge"], affinity) for _ in range(3)]
        assert [job.owner for job in jobs if job] == ["alice", "bob", "alice"]

    async def test_03_it_never_goes_before_a_better_class(self, store: JobStore) -> None:
        """A batch job whose models are loaded waits for interactive ones all the same."""
        await _queued(store, workflow="enlarge", priority=Priority.BATCH)
        await _queued(store, workflow="restore")
        affinity = Affinity(frozenset({"enlarge"}))
        first = await store.claim("w", LEASE_S, ["restore", "enlarge"], affinity)
        assert first is not None
        assert first.workflow == "restore"

    async def test_03_it_sees_no_further_than_its_window(self, store: JobStore) -> None:
        """Neither far down an owner's line nor among owners whose turn is far off."""
        for _ in range(WINDOW_JOBS):
            await _queued(store, owner="owner-0", workflow="restore")
        await _queued(store, owner="owner-0", workflow="enlarge")
        for n in range(1, WINDOW_TURNS):
            await _queued(store, owner=f"owner-{n}", workflow="restore")
        await _queued(store, owner="too late", workflow="enlarge")
        affinity = Affinity(frozenset({"enlarge"}))
        first = await store.claim("w", LEASE_S, ["restore", "enlarge"], affinity)
        assert first is not None
        assert (first.owner, first.workflow) == ("owner-0", "restore")

    async def test_03_workers_at_once_take_each_job_once(self, store: JobStore) -> None:
        """More workers than the window has jobs: nobody goes away empty-handed."""
        count = WINDOW_JOBS + 4
        for _ in range(count):
            await _queued(store, workflow="enlarge")
        claims = (
            store.claim(f"w{n}", LEASE_S, ["enlarge"], Affinity(frozenset({"enlarge"})))
            for n in range(count)
        )
        claimed = [job.id for job in await asyncio.gather(*claims) if job]
        assert len(set(claimed)) == len(claimed) == count


def _greatest_lead(order: Sequence[str]) -> int:
    """By how many turns an owner was ahead of another that still waited."""
    total, so_far, lead = Counter(order), Counter[str](), 0
    for owner in order:
        so_far[owner] += 1
        behind = [so_far[other] for other in total if so_far[other] < total[other]]
        lead = max(lead, so_far[owner] - min(behind, default=so_far[owner]))
    return lead


def test_the_measure_of_fairness_measures() -> None:
    """The helper above sees one owner go ahead."""
    assert _greatest_lead("abab") == 1
    assert _greatest_lead("aaab") == 3


async def test_06_a_version_is_claimed_by_workers_that_know_it(store: JobStore) -> None:
    """While a release is rolled out, jobs of either version wait for a worker that has theirs."""
    old = await _queued(store, workflow_version="1")
    new = await _queued(store, workflow_version="2")
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
