"""Reused results in the stores, on Postgres and S3 and in memory."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, replace
from typing import Any
from uuid import UUID, uuid4

import pytest

from persistence.objects.s3 import S3BlobStore
from persistence.postgres.batches import PostgresBatchStore
from persistence.postgres.jobs import PostgresJobStore
from restoration.batches import NewBatch
from restoration.errors import ArtifactCorrupt, StorageFull
from restoration.jobs import Job, JobStatus, NewJob, Reused
from restoration.limits.quotas import Quotas
from restoration.ports.batches import BatchStore
from restoration.ports.objects import BlobStore
from restoration.webhooks.messages import DeliveryStatus
from tests.conftest import S3Access
from tests.fakes.batches import MemoryBatchStore
from tests.fakes.job_store import MemoryJobStore
from tests.support.job_stores import JobStore
from tests.support.samples import artifact, new_job

DATA = bytes(range(256)) * 20
SOURCE = uuid4()


@dataclass
class Stores:
    jobs: JobStore
    batches: BatchStore

    async def finish(self, **changes: Any) -> Job:
        await self.jobs.insert(new_job(**changes))
        job = await self.jobs.claim("w", 60, ["restore"])
        assert job is not None
        return await self.jobs.succeed(job.ref, artifact(f"outputs/{job.id}/1.png"), {})


@pytest.fixture(params=[pytest.param("postgres", marks=pytest.mark.services), "memory"])
def stores(request: pytest.FixtureRequest) -> Stores:
    if request.param == "memory":
        memory = MemoryJobStore()
        return Stores(memory, MemoryBatchStore(memory))
    database = request.getfixturevalue("database")
    return Stores(PostgresJobStore(database), PostgresBatchStore(database))


def reusing(source: UUID = SOURCE, size_bytes: int = 1, **changes: Any) -> NewJob:
    job = new_job(**changes)
    output = replace(artifact(f"outputs/{job.id}/copy.png"), size_bytes=size_bytes)
    return replace(job, reused=Reused(source, output))


@pytest.mark.reuse
async def test_the_newest_result_of_the_same_work_is_found(stores: Stores) -> None:
    """Only successful jobs of the same owner count; looking changes nothing."""
    asked = new_job()
    assert await stores.jobs.find_result(asked) is None
    await stores.jobs.insert(new_job())
    assert await stores.jobs.find_result(asked) is None
    waiting = await stores.jobs.claim("w", 60, ["restore"])
    assert waiting is not None
    assert await stores.jobs.find_result(asked) is None
    await stores.jobs.succeed(waiting.ref, artifact(), {})
    newest = await stores.finish()
    assert await stores.jobs.find_result(asked) == newest
    assert await stores.jobs.find_result(replace(asked, owner="bob")) is None
    assert await stores.jobs.find_result(replace(asked, params={"seed": 1})) is None


@pytest.mark.reuse
async def test_a_reused_result_is_a_job_that_has_succeeded(stores: Stores) -> None:
    """It cannot be claimed, cancelled or finished again; other jobs may reuse it."""
    new = reusing()
    job, created = await stores.jobs.insert(new)
    assert (created, job.status, job.reused_from) == (True, JobStatus.SUCCEEDED, SOURCE)
    assert (job.attempt, job.attempts, job.worker, job.started_at) == (0, (), None, None)
    assert new.reused is not None
    assert job.result() == new.reused.output
    assert job.finished_at == job.created_at
    assert await stores.jobs.claim("w", 60, ["restore"]) is None
    assert await stores.jobs.waiting(10) == []
    assert await stores.jobs.request_cancel(job.id) == job
    assert await stores.jobs.insert(new) == (job, False)
    assert await stores.jobs.ended([job.id]) == [job]
    assert await stores.jobs.find_result(new_job()) == job


@pytest.mark.reuse
async def test_its_webhook_is_sent_like_any_other(stores: Stores) -> None:
    """The delivery is recorded with the job, once, even if the call is repeated."""
    new = reusing(webhook_url="https://example.com/hook")
    await stores.jobs.insert(new)
    await stores.jobs.insert(new)
    [delivery] = (await stores.jobs.deliveries([new.id])).values()
    assert delivery.status is DeliveryStatus.PENDING


@pytest.mark.reuse
async def test_a_batch_counts_what_was_answered_at_once(stores: Stores) -> None:
    """Reused results count beside waiting jobs; a batch of only reused results has ended."""
    batch = NewBatch(uuid4(), "alice", ("a.png", "b.png"), ())
    hook = "https://example.com/hook"
    of_batch = [
        replace(reusing(webhook_url=hook), batch_id=batch.id, batch_index=0),
        new_job(batch_id=batch.id, batch_index=1, webhook_url=hook),
    ]
    recorded, created = await stores.batches.insert(batch, of_batch)
    assert created
    assert (recorded.counts.succeeded, recorded.counts.queued) == (1, 1)
    assert set(await stores.jobs.deliveries([job.id for job in of_batch])) == {of_batch[0].id}
    whole = NewBatch(uuid4(), "alice", ("a.png",), ())
    done, _ = await stores.batches.insert(
        whole, [replace(reusing(), batch_id=whole.id, batch_index=0)]
    )
    assert done.status.is_final
    [item] = await stores.batches.items(whole.id)
    assert item.status is JobStatus.SUCCEEDED


@pytest.mark.reuse
async def test_a_reused_result_is_stored_and_counted(stores: Stores) -> None:
    """A reused result counts at once; if it exceeds the quota, the job is refused."""
    quotas = Quotas(stored_bytes=100)
    await stores.jobs.insert(reusing(size_bytes=90), quotas)
    await stores.jobs.check_room("alice", quotas, 9)
    with pytest.raises(StorageFull):
        await stores.jobs.check_room("alice", quotas, 10)
    refused = reusing(size_bytes=10)
    with pytest.raises(StorageFull):
        await stores.jobs.insert(refused, quotas)
    assert await stores.jobs.ended([refused.id]) == []


@pytest.mark.reuse
async def test_equal_jobs_at_the_same_time_disturb_nobody(stores: Stores) -> None:
    """Concurrent equal jobs are separate jobs."""
    ended = await asyncio.gather(*(stores.jobs.insert(reusing()) for _ in range(8)))
    assert {job.status for job, _ in ended} == {JobStatus.SUCCEEDED}
    assert len({job.id for job, _ in ended}) == 8


@pytest.mark.reuse
async def test_a_copy_stands_by_itself(any_blobs: BlobStore) -> None:
    """A copy has the same bytes and type under another key, and outlives the original."""
    first = await any_blobs.put(f"outputs/{uuid4()}/1.png", DATA, "image/png")
    key = f"outputs/{uuid4()}/copy-1.png"
    copied = await any_blobs.copy(first, key)
    assert copied == replace(first, key=key)
    await any_blobs.delete(first.key)
    assert await any_blobs.get(copied) == DATA


@pytest.mark.reuse
@pytest.mark.parametrize("what", ["gone", "longer", "other bytes"])
async def test_what_is_copied_is_what_was_promised(any_blobs: BlobStore, what: str) -> None:
    """Copying an object that differs from its artifact raises ArtifactCorrupt and leaves no
    copy."""
    first = await any_blobs.put(f"outputs/{uuid4()}/1.png", DATA, "image/png")
    if what == "gone":
        await any_blobs.delete(first.key)
    else:
        other = DATA + b"x" if what == "longer" else DATA[::-1]
        await any_blobs.put(first.key, other, "image/png")
    key = f"outputs/{uuid4()}/copy-1.png"
    with pytest.raises(ArtifactCorrupt):
        await any_blobs.copy(first, key)
    assert await any_blobs.fetch(key, 10) is None


@pytest.mark.reuse
async def test_a_copy_is_saved_under_its_own_jobs_name(blobs: S3BlobStore, s3: S3Access) -> None:
    """Followers of its link, such as CloudFront, see the name of the copy's own job."""
    first = await blobs.put(f"outputs/{uuid4()}/1.png", DATA, "image/png")
    job_id = uuid4()
    copied = await blobs.copy(first, f"outputs/{job_id}/copy-{uuid4()}.png")

    def head(client: Any) -> Any:
        return client.head_object(Bucket=s3.bucket, Key=copied.key)

    stored = await blobs._run(head)
    assert stored["ContentType"] == "image/png"
    assert f"restored-{job_id}.png" in stored["ContentDisposition"]
