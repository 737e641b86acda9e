"""Retention: inputs, outputs and rows of ended jobs are removed when they expire."""

from __future__ import annotations

import asyncio
import threading
from typing import Any
from uuid import uuid4

import pytest
from sqlalchemy import Connection, text
from structlog.testing import capture_logs

from actors.leader import retention as sweeping
from actors.leader.retention import Lifetimes, RetentionSweeper
from actors.maintenance import _work
from persistence.objects.keys import input_key, output_key, upload_key
from persistence.postgres.database import Database
from persistence.postgres.jobs import PostgresJobStore
from persistence.postgres.retention import Retention
from persistence.postgres.rows import new_row
from persistence.postgres.tables import jobs
from restoration.errors import ArtifactCorrupt, DependencyUnavailable, JobNotFound, ResultExpired
from restoration.images import ImageType
from restoration.jobs import Artifact, AttemptRef, Failure, Job, OutputFormat
from restoration.settings import Settings
from tests.conftest import S3Access
from tests.fakes.receiver import SECRET, receiving
from tests.fakes.stores import AnyBlobs, MemoryBlobStore
from tests.support.polling import until
from tests.support.samples import new_job

DAY_S = 24 * 3600
LIFETIMES = Lifetimes(input_s=7 * DAY_S, output_s=30 * DAY_S, row_s=90 * DAY_S)
FAILURE = Failure("engine_crashed", "the engine died")


@pytest.fixture
def store(database: Database) -> PostgresJobStore:
    return PostgresJobStore(database)


@pytest.fixture
def keeper(database: Database, blobs: AnyBlobs) -> RetentionSweeper:
    return RetentionSweeper(Retention(database), blobs, LIFETIMES)


async def submit(store: PostgresJobStore, blobs: AnyBlobs, **changes: Any) -> Job:
    job_id = uuid4()
    key = input_key(job_id, ImageType.PNG)
    stored = await blobs.put(key, b"damaged", "image/png")
    job, _ = await store.insert(new_job(**{"id": job_id, "input": stored} | changes))
    return job


async def store_result(blobs: AnyBlobs, ref: AttemptRef) -> Artifact:
    return await blobs.put(output_key(ref, OutputFormat.PNG), b"restored", "image/png")


async def finish(store: PostgresJobStore, blobs: AnyBlobs, **changes: Any) -> Job:
    """Create a job that has succeeded, with its objects."""
    await submit(store, blobs, **changes)
    job = await store.claim("w", 60, ["restore"])
    assert job is not None
    return await store.succeed(job.ref, await store_result(blobs, job.ref), {})


async def age(database: Database, job: Job, days: float) -> None:
    """Shift the end of the job so many days into the past."""
    statement = text(
        "UPDATE jobs SET finished_at = finished_at - :days * interval '1 day' WHERE id = :id"
    )
    values = {"days": days, "id": job.id}
    await database.run(lambda connection: connection.execute(statement, values))


async def is_there(blobs: AnyBlobs, stored: Artifact | None) -> bool:
    assert stored is not None
    try:
        await blobs.get(stored)
    except ArtifactCorrupt:
        return False
    return True


@pytest.mark.retention
async def test_each_goes_when_its_time_is_up(
    database: Database, store: PostgresJobStore, blobs: AnyBlobs, keeper: RetentionSweeper
) -> None:
    """The input expires after 7 days, the result after 30, the row after 90, and none earlier."""
    job = await finish(store, blobs)
    left = []
    for days in (6.9, 0.2, 22.8, 0.2, 59.8):
        await age(database, job, days)
        await keeper.remove_expired()
        left.append((await is_there(blobs, job.input), await is_there(blobs, job.output)))
    assert left == [(True, True), (False, True), (False, True), (False, False), (False, False)]
    expired = await store.get(job.id)
    with pytest.raises(ResultExpired):
        expired.result()
    await age(database, job, 0.2)
    with capture_logs() as logs:
        await keeper.remove_expired()
    with pytest.raises(JobNotFound):
        await store.get(job.id)
    [told] = logs
    assert (told["event"], told["rows"]) == ("expired_removed", 1)


@pytest.mark.retention
async def test_what_is_kept_for_ever_is_kept(
    database: Database, store: PostgresJobStore, blobs: AnyBlobs
) -> None:
    """A lifetime of 0 means forever; a row stays as long as one of its objects."""
    job = await finish(store, blobs)
    await age(database, job, 10_000)
    for lifetimes in (Lifetimes(0, 0, 0), Lifetimes(0, 0, 1), Lifetimes(1, 0, 1)):
        await RetentionSweeper(Retention(database), blobs, lifetimes).remove_expired()
        assert (await store.get(job.id)).result() == job.output
        assert await is_there(blobs, job.output)
    assert not await is_there(blobs, job.input)


