"""Quotas of one owner, on Postgres and in memory."""

from __future__ import annotations

import asyncio
from collections import Counter
from dataclasses import dataclass
from typing import Any
from uuid import uuid4

import pytest

from persistence.postgres.batches import PostgresBatchStore
from persistence.postgres.database import Database
from persistence.postgres.jobs import PostgresJobStore
from restoration.batches import NewBatch
from restoration.errors import QueueFull, StorageFull
from restoration.jobs import Artifact, Failure, Job, JobStatus, NewJob, Priority
from restoration.limits.quotas import Quotas
from restoration.ports.batches import BatchStore
from restoration.queue_policy import QueuePolicy
from tests.fakes.batches import MemoryBatchStore
from tests.fakes.job_store import MemoryJobStore
from tests.support.job_stores import JobStore
from tests.support.samples import artifact, new_job

FAILURE = Failure("engine_crashed", "the engine died")
CLAIMERS = 8


@dataclass
class Stores:
    jobs: JobStore
    batches: BatchStore

    async def insert(self, quotas: Quotas | None = None, **changes: Any) -> Job:
        job, created = await self.jobs.insert(new_job(**changes), quotas)
        assert created
        return job

    async def claim(self, worker: str = "w") -> Job | None:
        return await self.jobs.claim(worker, 60, ["restore"])

    async def claim_all(self) -> list[Job]:
        claimed = []
        while (job := await self.claim()) is not None:
            claimed.append(job)
        return claimed


@pytest.fixture(params=[pytest.param("postgres", marks=pytest.mark.services), "memory"])
def stores(request: pytest.FixtureRequest) -> Stores:
    if request.param == "memory":
        memory = MemoryJobStore()
        return Stores(memory, MemoryBatchStore(memory))
    database = request.getfixturevalue("database")
    return Stores(PostgresJobStore(database), PostgresBatchStore(database))


def _sized(size_bytes: int) -> Artifact:
    return Artifact(f"inputs/{uuid4()}.png", "0" * 64, size_bytes, "image/png")


def _batch(count: int, size_bytes: int = 1, owner: str = "alice") -> tuple[NewBatch, list[NewJob]]:
    batch = NewBatch(uuid4(), owner, tuple(f"{n}.png" for n in range(count)), ())
    jobs = [
        new_job(owner=owner, batch_id=batch.id, batch_index=n, input=_sized(size_bytes))
        for n in range(count)
    ]
    return batch, sorted(jobs, key=lambda job: job.id)


class TestRunning:
    @pytest.mark.quotas
    async def test_no_more_run_than_may(self, stores: Stores) -> None:
        """The owner's other jobs of either class wait; those of other owners do not."""
        two = Quotas(running_jobs=2)
        for priority in (Priority.INTERACTIVE, Priority.BATCH, Priority.BATCH):
            await stores.insert(two, priority=priority)
        await stores.insert(two)
        for _ in range(3):
            await stores.insert(owner="bob")
        assert Counter(job.owner for job in await stores.claim_all()) == {"alice": 2, "bob": 3}
        assert list(await stores.jobs.waiting(10)) == []

    @pytest.mark.quotas
    @pytest.mark.parametrize("end", ["succeed", "fail", "release", "cancel"])
    async def test_an_end_makes_room(self, stores: Stores, end: str) -> None:
        """Every end of an attempt makes room for one more job, which the dispatcher sees."""
        one = Quotas(running_jobs=1)
        for _ in range(2):
            await stores.insert(one)
        [running] = await stores.claim_all()
        match end:
            case "succeed":
                await stores.jobs.succeed(running.ref, artifact(), {})
            case "fail":
                await stores.jobs.fail(running.ref, FAILURE)
            case "release":
                await stores.jobs.release(running.ref, None)
            case "cancel":
                await stores.jobs.request_cancel(running.id)
                assert await stores.claim() is None  # its engine still works on it
                await stores.jobs.release(running.ref, None)
        assert len(await stores.jobs.waiting(1)) == 1
        assert len(await stores.claim_all()) == 1

    @pytest.mark.quotas
    async def test_a_lost_worker_makes_room(self, stores: Stores) -> None:
        """A job that lost its worker waits again, and does not count as running."""
        one = Quotas(running_jobs=1)
        for _ in range(2):
            await stores.insert(one)
        [running] = await stores.claim_all()
        await stores.jobs.reclaim("w")
        again = await stores.claim("another")
        assert again is not None
        assert again.id == running.id
        assert await stores.claim("another") is None

    @pytest.mark.quotas
    async def test_the_newest_submission_says_how_many(self, stores: Stores) -> None:
        """A raised, lowered or lifted limit takes effect with the next submission."""
        await stores.insert(Quotas(running_jobs=1))
        await stores.insert(Quotas(running_jobs=2))
        assert len(await stores.claim_all()) == 2
        await stores.insert(Quotas(running_jobs=1))
        assert await stores.claim_all() == []
        await stores.insert()
        assert len(await stores.claim_all()) == 2

    @pytest.mark.quotas
    async def test_somebody_elses_retry_changes_no_limit(self, stores: Stores) -> None:
        """An operator's retry has no quotas, and does not lift the owner's."""
        one = Quotas(running_jobs=1)
        for _ in range(3):
            await stores.insert(one)
        [failed] = await stores.claim_all()
        await stores.jobs.fail(failed.ref, FAILURE)
        await stores.jobs.insert(new_job(retry_of=failed.id, input=failed.input), None)
        assert len(await stores.claim_all()) == 1

    @pytest.mark.quotas
    async def test_claims_at_the_same_moment_keep_to_it(self, stores: Stores) -> None:
        """The limit is exact: a claim beyond it takes another owner's job, or none."""
        for _ in range(4 * CLAIMERS):
            await stores.insert(Quotas(running_jobs=3))
        for _ in range(bobs := CLAIMERS):
            await stores.insert(owner="bob")
        for _ in range(4):
            claimed = await asyncio.gather(*(stores.claim() for _ in range(CLAIMERS)))
            taken = Counter(job.owner for job in claimed if job)
            assert taken["alice"] == await _running(stores, "alice") <= 3
            # Every claimer gets a job while one may start.
            assert taken.total() == min(CLAIMERS, 3 + bobs)
            bobs -= taken["bob"]
            for job in claimed:
                if job and job.owner == "alice":
                    await stores.jobs.succeed(job.ref, artifact(), {})
        assert bobs == 0
        assert taken == {"alice": 3}


