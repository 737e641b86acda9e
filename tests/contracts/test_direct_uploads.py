"""The rules of the UploadStore port, on Postgres and in memory."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass
from typing import Any
from uuid import UUID, uuid4

import pytest

from actors.leader.retention import Lifetimes, RetentionSweeper
from persistence.objects.keys import upload_key
from persistence.postgres.database import Database
from persistence.postgres.jobs import PostgresJobStore
from persistence.postgres.retention import Retention
from persistence.postgres.uploads import PostgresUploadStore
from restoration.errors import IdempotencyConflict, QueueFull, StorageFull, UploadUsed
from restoration.jobs import Artifact
from restoration.limits.quotas import Quotas
from restoration.ports.objects import UploadStore
from tests.fakes.job_store import MemoryJobStore
from tests.fakes.stores import MemoryBlobStore
from tests.fakes.uploads import MemoryUploadStore
from tests.support.job_stores import JobStore
from tests.support.samples import new_job

LIFETIME_S = 60.0
STORED = Quotas(stored_bytes=100)


@dataclass
class Stores:
    uploads: UploadStore
    jobs: JobStore

    async def begin(
        self, size_bytes: int, quotas: Quotas | None = None, owner: str = "alice"
    ) -> UUID:
        upload_id = uuid4()
        await self.uploads.begin(upload_id, owner, size_bytes, LIFETIME_S, quotas)
        return upload_id


@pytest.fixture(params=["postgres", "memory"])
def stores(request: pytest.FixtureRequest) -> Stores:
    if request.param == "memory":
        memory = MemoryJobStore()
        return Stores(MemoryUploadStore(memory), memory)
    database = request.getfixturevalue("database")
    return Stores(PostgresUploadStore(database), PostgresJobStore(database))


def photo(size_bytes: int) -> Artifact:
    return Artifact(f"inputs/{uuid4()}.png", "0" * 64, size_bytes, "image/png")


async def test_what_was_announced_counts_as_stored(stores: Stores) -> None:
    await stores.begin(60, STORED)
    with pytest.raises(StorageFull) as caught:
        await stores.begin(41, STORED)
    assert caught.value.details["limit"] == 100
    with pytest.raises(StorageFull):
        await stores.jobs.insert(new_job(input=photo(41)), STORED)
    with pytest.raises(StorageFull):
        await stores.jobs.check_room("alice", STORED, 41)
    await stores.begin(40, STORED)
    await stores.begin(100, STORED, owner="bob")


async def test_what_was_refused_counts_no_more(stores: Stores) -> None:
    for _ in range(3):
        with pytest.raises(StorageFull):
            await stores.begin(101, STORED)
    await stores.begin(100, STORED)


async def test_an_upload_that_became_a_job_counts_once(stores: Stores) -> None:
    upload_id = await stores.begin(100, STORED)
    await stores.jobs.insert(new_job(id=upload_id, input=photo(90)), STORED)
    assert await stores.uploads.size_of(upload_id, "alice") is None
    with pytest.raises(StorageFull):
        await stores.begin(11, STORED)
    await stores.begin(10, STORED)


async def test_an_upload_becomes_one_job(stores: Stores) -> None:
    """The same insert is a repetition; one that differs is refused for the upload, not the key."""
    upload_id = await stores.begin(7)
    first = new_job(id=upload_id, request_digest="a")
    await stores.jobs.insert(first)
    assert not (await stores.jobs.insert(first))[1]
    for key in (None, "k"):
        other = new_job(id=upload_id, request_digest="b", idempotency_key=key)
        with pytest.raises(UploadUsed) as caught:
            await stores.jobs.insert(other)
        assert caught.value.details["job_id"] == str(upload_id)


async def test_a_key_used_again_for_its_upload_is_the_conflict_of_a_key(stores: Stores) -> None:
    upload_id = await stores.begin(7)
    await stores.jobs.insert(new_job(id=upload_id, request_digest="a", idempotency_key="k"))
    with pytest.raises(IdempotencyConflict):
        await stores.jobs.insert(new_job(id=upload_id, request_digest="b", idempotency_key="k"))


async def test_announced_bytes_have_a_limit_of_their_own(stores: Stores) -> None:
    quotas = Quotas(uploading_bytes=100)
    first = await stores.begin(60, quotas)
    with pytest.raises(StorageFull):
        await stores.begin(41, quotas)
    await stores.jobs.insert(new_job(id=first, input=photo(60)), quotas)
    await stores.begin(100, quotas)


async def test_no_link_is_given_for_a_job_that_would_have_no_room(stores: Stores) -> None:
    quotas = Quotas(waiting_jobs=1)
    await stores.jobs.insert(new_job(), quotas)
    with pytest.raises(QueueFull):
        await stores.begin(1, quotas)


async def test_an_upload_is_known_to_its_owner_only(stores: Stores) -> None:
    upload_id = await stores.begin(7)
    assert await stores.uploads.size_of(upload_id, "alice") == 7
    assert await stores.uploads.size_of(upload_id, "bob") is None
    assert await stores.uploads.size_of(uuid4(), "alice") is None


async def test_many_at_once_do_not_go_over_the_limit(database: Database) -> None:
    stores = Stores(PostgresUploadStore(database), PostgresJobStore(database))
    calls = [stores.begin(10, STORED) for _ in range(30)]
    results: list[Any] = await asyncio.gather(*calls, return_exceptions=True)
    refused = [result for result in results if isinstance(result, StorageFull)]
    assert (len(results), len(refused)) == (30, 20)


async def test_what_nobody_used_in_time_is_removed_and_counts_no_more(database: Database) -> None:
    store, blobs = PostgresUploadStore(database), MemoryBlobStore()
    lapsed, current = uuid4(), uuid4()
    await store.begin(lapsed, "alice", 60, -1.0, STORED)
    await store.begin(current, "alice", 40, LIFETIME_S, STORED)
    for upload_id in (lapsed, current):
        await blobs.put(upload_key("alice", upload_id), b"x", "image/png")
    sweeper = RetentionSweeper(Retention(database), blobs, Lifetimes(0, 0, 0))
    for _ in range(2):
        await sweeper.remove_expired()
    assert list(blobs.objects) == [upload_key("alice", current)]
    assert await store.size_of(lapsed, "alice") is None
    await store.begin(uuid4(), "alice", 60, LIFETIME_S, STORED)