@pytest.mark.retention
async def test_a_job_that_goes_on_keeps_everything(
    database: Database, store: PostgresJobStore, blobs: AnyBlobs, keeper: RetentionSweeper
) -> None:
    """Waiting and running jobs never expire, because the time counts from the end."""
    older = text("UPDATE jobs SET created_at = created_at - interval '1000 days'")
    running, waiting = [await submit(store, blobs) for _ in range(2)]
    assert await store.claim("w", 60, ["restore"]) is not None
    await database.run(lambda connection: connection.execute(older))
    await keeper.remove_expired()
    assert await is_there(blobs, running.input)
    assert await is_there(blobs, waiting.input)


@pytest.mark.retention
async def test_failed_and_cancelled_jobs_are_swept_too(
    database: Database, store: PostgresJobStore, blobs: AnyBlobs, keeper: RetentionSweeper
) -> None:
    """Jobs without a result have an input and a row that expire."""
    job = await submit(store, blobs)
    await store.request_cancel(job.id)
    await age(database, job, 91)
    await keeper.remove_expired()
    assert not await is_there(blobs, job.input)
    with pytest.raises(JobNotFound):
        await store.get(job.id)


@pytest.mark.retention
async def test_an_input_stays_while_another_job_needs_it(
    database: Database, store: PostgresJobStore, blobs: AnyBlobs, keeper: RetentionSweeper
) -> None:
    """An input shared by several jobs expires with the last of them."""
    first = await finish(store, blobs)
    second, _ = await store.insert(new_job(input=first.input))
    await age(database, first, 1000)
    await keeper.remove_expired()
    assert await is_there(blobs, first.input)
    await store.request_cancel(second.id)
    await age(database, second, 6)
    await keeper.remove_expired()
    assert await is_there(blobs, first.input)
    assert (await store.get(first.id)).input_expired_at is None
    await age(database, second, 2)
    await keeper.remove_expired()
    assert not await is_there(blobs, first.input)
    assert (await store.get(second.id)).input_expired_at is not None


@pytest.mark.retention
async def test_a_sweep_does_not_overtake_a_job_made_on_an_old_input(
    database: Database, store: PostgresJobStore, blobs: AnyBlobs
) -> None:
    """A retry that locks the old job's row keeps the input from expiring before its own insert."""
    old = await finish(store, blobs)
    await age(database, old, 8)
    locked, go_on = threading.Event(), threading.Event()

    def send_again(connection: Connection) -> None:
        row = connection.execute(jobs.select().where(jobs.c.id == old.id).with_for_update())
        assert row.mappings().one()["input_expired_at"] is None
        locked.set()
        assert go_on.wait(30)
        connection.execute(jobs.insert().values(new_row(new_job(input=old.input))))

    sending = asyncio.create_task(database.run(send_again))
    await asyncio.to_thread(locked.wait, 30)
    sweep = asyncio.create_task(Retention(database).expire_inputs(7 * DAY_S, 10))
    waits = text("SELECT count(*) FROM pg_locks WHERE NOT granted")
    await until(lambda: database.run(lambda connection: connection.scalar(waits)))
    go_on.set()
    await sending
    assert await sweep == []
    assert (await store.get(old.id)).input_expired_at is None


@pytest.mark.retention
async def test_a_row_stays_until_its_receiver_knows(
    database: Database, store: PostgresJobStore, blobs: AnyBlobs, keeper: RetentionSweeper
) -> None:
    """A pending webhook keeps its job's row; a finished one is deleted with it."""
    job = await finish(store, blobs, webhook_url="https://example.com/")
    await age(database, job, 91)
    await keeper.remove_expired()
    assert (await store.get(job.id)).output_expired_at is not None
    over = text("UPDATE deliveries SET status = 'dead', next_try_at = NULL")
    await database.run(lambda connection: connection.execute(over))
    await keeper.remove_expired()
    assert await store.deliveries([job.id]) == {}