async def _running(stores: Stores, owner: str) -> int:
    page = await stores.jobs.list(owner, [JobStatus.RUNNING], limit=100)
    return len(page.jobs)


class TestWaiting:
    @pytest.mark.quotas
    async def test_a_call_may_bring_its_own_limit(self, stores: Stores) -> None:
        """A call's limit may be higher or lower than the store's, or 0 for none."""
        strict = Quotas(waiting_jobs=1)
        await stores.insert(strict)
        for call in (stores.jobs.check_room("alice", strict), stores.insert(strict)):
            with pytest.raises(QueueFull):
                await call
        await stores.insert(Quotas(waiting_jobs=2))
        await stores.insert(Quotas(waiting_jobs=0))
        assert len((await stores.jobs.list("alice")).jobs) == 3

    @pytest.mark.quotas
    async def test_a_batch_counts_by_its_photos(self, stores: Stores) -> None:
        """A batch is recorded only if there is room for all of its photos."""
        quotas = Quotas(waiting_jobs=3)
        await stores.batches.insert(*_batch(2), quotas)
        with pytest.raises(QueueFull):
            await stores.batches.insert(*_batch(2), quotas)
        assert len((await stores.jobs.list("alice")).jobs) == 2
        await stores.batches.insert(*_batch(1), quotas)


class TestStored:
    @pytest.mark.quotas
    async def test_no_more_is_stored_than_may_be(self, stores: Stores) -> None:
        """Inputs count from their submission on, and an upload is refused before it is stored."""
        quotas = Quotas(stored_bytes=100)
        await stores.insert(quotas, input=_sized(60))
        await stores.jobs.check_room("alice", quotas, 40)
        for call in (
            stores.jobs.check_room("alice", quotas, 41),
            stores.insert(quotas, input=_sized(41)),
        ):
            with pytest.raises(StorageFull) as caught:
                await call
            assert caught.value.details == {"limit": 100, "retry_after_s": 3600}
        await stores.insert(quotas, input=_sized(40))
        await stores.insert(quotas, owner="bob", input=_sized(100))
        assert len((await stores.jobs.list("alice")).jobs) == 2

    @pytest.mark.quotas
    async def test_results_count_as_well(self, stores: Stores) -> None:
        """Results are never refused, but use up the room of later inputs."""
        quotas = Quotas(stored_bytes=100)
        await stores.insert(quotas, input=_sized(10))
        job = await stores.claim()
        assert job is not None
        await stores.jobs.succeed(job.ref, _sized(200), {})
        with pytest.raises(StorageFull):
            await stores.insert(quotas, input=_sized(1))

    @pytest.mark.quotas
    async def test_a_job_that_is_sent_again_shares_its_photo(self, stores: Stores) -> None:
        """The shared photo counts once."""
        quotas = Quotas(stored_bytes=100)
        first = await stores.insert(quotas, input=_sized(60))
        await stores.jobs.request_cancel(first.id)
        await stores.insert(quotas, input=first.input, retry_of=first.id)
        await stores.insert(quotas, input=_sized(40))

    @pytest.mark.quotas
    async def test_a_batch_counts_all_its_photos(self, stores: Stores) -> None:
        """The sum of all photos counts; a refused batch leaves nothing behind."""
        quotas = Quotas(stored_bytes=100)
        await stores.batches.insert(*_batch(3, size_bytes=20), quotas)
        with pytest.raises(StorageFull):
            await stores.batches.insert(*_batch(3, size_bytes=20), quotas)
        await stores.batches.insert(*_batch(2, size_bytes=20), quotas)
        assert len((await stores.jobs.list("alice")).jobs) == 5


@pytest.mark.quotas
@pytest.mark.parametrize(
    "policy", [QueuePolicy(quotas=Quotas(stored_bytes=1)), QueuePolicy(quotas=Quotas())]
)
async def test_no_quotas_are_those_of_the_store(policy: QueuePolicy, database: Database) -> None:
    """A submission without quotas, as from a batch script, gets those of the settings."""
    results: list[object] = []
    for store in (MemoryJobStore(policy=policy), PostgresJobStore(database, policy)):
        jobs = [store.insert(new_job()) for _ in range(2)]
        results += await asyncio.gather(*jobs, return_exceptions=True)
    refused = [result for result in results if isinstance(result, StorageFull)]
    assert len(refused) == (2 if policy.quotas.stored_bytes else 0)
