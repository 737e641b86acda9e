"""The rules of the BatchStore port, on Postgres and in memory."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, replace
from typing import Any
from uuid import UUID, uuid4

import pytest
from sqlalchemy import delete
from sqlalchemy.exc import IntegrityError

from persistence.postgres.batches import CANCEL_BATCH, PostgresBatchStore
from persistence.postgres.database import Database
from persistence.postgres.jobs import PostgresJobStore
from persistence.postgres.tables import jobs as jobs_table
from restoration.batches import BatchCounts, BatchStatus, JobBatch, NewBatch, Refusal
from restoration.errors import BatchNotFound, IdempotencyConflict, InvalidRequest, QueueFull
from restoration.jobs import Failure, Job, JobStatus, NewJob
from restoration.limits.quotas import Quotas
from restoration.ports.batches import BatchStore
from restoration.queue_policy import QueuePolicy
from tests.fakes.batches import MemoryBatchStore
from tests.fakes.job_store import MemoryJobStore
from tests.support.job_stores import JobStore
from tests.support.samples import artifact, new_job

FAILURE = Failure("engine_failed", "a node raised")
BROKEN = Failure("broken_image", "the image cannot be decoded")


@dataclass
class Stores:
    jobs: JobStore
    batches: BatchStore
    database: Database | None = None

    def forgetful(self) -> BatchStore:
        """Return the same store with keys that expire at once."""
        if isinstance(self.batches, MemoryBatchStore):
            return replace(self.batches, idempotency_ttl_s=0)
        assert self.database is not None
        return PostgresBatchStore(self.database, QueuePolicy(idempotency_ttl_s=0))

    def narrow(self, room: int) -> BatchStore:
        """Return the same store with a limit on each owner's waiting jobs."""
        policy = QueuePolicy(quotas=Quotas(waiting_jobs=room))
        if isinstance(self.jobs, MemoryJobStore):
            return MemoryBatchStore(replace(self.jobs, policy=policy))
        assert self.database is not None
        return PostgresBatchStore(self.database, policy)

    async def forget(self, job_id: UUID) -> None:
        """Delete a job as retention does long after its end."""
        if isinstance(self.jobs, MemoryJobStore):
            del self.jobs.rows[job_id]
        else:
            assert self.database is not None
            statement = delete(jobs_table).where(jobs_table.c.id == job_id)
            await self.database.run(lambda connection: connection.execute(statement))

    async def insert(self, accepted: int, refused: int = 0, **changes: Any) -> JobBatch:
        """Insert a batch with so many accepted photos, followed by the refused ones."""
        batch, created = await self.batches.insert(*new_batch(accepted, refused, **changes))
        assert created
        return batch

    async def claim(self) -> Job:
        job = await self.jobs.claim("w", 60, ["restore"])
        assert job is not None
        return job

    async def counts(self, batch: JobBatch) -> BatchCounts:
        return (await self.batches.get(batch.id)).counts


@pytest.fixture(params=[pytest.param("postgres", marks=pytest.mark.services), "memory"])
def stores(request: pytest.FixtureRequest) -> Stores:
    if request.param == "memory":
        jobs = MemoryJobStore()
        return Stores(jobs, MemoryBatchStore(jobs))
    database = request.getfixturevalue("database")
    return Stores(PostgresJobStore(database), PostgresBatchStore(database), database)


def new_batch(
    accepted: int, refused: int = 0, owner: str = "alice", **changes: Any
) -> tuple[NewBatch, list[NewJob]]:
    size = accepted + refused
    batch = NewBatch(
        id=uuid4(),
        owner=owner,
        names=tuple(f"photo {index}.png" for index in range(size)),
        refusals=tuple(Refusal(index, BROKEN) for index in range(accepted, size)),
    )
    ids = sorted(uuid4() for _ in range(accepted))
    jobs = [
        new_job(id=job_id, owner=owner, batch_id=batch.id, batch_index=index)
        for index, job_id in enumerate(ids)
    ]
    return replace(batch, **changes), jobs


@pytest.mark.batches
async def test_a_batch_and_its_jobs_are_recorded(stores: Stores) -> None:
    """Each accepted photo is a queued job in the batch, and each refused one has a reason."""
    batch = await stores.insert(2, refused=1)
    assert batch == await stores.batches.get(batch.id, owner="alice")
    assert [batch] == await stores.batches.find([batch.id, uuid4()])
    assert batch.counts == BatchCounts(queued=2, refused=1)
    assert (batch.status, batch.owner) == (BatchStatus.RUNNING, "alice")
    first, second, third = await stores.batches.items(batch.id)
    assert [item.index for item in (first, second, third)] == [0, 1, 2]
    assert (first.name, first.status, first.failure) == ("photo 0.png", JobStatus.QUEUED, None)
    assert (third.name, third.status, third.failure) == ("photo 2.png", None, BROKEN)
    assert third.job_id is None
    assert second.job_id is not None
    job = await stores.jobs.get(second.job_id, owner="alice")
    assert (job.batch_id, job.batch_index) == (batch.id, 1)