@pytest.mark.retention
async def test_two_sweepers_and_many_batches(
    database: Database,
    store: PostgresJobStore,
    blobs: AnyBlobs,
    keeper: RetentionSweeper,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Two concurrent sweeps share the work in batches until none is left."""
    monkeypatch.setattr(sweeping, "BATCH", 3)
    for _ in range(10):
        await age(database, await finish(store, blobs), 91)
    await asyncio.gather(keeper.remove_expired(), keeper.remove_expired())
    count = text("SELECT count(*) FROM jobs")
    assert await database.run(lambda connection: connection.scalar(count)) == 0


@pytest.mark.retention
async def test_orphans(
    database: Database,
    store: PostgresJobStore,
    blobs: AnyBlobs,
    keeper: RetentionSweeper,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Orphaned uploads, and results of attempts that lost their job, are deleted. Objects of jobs,
    results of running attempts and foreign objects stay."""
    done = await finish(store, blobs)
    lost = await store_result(blobs, AttemptRef(done.id, 7))
    upload = await blobs.put(input_key(uuid4(), ImageType.JPEG), b"x", "image/jpeg")
    ghost = await store_result(blobs, AttemptRef(uuid4(), 1))
    running = await submit(store, blobs)
    claimed = await store.claim("w", 60, ["restore"])
    assert claimed is not None
    coming = await store_result(blobs, claimed.ref)
    foreign = await blobs.put(f"inputs/readme-{uuid4()}.txt", b"x", "text/plain")
    everything = [lost, upload, ghost, done.input, done.output, running.input, coming, foreign]

    await keeper.remove_orphans()
    assert all([await is_there(blobs, each) for each in everything])  # too young

    monkeypatch.setattr(sweeping, "ORPHANED_AFTER_S", -60)
    with capture_logs() as logs:
        await keeper.remove_orphans()
    there = [each for each in everything if await is_there(blobs, each)]
    assert there == [done.input, done.output, running.input, coming, foreign]
    [told] = logs
    assert told["event"] == "orphans_removed"
    assert told["inputs"] >= 1
    assert told["outputs"] >= 2

    await store.release(claimed.ref, FAILURE)
    await keeper.remove_orphans()
    assert not await is_there(blobs, coming)


@pytest.mark.retention
async def test_an_outage_in_the_middle_loses_track_of_nothing(
    database: Database, store: PostgresJobStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    """If S3 fails after a row was marked, the object becomes an orphan for the next sweep."""
    blobs = MemoryBlobStore()
    keeper = RetentionSweeper(Retention(database), blobs, LIFETIMES)
    job = await finish(store, blobs)
    await age(database, job, 31)
    blobs.down = True
    with pytest.raises(DependencyUnavailable):
        await keeper.remove_expired()
    blobs.down = False
    await keeper.remove_expired()
    monkeypatch.setattr(sweeping, "ORPHANED_AFTER_S", -60)
    await keeper.remove_orphans()
    assert blobs.objects == {}


@pytest.mark.uploads
async def test_uploads_that_nobody_uses_are_removed(
    blobs: AnyBlobs, keeper: RetentionSweeper, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Unused uploads are removed an hour after they were sent, and not before."""
    key = upload_key("ann", uuid4())
    await blobs.put(key, b"a photo", "image/png")
    await keeper.remove_orphans()
    assert await blobs.fetch(key, 100) == b"a photo"
    monkeypatch.setattr(sweeping, "UNUSED_AFTER_S", -60.0)
    await keeper.remove_orphans()
    assert await blobs.fetch(key, 100) is None


@pytest.mark.retention
async def test_sweeping_goes_on_whatever_happens(
    database: Database,
    store: PostgresJobStore,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Neither an outage nor a defect stops the sweeps for good."""
    monkeypatch.setattr(sweeping, "EXPIRY_EVERY_S", 0.01)
    blobs = MemoryBlobStore()
    keeper = RetentionSweeper(Retention(database), blobs, LIFETIMES)
    job = await finish(store, blobs)
    troubles: list[Exception] = [DependencyUnavailable("S3: away"), ZeroDivisionError()]
    delete_many = blobs.delete_many

    async def delete_with_trouble(keys: Any) -> None:
        if troubles:
            raise troubles.pop(0)
        await delete_many(keys)

    monkeypatch.setattr(blobs, "delete_many", delete_with_trouble)
    running = asyncio.create_task(keeper.run())
    await age(database, job, 91)
    await until(lambda: _is_gone(store, job))
    running.cancel()
    await asyncio.gather(running, return_exceptions=True)
    assert troubles == []


async def _is_gone(store: PostgresJobStore, job: Job) -> bool:
    try:
        await store.get(job.id)
    except JobNotFound:
        return True
    return False


@pytest.mark.webhooks
@pytest.mark.retention
async def test_the_process_does_both(
    database: Database,
    database_url: str,
    store: PostgresJobStore,
    blobs: AnyBlobs,
    s3: S3Access,
    redis_url: str,
) -> None:
    """With only settings, the process removes expired objects and sends webhooks."""
    settings = Settings.model_validate(
        {
            "database_url": database_url,
            "redis_url": redis_url,
            "s3_bucket": s3.bucket,
            "s3_endpoint_url": s3.endpoint_url,
            "s3_access_key": s3.access_key,
            "s3_secret_key": s3.secret_key,
            "webhook_secret": SECRET,
            "webhook_allow_http": True,
            "webhook_networks": "127.0.0.0/8",
        }
    )
    old = await finish(store, blobs)
    await age(database, old, 91)
    async with receiving() as receiver:
        working = asyncio.create_task(_work(settings))
        await finish(store, blobs, webhook_url=receiver.url())
        await receiver.wait_for(1)
        await until(lambda: _is_gone(store, old))
        working.cancel()
        await asyncio.gather(working, return_exceptions=True)
