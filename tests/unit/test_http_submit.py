"""POST /api/v1/restorations."""

from __future__ import annotations

import asyncio
import json
from typing import Any
from uuid import UUID

import pytest

from restoration.events import StateChanged
from restoration.jobs import Job, JobStatus, NewJob, OutputFormat, Priority
from serve_app.routes.preferences import MAX_WAIT_S, preferred_wait_s
from tests.fakes.site import API, Site, open_site, photo, submission


async def test_a_photo_is_accepted(site: Site) -> None:
    """202: the photo is stored, the job belongs to the token's owner, and links lead on."""
    async with site.client("ann") as client:
        answer = await client.post(
            API,
            **submission(
                workflow="enlarge",
                params=json.dumps({"strength": 0.5}),
                output_format="webp",
                priority="batch",
            ),
        )
    body = answer.json()
    job = site.jobs.rows[UUID(body["id"])]
    assert (answer.status_code, body["status"]) == (202, "queued")
    assert answer.headers["location"] == body["links"]["self"] == f"{API}/{job.id}"
    assert set(body["links"]) == {"self", "events", "cancel", "retry", "result"}
    assert (job.owner, job.workflow, job.params["strength"]) == ("ann", "enlarge", 0.5)
    assert (job.output_format, job.options.priority) == (OutputFormat.WEBP, Priority.BATCH)
    assert site.blobs.objects[job.input.key] == photo()


async def test_only_the_image_is_needed(site: Site) -> None:
    """All other fields have defaults, which the job shows."""
    async with site.client() as client:
        body = (await client.post(API, **submission())).json()
    assert (body["workflow"], body["output_format"], body["priority"]) == (
        "restore",
        "png",
        "interactive",
    )
    assert body["params"] == site.services.catalog.find("restore").resolve({})


async def test_nothing_internal_is_shown(site: Site) -> None:
    """Neither S3 keys nor the owner's or the worker's names reach a client."""
    job_id = await site.submit()
    await site.start(job_id)
    async with site.client() as client:
        text = (await client.get(f"{API}/{job_id}")).text
    job = site.jobs.rows[job_id]
    assert job.input.key not in text
    assert "worker-1" not in text


@pytest.mark.parametrize(
    ("fields", "status", "code"),
    [
        ({"workflow": "nope"}, 404, "unknown_workflow"),
        ({"params": "{"}, 422, "malformed_request"),
        ({"params": "[1]"}, 422, "malformed_request"),
        ({"params": '{"strength": 7}'}, 422, "invalid_parameters"),
        ({"params": '{"strength": NaN}'}, 422, "invalid_parameters"),
        ({"output_format": "gif"}, 422, "malformed_request"),
        ({"priority": "now"}, 422, "malformed_request"),
        ({"workflw": "restore"}, 422, "malformed_request"),
    ],
)
async def test_a_form_that_asks_for_nonsense(
    site: Site, fields: dict[str, str], status: int, code: str
) -> None:
    """Each wrong field is refused with its own kind of code, and nothing is stored."""
    async with site.client() as client:
        answer = await client.post(API, **submission(**fields))
    assert (answer.status_code, answer.json()["code"]) == (status, code)
    assert (site.jobs.rows, site.blobs.objects) == ({}, {})


@pytest.mark.parametrize(
    ("image", "status", "code"),
    [
        (b"", 400, "invalid_request"),
        (b"GIF89a", 415, "unsupported_image"),
        (photo((64, 64), "JPEG")[:200], 422, "broken_image"),
        (b"\x89PNG\r\n\x1a\n" + bytes(10_000), 413, "image_too_large"),
    ],
)
async def test_an_image_that_cannot_be_used(image: bytes, status: int, code: str) -> None:
    """The status distinguishes wrong type, broken content and too much content."""
    async with open_site(upload_max_bytes=5000) as site, site.client() as client:
        answer = await client.post(API, files={"image": ("photo.png", image, "image/png")})
    assert (answer.status_code, answer.json()["code"]) == (status, code)


_FORM, _NOT_TAKEN = "multipart/form-data; boundary=b", "unsupported_media_type"
_FORM_IN = {
    "content": b'--b\r\nContent-Disposition: form-data; name="workflow"\r\n\r\n\\\r\n--b--\r\n'
}


@pytest.mark.parametrize(
    ("body", "status", "code"),
    [
        ({"json": {"image": "x"}}, 415, "unsupported_media_type"),
        ({"data": {"image": "x"}}, 415, "unsupported_media_type"),
        (_FORM_IN | {"headers": {"Content-Type": _FORM + "; charset=undefined"}}, 415, _NOT_TAKEN),
        (_FORM_IN | {"headers": {"Content-Type": _FORM + "; charset=punycode"}}, 415, _NOT_TAKEN),
        ({"files": {"image": (None, b"x")}}, 422, "malformed_request"),
        ({"files": {"photo": ("p", b"x")}}, 422, "malformed_request"),
        ({"files": [("image", ("a", b"x")), ("image", ("b", b"x"))]}, 422, "malformed_request"),
        (
            {"files": {"image": ("p", photo())}, "data": {"workflow": ["restore", "enlarge"]}},
            422,
            "malformed_request",
        ),
        (
            {"content": b"?", "headers": {"Content-Type": "multipart/form-data; boundary=b"}},
            400,
            "bad_request",
        ),
        (
            {"content": b"?", "headers": {"Content-Type": "multipart/form-data"}},
            400,
            "bad_request",
        ),
    ],
    ids=[
        "json",
        "urlencoded",
        "no codec",
        "a slow codec",
        "text",
        "no image",
        "two images",
        "twice",
        "garbage",
        "no boundary",
    ],
)
async def test_a_body_that_is_no_form(
    site: Site, body: dict[str, Any], status: int, code: str
) -> None:
    """Any other body is refused as a client error, without a crash."""
    async with site.client() as client:
        answer = await client.post(API, **body)
    assert (answer.status_code, answer.json()["code"]) == (status, code)


