"""The order of owners' turns and the choice of a worker, on Postgres."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import AsyncIterator, Sequence
from datetime import datetime

import pytest

from persistence.postgres.database import Database
from persistence.postgres.jobs import PostgresJobStore
from restoration.affinity import WINDOW_JOBS, WINDOW_TURNS, Affinity
from restoration.jobs import Job, Priority
from restoration.queue_policy import QueuePolicy
from tests.support.job_stores import FAILURE, LEASE_S, JobStore, OpenStore, claim, queued


@pytest.fixture
async def open_store(database_url: str) -> AsyncIterator[OpenStore]:
    database = Database(database_url)
    yield lambda policy: PostgresJobStore(database, policy)
    await database.aclose()


@pytest.fixture
def store(open_store: OpenStore) -> JobStore:
    return open_store(QueuePolicy())


async def _claimed_owners(store: JobStore, count: int) -> str:
    """Claim so many jobs, and return the initials of their owners."""
    return "".join([(await claim(store)).owner[0] for _ in range(count)])


class TestResumption:
    @pytest.mark.lease
    async def test_a_job_that_lost_its_worker_has_the_next_turn(self, store: JobStore) -> None:
        """It goes before every other owner, and a batch job before interactive ones."""
        await queued(store, owner="bob", priority=Priority.BATCH)
        lost = await claim(store, "dead")
        for owner in ("alice", "carol", "alice"):
            await queued(store, owner=owner)
        await queued(store, owner="bob", priority=Priority.BATCH)
        await store.reclaim("dead")
        await store.promote()
        assert [ref.job_id for ref in await store.waiting(1)] == [lost.id]
        assert (await claim(store)).id == lost.id
        await store.promote()
        assert await _claimed_owners(store, 4) == "acab"

    @pytest.mark.lease
    async def test_so_have_all_jobs_of_an_owner_that_lost_theirs(self, store: JobStore) -> None:
        """Each lost job counts as interactive until it runs again; the rest of the batch does
        not."""
        for _ in range(3):
            await queued(store, owner="bob", priority=Priority.BATCH)
        lost = [await claim(store, f"dead{n}") for n in range(2)]
        for _ in range(2):
            await queued(store, owner="alice")
        for n in range(2):
            await store.reclaim(f"dead{n}")
        again = [await claim(store)]
        await store.promote()
        again += [await claim(store) for _ in range(2)]
        assert {job.id for job in again} > {job.id for job in lost}
        await store.promote()
        assert await _claimed_owners(store, 2) == "ab"

    @pytest.mark.lease
    async def test_a_job_in_back_off_raises_no_other_job(self, store: JobStore) -> None:
        """While a batch job waits for its next attempt, the rest of its batch stays batch."""
        for _ in range(2):
            await queued(store, owner="bob", priority=Priority.BATCH)
        await store.release((await claim(store)).ref, FAILURE, delay_s=60)
        for _ in range(2):
            await queued(store, owner="alice")
        await store.promote()
        assert await _claimed_owners(store, 3) == "aab"

    @pytest.mark.lease
    async def test_a_job_is_interactive_after_its_back_off(self, store: JobStore) -> None:
        await queued(store, owner="bob", priority=Priority.BATCH)
        again = await claim(store)
        await store.release(again.ref, FAILURE)
        await queued(store, owner="alice")
        await queued(store, owner="alice")
        await store.promote()
        claimed = [await claim(store, "another") for _ in range(2)]
        assert [job.owner for job in claimed] == ["alice", "bob"]


class TestTurns:
    @pytest.mark.turns
    async def test_owners_take_turns(self, store: JobStore) -> None:
        """Owners take turns with their oldest job, however many jobs the first one submitted."""
        for owner, count in (("alice", 6), ("bob", 2), ("carol", 1)):
            for _ in range(count):
                await queued(store, owner=owner)
        assert await _claimed_owners(store, 9) == "abcabaaaa"

    @pytest.mark.turns
    async def test_a_single_job_waits_for_nobodys_backlog(self, store: JobStore) -> None:
        """An owner who arrives while others have a backlog has the next turn."""
        for _ in range(20):
            await queued(store, owner="alice")
        assert await _claimed_owners(store, 3) == "aaa"  # three GPUs are busy
        await queued(store, owner="bob")
        assert await _claimed_owners(store, 2) == "ba"
        await queued(store, owner="bob")
        assert await _claimed_owners(store, 2) == "ba"

    @pytest.mark.turns
    async def test_interactive_before_batch(self, store: JobStore) -> None:
        """All turns of interactive jobs come first, and an owner has a turn in each class."""
        for owner in ("alice", "alice", "bob"):
            await queued(store, owner=owner, priority=Priority.BATCH)
        assert await _claimed_owners(store, 1) == "a"
        await queued(store, owner="alice")
        await queued(store, owner="carol")
        assert await _claimed_owners(store, 4) == "acba"

    @pytest.mark.turns
    async def test_waiting_long_raises_priority(self, open_store: OpenStore) -> None:
        """Batch jobs that have waited for `aging_s` take turns with interactive ones."""
        store = open_store(QueuePolicy(aging_s=1e-6))
        await queued(store, owner="bob", priority=Priority.BATCH)
        await queued(store, owner="bob", priority=Priority.BATCH)
        for _ in range(4):
            await queued(store, owner="alice")
        assert await _claimed_owners(store, 1) == "a"
        await store.promote()
        assert await _claimed_owners(store, 4) == "baba"

    @pytest.mark.turns
    async def test_young_batch_jobs_are_not_promoted(self, store: JobStore) -> None:
        """A batch job younger than that waits for every interactive one."""
        await queued(store, owner="bob", priority=Priority.BATCH)
        await queued(store, owner="alice")
        await queued(store, owner="alice")
        await store.promote()
        assert await _claimed_owners(store, 3) == "aab"

    @pytest.mark.turns
    async def test_a_job_kept_back_does_not_hold_up_its_owner(self, store: JobStore) -> None:
        """While one job of an owner is delayed, the owner's next job takes its turn."""
        await queued(store, owner="alice")
        second = await queued(store, owner="alice")
        await queued(store, owner="bob")
        await store.release((await claim(store)).ref, None, delay_s=60)
        assert await _claimed_owners(store, 1) == "b"
        assert (await claim(store)).id == second.id

    @pytest.mark.turns
    async def test_turns_hold_under_concurrency(self, store: JobStore) -> None:
        """Eight concurrent workers claim each job once, and no owner gets too far ahead.

        The order is that of the store's clock, because a worker may note its claim late. An owner
        may lead by one turn for each worker, and by eight more in this order: each worker can have
        one claim that began in its turn but was made after those of others.
        """
        workers = 8
        for n in range(90):
            await queued(store, owner=f"{'abc'[n // 30]}")
        claimed: list[Job] = []

        async def work(name: str) -> None:
            while (job := await store.claim(name, LEASE_S, ["restore"])) is not None:
                claimed.append(job)

        await asyncio.gather(*(work(f"w{n}") for n in range(workers)))
        assert len(claimed) == len({job.ref for job in claimed}) == 90
        order = [job.owner for job in sorted(claimed, key=_claimed_at)]
        assert _greatest_lead(order) <= 1 + 2 * workers

    @pytest.mark.turns
    async def test_what_waits_is_listed_for_tickets(self, store: JobStore) -> None:
        """`waiting` has the best first, jobs of every owner, and no job twice."""
        for owner in ("alice", "alice", "bob"):
            await queued(store, owner=owner)
        refs = list(await store.waiting(10))
        assert len(set(refs)) == 3
        assert (await claim(store)).id == refs[0].job_id


