"""The queue as clients see it: refusals, limits, attempts, and sending a job again."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from uuid import UUID

import httpx
import pytest

from restoration.jobs import Failure, JobStatus
from tests.fakes.site import API, Site, open_site, submission
from tests.support.polling import until

FAILURE = Failure("engine_crashed", "the engine died")


@pytest.fixture
async def client(site: Site) -> AsyncIterator[httpx.AsyncClient]:
    async with site.client("ann") as client:
        yield client


async def _failed(site: Site, **fields: str) -> UUID:
    job_id = await site.submit("ann", **fields)
    await site.fail(await site.start(job_id))
    return job_id


@pytest.mark.retry
async def test_every_attempt_is_shown(site: Site, client: httpx.AsyncClient) -> None:
    """Each ended attempt has its outcome, times and reason, without its worker."""
    job = await site.start(await site.submit())
    await site.jobs.release(job.ref, FAILURE, delay_s=-60)
    await site.succeed(await site.start(job.id))
    answer = await client.get(f"{API}/{job.id}")
    shown = answer.json()["attempts"]
    assert [(a["attempt"], a["outcome"], a["code"], a["message"]) for a in shown] == [
        (1, "failed", FAILURE.code, FAILURE.message),
        (2, "succeeded", None, None),
    ]
    assert all(a["started_at"] <= a["ended_at"] for a in shown)
    assert "worker-1" not in answer.text


@pytest.mark.retry
async def test_a_failed_job_is_sent_again_as_a_new_one(
    site: Site, client: httpx.AsyncClient
) -> None:
    """202 with the new job's Location; it has the same options, and the old one stays failed."""
    job_id = await _failed(site, workflow="enlarge", output_format="webp", run_limit_s="9")
    answer = await client.post(f"{API}/{job_id}/retry")
    body = answer.json()
    assert (answer.status_code, body["status"], body["retry_of"]) == (202, "queued", str(job_id))
    assert answer.headers["location"] == f"{API}/{body['id']}" != f"{API}/{job_id}"
    old, new = site.jobs.rows[job_id], site.jobs.rows[UUID(body["id"])]
    assert (new.input, new.params, new.output_format) == (old.input, old.params, old.output_format)
    assert (new.workflow, new.options.run_limit_s) == ("enlarge", 9)
    assert new.queue_deadline_at - new.created_at == old.queue_deadline_at - old.created_at
    assert old.status is JobStatus.FAILED


@pytest.mark.retry
async def test_sending_again_twice_makes_one_job(site: Site, client: httpx.AsyncClient) -> None:
    """The second answer is 200 with the first one's job."""
    job_id = await _failed(site)
    first, again = [await client.post(f"{API}/{job_id}/retry") for _ in range(2)]
    assert (first.status_code, again.status_code) == (202, 200)
    assert first.json()["id"] == again.json()["id"]
    assert again.headers["idempotent-replayed"] == "true"


@pytest.mark.retry
async def test_a_cancelled_job_may_be_sent_again(site: Site, client: httpx.AsyncClient) -> None:
    job_id = await site.submit()
    await client.post(f"{API}/{job_id}/cancel")
    assert (await client.post(f"{API}/{job_id}/retry")).status_code == 202


@pytest.mark.retry
async def test_only_what_failed_is_sent_again(site: Site, client: httpx.AsyncClient) -> None:
    """409 for a job that waits, runs or succeeded; 404 for another owner's."""
    job_id = await site.submit()
    assert (await client.post(f"{API}/{job_id}/retry")).status_code == 409
    job = await site.start(job_id)
    assert (await client.post(f"{API}/{job_id}/retry")).status_code == 409
    await site.succeed(job)
    answer = await client.post(f"{API}/{job_id}/retry")
    assert (answer.status_code, answer.json()["code"]) == (409, "illegal_transition")
    async with site.client("bob") as bob:
        assert (await bob.post(f"{API}/{job_id}/retry")).status_code == 404
    assert len(site.jobs.rows) == 1


@pytest.mark.deadlines
async def test_a_request_may_ask_for_shorter_limits(site: Site, client: httpx.AsyncClient) -> None:
    """Both limits reach the job; without them the workflow's hold."""
    answer = await client.post(API, **submission(queue_limit_s="30", run_limit_s="2.5"))
    job = site.jobs.rows[UUID(answer.json()["id"])]
    assert (job.queue_deadline_at - job.created_at).total_seconds() == 30
    assert job.options.run_limit_s == 2.5
    usual = site.jobs.rows[await site.submit()]
    manifest = site.services.catalog.find("restore").manifest
    waits_s = (usual.queue_deadline_at - usual.created_at).total_seconds()
    assert (waits_s, usual.options.run_limit_s) == (manifest.queue_limit_s, None)