@pytest.mark.batches
async def test_jobs_go_in_the_order_of_the_batch(stores: Stores) -> None:
    """Jobs of one transaction have the same age; ids that rise with the index keep their order."""
    await stores.insert(20)
    claimed = [(await stores.claim()).batch_index for _ in range(20)]
    assert claimed == list(range(20))


@pytest.mark.batches
@pytest.mark.parametrize("stores", ["postgres"], indirect=True)  # memory has no transactions
async def test_it_is_all_or_nothing(stores: Stores) -> None:
    """If one job cannot be recorded, neither the batch nor its other jobs are."""
    batch, jobs = new_batch(3)
    jobs[2] = replace(jobs[2], params={"strength": float("nan")})
    with pytest.raises(InvalidRequest):
        await stores.batches.insert(batch, jobs)
    with pytest.raises(BatchNotFound):
        await stores.batches.get(batch.id)
    assert list(await stores.jobs.waiting(10)) == []


@pytest.mark.batches
async def test_counts_follow_the_jobs(stores: Stores) -> None:
    """Each change of a job shows in its batch, and the end of the last job ends it."""
    batch = await stores.insert(3, refused=1)
    await stores.jobs.succeed((await stores.claim()).ref, artifact(), {})
    await stores.jobs.fail((await stores.claim()).ref, FAILURE)
    last = await stores.claim()
    assert await stores.counts(batch) == BatchCounts(running=1, succeeded=1, failed=1, refused=1)
    await stores.jobs.request_cancel(last.id)
    assert await stores.counts(batch) == BatchCounts(cancelling=1, succeeded=1, failed=1, refused=1)
    assert (await stores.batches.get(batch.id)).status is BatchStatus.RUNNING
    await stores.jobs.release(last.ref, None)
    ended = await stores.batches.get(batch.id)
    assert ended.counts == BatchCounts(cancelled=1, succeeded=1, failed=1, refused=1)
    assert ended.status is BatchStatus.CANCELLED
    assert (await stores.batches.items(batch.id))[1].failure == FAILURE


@pytest.mark.batches
async def test_missing_and_foreign_batches_look_the_same(stores: Stores) -> None:
    """Any call for another owner's batch raises the same error as for an unknown one."""
    batch = await stores.insert(1)
    missing = uuid4()
    for batch_id, owner in [(batch.id, "mallory"), (missing, "alice")]:
        for call in (
            stores.batches.get(batch_id, owner),
            stores.batches.items(batch_id, owner),
            stores.batches.request_cancel(batch_id, owner),
        ):
            with pytest.raises(BatchNotFound, match="the batch does not exist"):
                await call
    assert await stores.counts(batch) == BatchCounts(queued=1)


@pytest.mark.batches
async def test_the_same_key_is_the_same_batch(stores: Stores) -> None:
    """A used key returns its batch, for the same request of the same owner only, and adds no
    job."""
    first = await stores.insert(2, idempotency_key="k", request_digest="d")
    repeated = new_batch(2, idempotency_key="k", request_digest="d")
    assert await stores.batches.insert(*repeated) == (first, False)
    assert await stores.batches.find_by_key("alice", "k") == first
    assert await stores.batches.find_by_key("bob", "k") is None
    with pytest.raises(IdempotencyConflict):
        await stores.batches.insert(*new_batch(2, idempotency_key="k", request_digest="other"))
    await stores.insert(1, owner="bob", idempotency_key="k", request_digest="other")
    assert len(await stores.jobs.waiting(10)) == 3


@pytest.mark.batches
async def test_inserting_a_batch_again_changes_nothing(stores: Stores) -> None:
    """A call whose answer was lost can be repeated, with or without a key."""
    batch, jobs = new_batch(2)
    first, created = await stores.batches.insert(batch, jobs)
    assert created
    assert await stores.batches.insert(batch, jobs) == (first, False)
    assert len(await stores.jobs.waiting(10)) == 2


@pytest.mark.batches
async def test_of_concurrent_inserts_of_a_key_one_creates(stores: Stores) -> None:
    """Concurrent inserts with one key create one batch, and all of them return it."""
    inserts = [
        stores.batches.insert(*new_batch(5, idempotency_key="k", request_digest="d"))
        for _ in range(8)
    ]
    outcomes = await asyncio.gather(*inserts)
    assert len({batch.id for batch, _ in outcomes}) == 1
    assert sum(created for _, created in outcomes) == 1
    assert len(await stores.jobs.waiting(100)) == 5