def _claimed_at(job: Job) -> datetime:
    assert job.started_at is not None
    return job.started_at


def _greatest_lead(order: Sequence[str]) -> int:
    """Return by how many turns an owner was ahead of another that still waited."""
    total, so_far, lead = Counter(order), Counter[str](), 0
    for owner in order:
        so_far[owner] += 1
        behind = [so_far[other] for other in total if so_far[other] < total[other]]
        lead = max(lead, so_far[owner] - min(behind, default=so_far[owner]))
    return lead


def test_the_measure_of_fairness_measures() -> None:
    """`_greatest_lead` detects one owner going ahead."""
    assert _greatest_lead("abab") == 1
    assert _greatest_lead("aaab") == 3


class TestAffinity:
    @pytest.mark.affinity
    async def test_a_worker_prefers_what_it_has_loaded(self, store: JobStore) -> None:
        """A loaded model is preferred over turns and over age; without one, the best job is
        taken."""
        for owner, workflow in (("alice", "restore"), ("bob", "enlarge"), ("alice", "enlarge")):
            await queued(store, owner=owner, workflow=workflow)
        both = ["restore", "enlarge"]
        affinity = Affinity(frozenset({"enlarge"}))
        later = await store.claim("w1", LEASE_S, both, affinity)
        assert later is not None
        assert (later.owner, later.workflow) == ("alice", "enlarge")
        plain = await store.claim("w2", LEASE_S, both, Affinity())
        assert plain is not None
        assert (plain.owner, plain.workflow) == ("bob", "enlarge")

    @pytest.mark.affinity
    async def test_a_worker_passes_a_job_over_once(self, store: JobStore) -> None:
        """However many jobs match its loaded models, its next claim takes the best job."""
        await queued(store, owner="bob", workflow="restore")
        for _ in range(6):
            await queued(store, owner="alice", workflow="enlarge")
        affinity = Affinity(frozenset({"enlarge"}))
        jobs = [await store.claim("w", LEASE_S, ["restore", "enlarge"], affinity) for _ in range(3)]
        assert [job.owner for job in jobs if job] == ["alice", "bob", "alice"]

    @pytest.mark.affinity
    async def test_it_never_goes_before_a_better_class(self, store: JobStore) -> None:
        """A batch job whose models are loaded still waits for interactive jobs."""
        await queued(store, workflow="enlarge", priority=Priority.BATCH)
        await queued(store, workflow="restore")
        affinity = Affinity(frozenset({"enlarge"}))
        first = await store.claim("w", LEASE_S, ["restore", "enlarge"], affinity)
        assert first is not None
        assert first.workflow == "restore"

    @pytest.mark.affinity
    async def test_it_sees_no_further_than_its_window(self, store: JobStore) -> None:
        """It looks neither far down an owner's queue nor at owners whose turn is far off."""
        for _ in range(WINDOW_JOBS):
            await queued(store, owner="owner-0", workflow="restore")
        await queued(store, owner="owner-0", workflow="enlarge")
        for n in range(1, WINDOW_TURNS):
            await queued(store, owner=f"owner-{n}", workflow="restore")
        await queued(store, owner="too late", workflow="enlarge")
        affinity = Affinity(frozenset({"enlarge"}))
        first = await store.claim("w", LEASE_S, ["restore", "enlarge"], affinity)
        assert first is not None
        assert (first.owner, first.workflow) == ("owner-0", "restore")

    @pytest.mark.affinity
    async def test_workers_at_once_take_each_job_once(self, store: JobStore) -> None:
        """With more workers than jobs in the window, each worker still gets one."""
        count = WINDOW_JOBS + 4
        for _ in range(count):
            await queued(store, workflow="enlarge")
        claims = (
            store.claim(f"w{n}", LEASE_S, ["enlarge"], Affinity(frozenset({"enlarge"})))
            for n in range(count)
        )
        claimed = [job.id for job in await asyncio.gather(*claims) if job]
        assert len(set(claimed)) == len(claimed) == count