async def test_repeating_a_request_makes_no_second_job(site: Site) -> None:
    """The same Idempotency-Key and request: 200 with the first job, marked as a repetition."""
    headers = {"Idempotency-Key": "k-1"}
    async with site.client() as client:
        first = await client.post(API, **submission(), headers=headers)
        again = await client.post(API, **submission(), headers=headers)
    assert (first.status_code, again.status_code) == (202, 200)
    assert "idempotent-replayed" not in first.headers
    assert again.headers["idempotent-replayed"] == "true"
    assert again.json()["id"] == first.json()["id"]
    assert again.headers["location"] == first.headers["location"]
    assert len(site.jobs.rows) == 1


async def test_a_key_means_one_request(site: Site) -> None:
    """The same key with another request is a conflict; another owner's key is another key."""
    headers = {"Idempotency-Key": "k-1"}
    async with site.client("ann") as ann, site.client("bob") as bob:
        await ann.post(API, **submission(), headers=headers)
        other = await ann.post(API, **submission(workflow="enlarge"), headers=headers)
        bobs = await bob.post(API, **submission(workflow="enlarge"), headers=headers)
    assert (other.status_code, other.json()["code"]) == (409, "idempotency_conflict")
    assert bobs.status_code == 202


async def test_an_overlong_key_is_refused(site: Site) -> None:
    """A key has at most 255 characters."""
    async with site.client() as client:
        answer = await client.post(API, **submission(), headers={"Idempotency-Key": "k" * 256})
    assert (answer.status_code, answer.json()["code"]) == (422, "malformed_request")


async def test_who_would_rather_wait_gets_the_finished_job(
    site: Site, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`Prefer: wait` is answered with 200 as soon as the job has ended."""
    insert, working = site.jobs.insert, asyncio.TaskGroup()

    async def work(job_id: UUID) -> None:
        job = await site.start(job_id)
        await site.succeed(job)
        await site.board.publish([(job.id, StateChanged(JobStatus.SUCCEEDED, job.attempt))])

    async def insert_and_work(job: NewJob, *quotas: Any) -> tuple[Job, bool]:
        recorded = await insert(job, *quotas)
        working.create_task(work(job.id))
        return recorded

    monkeypatch.setattr(site.jobs, "insert", insert_and_work)
    async with site.client() as client, working:
        answer = await client.post(API, **submission(), headers={"Prefer": "wait=30"})
    assert (answer.status_code, answer.json()["status"]) == (200, "succeeded")
    assert answer.headers["preference-applied"] == "wait=30"


async def test_waiting_ends_when_the_client_said(site: Site) -> None:
    """A job that has not ended in time is answered with 202, as without waiting."""
    async with site.client() as client:
        answer = await client.post(API, **submission(), headers={"Prefer": "wait=0"})
    assert (answer.status_code, answer.json()["status"]) == (202, "queued")
    assert answer.headers["preference-applied"] == "wait=0"


async def test_an_outage_while_waiting_does_not_undo_a_job(
    site: Site, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Once the job is recorded the answer is a success, even if the row cannot be read again."""
    insert = site.jobs.insert

    async def insert_and_go_down(job: NewJob, *quotas: Any) -> tuple[Job, bool]:
        recorded = await insert(job, *quotas)
        site.jobs.down = site.board.down = True
        return recorded

    monkeypatch.setattr(site.jobs, "insert", insert_and_go_down)
    async with site.client() as client:
        answer = await client.post(API, **submission(), headers={"Prefer": "wait=0"})
    assert (answer.status_code, answer.json()["status"]) == (202, "queued")


@pytest.mark.parametrize(
    ("headers", "wait_s"),
    [
        ([], None),
        (["respond-async"], None),
        (["wait=5"], 5),
        (['respond-async, WAIT = "7" ; x=1'], 7),
        (["handling=lenient", "wait=3"], 3),
        (["wait=1, wait=2"], 1),
        (["wait=100000"], MAX_WAIT_S),
        (["wait=-1"], None),
        (["wait=1.5"], None),
        (["wait=", "waiting=4"], None),
    ],
)
def test_the_prefer_header(headers: list[str], wait_s: int | None) -> None:
    """RFC 7240: unknown preferences are ignored, and waiting has a bound."""
    assert preferred_wait_s(headers) == wait_s