@pytest.mark.deadlines
@pytest.mark.parametrize(
    ("field", "value", "status"),
    [
        ("run_limit_s", "1e9", 400),
        ("queue_limit_s", "1e9", 400),
        ("run_limit_s", "0", 422),
        ("queue_limit_s", "-1", 422),
        ("queue_limit_s", "nan", 422),
        ("run_limit_s", "inf", 422),
        ("run_limit_s", "soon", 422),
    ],
)
async def test_and_for_no_longer_ones(site: Site, field: str, value: str, status: int) -> None:
    """A limit above the workflow's is refused, like one that is not a duration."""
    async with site.client() as client:
        answer = await client.post(API, **submission(**{field: value}))
    assert answer.status_code == status
    assert field in answer.json()["detail"]
    assert not site.jobs.rows


@pytest.mark.deadlines
async def test_another_limit_is_another_request(client: httpx.AsyncClient) -> None:
    """The same key with another limit is a conflict."""
    headers = {"Idempotency-Key": "k"}
    await client.post(API, **submission(run_limit_s="5"), headers=headers)
    answer = await client.post(API, **submission(run_limit_s="6"), headers=headers)
    assert (answer.status_code, answer.json()["code"]) == (409, "idempotency_conflict")


@pytest.mark.admission
async def test_a_full_queue_says_when_to_come_back() -> None:
    """429 with Retry-After before anything is stored; existing jobs are answered as usual."""
    async with open_site(max_waiting_per_owner=1) as site, site.client() as client:
        key = {"Idempotency-Key": "k"}
        first = await client.post(API, **submission(), headers=key)
        stored = dict(site.blobs.objects)
        answer = await client.post(API, **submission())
        assert (answer.status_code, answer.json()["code"]) == (429, "queue_full")
        assert int(answer.headers["retry-after"]) > 0
        assert site.blobs.objects == stored
        assert (await client.get(first.headers["location"])).status_code == 200
        replayed = await client.post(API, **submission(), headers=key)
        assert (replayed.status_code, replayed.json()["id"]) == (200, first.json()["id"])
        async with site.client("bob") as bob:
            assert (await bob.post(API, **submission())).status_code == 202


@pytest.mark.admission
async def test_a_queue_that_fills_up_meanwhile_keeps_no_upload(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A submission refused at the last moment removes its object again."""

    async def has_room(*_asked: object) -> None:
        """Return the answer of the first call."""

    async with open_site(max_waiting_jobs=1) as site, site.client() as client:
        await site.submit()
        monkeypatch.setattr(site.jobs, "check_room", has_room)
        answer = await client.post(API, **submission())
    assert answer.status_code == 429
    assert len(site.blobs.objects) == 1


@pytest.mark.admission
async def test_a_retry_needs_room_as_well() -> None:
    """Sending a job again is refused like any other submission."""
    async with open_site(max_waiting_jobs=1) as site, site.client() as client:
        job_id = await _failed(site)
        await site.submit()
        answer = await client.post(f"{API}/{job_id}/retry")
    assert (answer.status_code, "retry-after" in answer.headers) == (429, True)


@pytest.mark.admission
async def test_uploads_in_flight_have_a_limit() -> None:
    """One too many is refused before its body is read; the slot is freed with the first."""
    async with open_site(max_uploads_in_flight=1) as site, site.client() as client:
        reading, go_on = asyncio.Event(), asyncio.Event()
        request = client.build_request("POST", API, **submission())
        body = request.read()

        async def slowly() -> AsyncIterator[bytes]:
            reading.set()
            await go_on.wait()
            yield body

        async def never() -> AsyncIterator[bytes]:
            raise AssertionError("the body of a refused upload was read")
            yield b""

        headers = {"Content-Type": request.headers["content-type"]}
        async with asyncio.timeout(300), asyncio.TaskGroup() as group:
            first = group.create_task(client.post(API, content=slowly(), headers=headers))
            await reading.wait()
            refused = await client.post(API, content=never(), headers=headers)
            go_on.set()
        assert (refused.status_code, refused.json()["code"]) == (429, "too_many_uploads")
        assert int(refused.headers["retry-after"]) > 0
        assert first.result().status_code == 202
        assert (await client.post(API, **submission())).status_code == 202


@pytest.mark.admission
async def test_neither_a_bad_upload_nor_a_waiting_client_keeps_a_slot() -> None:
    """The slot is given back when the upload fails, and before its job is waited for."""
    async with open_site(max_uploads_in_flight=1) as site, site.client() as client:
        for _ in range(2):
            assert (await client.post(API, **submission(params="{"))).status_code == 422
        waits = {"Prefer": "wait=30"}
        async with asyncio.timeout(300), asyncio.TaskGroup() as group:
            first = group.create_task(client.post(API, **submission(), headers=waits))
            await until(lambda: site.jobs.rows)
            await asyncio.sleep(0)
            job_id = next(iter(site.jobs.rows))
            second = await client.post(API, **submission())
            await site.succeed(await site.start(job_id))
        assert (first.result().status_code, second.status_code) == (200, 202)
