"""Bytes of uploads in a replica's memory: limited in total and for each owner."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass

import httpx
import pytest

from actors.submission.batches import BatchSubmission, Photo
from actors.submission.requests import SubmissionRequest
from actors.submission.service import Submission
from restoration.errors import InvalidSettings
from restoration.images import UploadLimits
from restoration.settings import load_settings
from restoration.tasks import stop
from tests.fakes.batches import MemoryBatchStore
from tests.fakes.job_store import MemoryJobStore
from tests.fakes.site import API, open_site, submission
from tests.fakes.stores import MemoryBlobStore
from tests.support.polling import until
from workflows.catalog import load_catalog

BATCHES = "/api/v1/batches"
MULTIPART = {"Content-Type": "multipart/form-data; boundary=b"}
PHOTO_BYTES = 1000  # the limit of one owner
# a lone owner may have as much in flight as is left
LIMITS = {"upload_max_bytes": PHOTO_BYTES, "max_upload_bytes_in_flight": 10 * PHOTO_BYTES}


@dataclass
class Greedy:
    """Requests that declare their length, and then send nothing until they are released."""

    go_on: asyncio.Event
    running: asyncio.TaskGroup

    async def begin(self, client: httpx.AsyncClient, path: str, declared: int) -> None:
        begun = asyncio.Event()

        async def body() -> AsyncIterator[bytes]:
            begun.set()
            await self.go_on.wait()
            yield b"--b--"

        headers = MULTIPART | {"Content-Length": str(declared)}
        request = client.build_request("POST", path, content=body(), headers=headers)
        self.running.create_task(client.send(request))
        await begun.wait()


@asynccontextmanager
async def greedy() -> AsyncIterator[Greedy]:
    go_on = asyncio.Event()
    async with asyncio.timeout(30), asyncio.TaskGroup() as group:
        yield Greedy(go_on, group)
        go_on.set()


async def refused(client: httpx.AsyncClient, path: str, declared: int) -> bool:
    """Return whether a request is refused before its body is read."""

    async def never() -> AsyncIterator[bytes]:
        yield b"--b--"

    headers = MULTIPART | {"Content-Length": str(declared)}
    answer = await client.post(path, content=never(), headers=headers)
    if answer.status_code != 429:
        return False
    assert answer.json()["code"] == "too_many_uploads"
    assert answer.headers["retry-after"] == "2"
    return True


@pytest.mark.parametrize(
    ("path", "declared", "counted"),
    [
        (API, PHOTO_BYTES, PHOTO_BYTES),
        (BATCHES, 250 * PHOTO_BYTES, 2 * PHOTO_BYTES),
        (BATCHES, 300, 300),
    ],
)
async def test_an_owner_gets_as_much_as_is_left(path: str, declared: int, counted: int) -> None:
    async with open_site(**LIMITS) as site, site.client() as client, greedy() as ann:
        free, taken = 10 * PHOTO_BYTES, 0
        while taken + counted <= free - counted:
            await ann.begin(client, path, declared)
            taken, free = taken + counted, free - counted
        assert await refused(client, path, declared)


@pytest.mark.parametrize(("path", "counted"), [(API, PHOTO_BYTES), (BATCHES, 2 * PHOTO_BYTES)])
async def test_a_body_without_a_length_counts_as_it_arrives(path: str, counted: int) -> None:
    """It counts only the bytes received; one that finds no room is refused midway."""

    async def endless() -> AsyncIterator[bytes]:
        yield b'--b\r\nContent-Disposition: form-data; name="image"; filename="a"\r\n\r\n'
        for _ in range(2 * counted // 100):
            yield bytes(100)
        begun.set()
        await asyncio.Event().wait()

    async with open_site(**LIMITS) as site, site.client() as client:
        sending = []
        free, taken = 10 * PHOTO_BYTES, 0
        while taken + counted <= free - counted:
            begun = asyncio.Event()
            request = client.build_request("POST", path, content=endless(), headers=MULTIPART)
            sending.append(asyncio.ensure_future(client.send(request)))
            async with asyncio.timeout(30):
                await begun.wait()
            taken, free = taken + counted, free - counted
        answer = await client.post(path, content=endless(), headers=MULTIPART)
        assert (answer.status_code, answer.json()["code"]) == (429, "too_many_uploads")
        await stop(*sending)
        assert (await client.post(API, **submission())).status_code == 202


async def test_two_greedy_owners_leave_room_for_a_third() -> None:
    async with open_site(**LIMITS) as site, site.client() as client, greedy() as both:
        for owner, batches in (("ann", 2), ("bob", 1)):
            client.headers["Authorization"] = f"Bearer {site.token(owner)}"
            for _ in range(batches):
                await both.begin(client, BATCHES, 250 * PHOTO_BYTES)
            assert await refused(client, BATCHES, 250 * PHOTO_BYTES)
        client.headers["Authorization"] = f"Bearer {site.token('cis')}"
        assert (await client.post(API, **submission())).status_code == 202


async def test_what_was_stored_is_counted_no_more() -> None:
    """Refused and broken uploads are not counted any more either."""
    async with open_site(**LIMITS) as site, site.client() as client:
        for _ in range(12):
            assert (await client.post(API, **submission())).status_code == 202
            assert (await client.post(API, **submission(params="{"))).status_code == 422
            async with greedy() as cut:
                await cut.begin(client, API, PHOTO_BYTES)


async def test_an_answer_is_waited_for_without_a_share() -> None:
    async with open_site(**LIMITS) as site, site.client() as client:
        waits = {"Prefer": "wait=30"}
        async with asyncio.timeout(30), asyncio.TaskGroup() as group:
            for sent in range(1, 13):
                group.create_task(client.post(API, **submission(), headers=waits))
                await until(lambda sent=sent: len(site.jobs.rows) == sent)  # type: ignore[misc]
            for job_id in list(site.jobs.rows):
                await site.jobs.request_cancel(job_id)


async def test_a_photo_that_was_uploaded_directly_counts_with_its_size() -> None:
    """The request that names it is small, but causes the fetch of the whole photo."""
    async with open_site(**LIMITS) as site, site.client() as client, greedy() as ann:
        upload = await client.post(
            "/api/v1/uploads", json={"content_type": "image/png", "size_bytes": PHOTO_BYTES}
        )
        for _ in range(5):
            await ann.begin(client, API, PHOTO_BYTES)
        form = {"upload_id": (None, upload.json()["id"])}
        answer = await client.post(API, files=form)
        assert (answer.status_code, answer.json()["code"]) == (429, "too_many_uploads")


class Held:
    """An examiner that holds every photo until the test has checked."""

    async def examine(self, data: bytes) -> None:
        await asyncio.Event().wait()


@pytest.mark.parametrize(("size_bytes", "taken"), [(1000, 2), (500, 3), (10, 5)])
async def test_a_batch_takes_no_photo_before_there_is_room_for_it(
    size_bytes: int, taken: int
) -> None:
    """The photos being checked reach at most the largest photo's size, plus the next one held."""
    jobs, given = MemoryJobStore(), 0
    limits = UploadLimits(max_bytes=PHOTO_BYTES)
    submission = Submission(load_catalog(), jobs, MemoryBlobStore(), Held(), limits)  # type: ignore[arg-type]

    async def photos() -> AsyncIterator[Photo]:
        nonlocal given
        while True:
            given += 1
            yield Photo("a", bytes(size_bytes), "")

    request = SubmissionRequest("ann", b"", workflow="restore")
    batches = BatchSubmission(submission, MemoryBatchStore(jobs))
    working = asyncio.ensure_future(batches.submit(request, photos(), lambda: request))
    for _ in range(200):
        await asyncio.sleep(0)
    assert given == taken
    await stop(working)


def test_less_than_a_batch_needs_is_no_setting() -> None:
    environ = {
        "DATABASE_URL": "postgresql://u:p@h/d",
        "REDIS_URL": "redis://h",
        "S3_BUCKET": "b",
        "UPLOAD_MAX_BYTES": "1000",
    }
    with pytest.raises(InvalidSettings, match="MAX_UPLOAD_BYTES_IN_FLIGHT"):
        load_settings(environ | {"MAX_UPLOAD_BYTES_IN_FLIGHT": "3999"})
    assert load_settings(environ).upload_bytes_in_flight == 10_000