@pytest.mark.batches
async def test_cancel_ends_all_that_has_not_ended(stores: Stores) -> None:
    """Waiting jobs are cancelled at once, running ones asked, and ended ones kept; repeatable."""
    batch = await stores.insert(4, refused=1)
    other = await stores.insert(1)
    done = await stores.claim()
    await stores.jobs.succeed(done.ref, artifact(), {})
    running = await stores.claim()
    asked = await stores.batches.request_cancel(batch.id, owner="alice")
    assert asked.counts == BatchCounts(cancelling=1, cancelled=2, succeeded=1, refused=1)
    assert await stores.batches.request_cancel(batch.id) == asked
    await stores.jobs.release(running.ref, None)
    ended = await stores.batches.request_cancel(batch.id)
    assert ended.counts == BatchCounts(cancelled=3, succeeded=1, refused=1)
    assert ended.status is BatchStatus.CANCELLED
    assert await stores.counts(other) == BatchCounts(queued=1)


@pytest.mark.batches
async def test_a_cancel_reaches_every_job_of_a_large_batch(stores: Stores) -> None:
    """One call is enough even if it takes several transactions, and catches jobs claimed in
    between."""
    size = 2 * CANCEL_BATCH + 5
    batch = await stores.insert(size)
    cancel = asyncio.create_task(stores.batches.request_cancel(batch.id))
    claimed = [job for job in [await stores.jobs.claim("w", 60, ["restore"])] if job]
    counts = (await cancel).counts
    assert counts == BatchCounts(cancelling=len(claimed), cancelled=size - len(claimed))
    assert await stores.jobs.claim("w", 60, ["restore"]) is None


@pytest.mark.batches
async def test_items_come_in_pages(stores: Stores) -> None:
    """Pages are ordered by index, with accepted and refused photos, and empty after the last."""
    batch = await stores.insert(3, refused=2)
    pages = [
        [item.index for item in await stores.batches.items(batch.id, first=first, limit=2)]
        for first in (0, 2, 4, 6)
    ]
    assert pages == [[0, 1], [2, 3], [4], []]


@pytest.mark.batches
async def test_batches_are_listed_newest_first(stores: Stores) -> None:
    """An owner's batches each appear on one page with their counts; a garbled cursor is refused."""
    mine = [await stores.insert(1, refused=n) for n in range(5)]
    await stores.insert(1, owner="bob")
    seen: list[JobBatch] = []
    cursor = None
    for _ in range(3):
        page = await stores.batches.list("alice", cursor, limit=2)
        seen += page.batches
        cursor = page.next_cursor
    assert cursor is None
    assert seen == mine[::-1]
    with pytest.raises(InvalidRequest):
        await stores.batches.list("alice", cursor="bm90IG91cnM=")


@pytest.mark.batches
async def test_a_key_is_forgotten_in_the_end(stores: Stores) -> None:
    """An expired key does not find its batch any more, and can be used again."""
    first = await stores.insert(1, idempotency_key="k", request_digest="d")
    forgetful = stores.forgetful()
    assert await forgetful.find_by_key("alice", "k") is None
    second, created = await forgetful.insert(
        *new_batch(1, idempotency_key="k", request_digest="other")
    )
    assert created
    assert second.id != first.id
    assert await stores.counts(first) == BatchCounts(queued=1)


@pytest.mark.batches
async def test_jobs_that_are_forgotten_leave_their_places(stores: Stores) -> None:
    """After retention has deleted rows, counts still add up to the size, and items show the
    gaps."""
    batch = await stores.insert(2, refused=1)
    await stores.forget((await stores.claim()).id)
    assert await stores.counts(batch) == BatchCounts(queued=1, refused=1, expired=1)
    gone, there, refused = await stores.batches.items(batch.id)
    assert (gone.name, gone.job_id, gone.status, gone.failure) == ("photo 0.png", None, None, None)
    assert there.status is JobStatus.QUEUED
    assert refused.failure == BROKEN


@pytest.mark.batches
async def test_rows_of_a_batch_hold_together(database: Database) -> None:
    """A job cannot name an unknown batch, reuse an index or have only half of the reference."""
    store, batches = PostgresJobStore(database), PostgresBatchStore(database)
    batch, jobs = new_batch(1)
    await batches.insert(batch, jobs)
    for changes in (
        {"batch_id": uuid4(), "batch_index": 0},
        {"batch_id": batch.id, "batch_index": None},
    ):
        with pytest.raises(IntegrityError):
            await store.insert(new_job(**changes))
    with pytest.raises(IntegrityError):
        await batches.insert(*_same_place_twice())


def _same_place_twice() -> tuple[NewBatch, list[NewJob]]:
    batch, jobs = new_batch(2)
    return batch, [jobs[0], replace(jobs[1], batch_index=0)]


@pytest.mark.batches
async def test_a_batch_for_which_there_is_no_room_leaves_nothing(stores: Stores) -> None:
    """It is refused as a whole, so that it can be sent again unchanged."""
    batches = stores.narrow(room=3)
    await batches.insert(*new_batch(3, owner="alice"))
    refused, jobs = new_batch(1, owner="alice")
    with pytest.raises(QueueFull):
        await batches.insert(refused, jobs)
    with pytest.raises(BatchNotFound):
        await batches.get(refused.id)
