"""Listing, showing, cancelling and fetching jobs, the workflows, and health."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Any
from uuid import uuid4

import httpx
import pytest
from jsonschema import Draft202012Validator

from restoration.events import Progressed
from restoration.jobs import JobStatus
from serve_app.routes import views
from tests.fakes.site import API, Site


@pytest.fixture
async def client(site: Site) -> AsyncIterator[httpx.AsyncClient]:
    async with site.client("ann") as client:
        yield client


async def test_pages_cover_everything_once_newest_first(
    site: Site, client: httpx.AsyncClient
) -> None:
    """Following `next` from page to page shows each job of the caller once."""
    ids = [str(await site.submit()) for _ in range(5)]
    await site.submit("bob")
    seen, path = [], f"{API}?limit=2&status=queued&status=running"
    while path:
        page = (await client.get(path)).json()
        assert len(page["restorations"]) <= 2
        seen += [shown["id"] for shown in page["restorations"]]
        path = page["next"]
    assert seen == ids[::-1]


async def test_a_listing_can_be_filtered_by_states(site: Site, client: httpx.AsyncClient) -> None:
    """`status` may be repeated; only jobs in one of the states are shown."""
    done, running, _queued = [await site.submit() for _ in range(3)]
    await site.succeed(await site.start(done))
    await site.start(running)
    page = (await client.get(f"{API}?status=succeeded&status=running")).json()
    assert {shown["id"] for shown in page["restorations"]} == {str(done), str(running)}


@pytest.mark.parametrize(
    ("method", "suffix"), [("GET", ""), ("GET", "/events"), ("GET", "/result"), ("POST", "/cancel")]
)
async def test_somebody_elses_job_does_not_exist(site: Site, method: str, suffix: str) -> None:
    """Bob's answer for Ann's job is identical to that for no job."""
    anns, nobodys = await site.submit("ann"), uuid4()
    async with site.client("bob") as bob:
        headers = {"X-Request-Id": "same"}
        answers = [
            await bob.request(method, f"{API}/{job_id}{suffix}", headers=headers)
            for job_id in (anns, nobodys)
        ]
    assert [answer.status_code for answer in answers] == [404, 404]
    assert answers[0].text.replace(str(anns), "") == answers[1].text.replace(str(nobodys), "")
    assert site.jobs.rows[anns].status is JobStatus.QUEUED


async def test_a_running_job_shows_its_progress(site: Site, client: httpx.AsyncClient) -> None:
    """The newest progress of the running attempt is part of the job."""
    job = await site.start(await site.submit())
    await site.board.publish([(job.id, Progressed(f, "KSampler", 1)) for f in (0.2, 0.4)])
    shown = (await client.get(f"{API}/{job.id}")).json()
    assert shown["progress"] == {"fraction": 0.4, "stage": "KSampler", "attempt": 1}


async def test_progress_of_an_attempt_that_is_over_is_not_shown(
    site: Site, client: httpx.AsyncClient
) -> None:
    """Progress reported by a lost attempt does not apply to the one that runs now."""
    job = await site.start(await site.submit())
    await site.board.publish([(job.id, Progressed(0.9, "late", job.attempt))])
    await site.jobs.release(job.ref, None)
    await site.start(job.id)
    assert (await client.get(f"{API}/{job.id}")).json()["progress"] is None


async def test_without_a_board_a_job_is_shown_without_progress(
    site: Site, client: httpx.AsyncClient
) -> None:
    """Losing Redis costs only the progress."""
    job = await site.start(await site.submit())
    site.board.down = True
    answer = await client.get(f"{API}/{job.id}")
    assert (answer.status_code, answer.json()["progress"]) == (200, None)


async def test_a_board_that_hangs_costs_a_moment(
    site: Site, client: httpx.AsyncClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A Redis that does not answer is not waited for."""

    async def hang(_ids: object) -> None:
        await asyncio.Event().wait()

    monkeypatch.setattr(site.board, "latest", hang)
    monkeypatch.setattr(views, "PROGRESS_TIMEOUT_S", 0.01)
    job = await site.start(await site.submit())
    async with asyncio.timeout(10):
        assert (await client.get(f"{API}/{job.id}")).status_code == 200


async def test_cancelling_a_job_that_waits_ends_it(site: Site, client: httpx.AsyncClient) -> None:
    """200: it is cancelled; a second time changes nothing."""
    job_id = await site.submit()
    answers = [await client.post(f"{API}/{job_id}/cancel") for _ in range(2)]
    assert [answer.status_code for answer in answers] == [200, 200]
    assert {answer.json()["status"] for answer in answers} == {"cancelled"}


async def test_cancelling_a_job_that_runs_is_a_request(
    site: Site, client: httpx.AsyncClient
) -> None:
    """202: the engine stops at its next boundary."""
    job = await site.start(await site.submit())
    answer = await client.post(f"{API}/{job.id}/cancel")
    assert (answer.status_code, answer.json()["status"]) == (202, "cancelling")


async def test_a_result_is_where_the_signed_url_says(site: Site, client: httpx.AsyncClient) -> None:
    """The redirect expires as configured and may not be cached."""
    job = await site.start(await site.submit())
    output = await site.succeed(job)
    answer = await client.get(f"{API}/{job.id}/result")
    assert answer.status_code == 307
    assert answer.headers["location"] == await site.blobs.signed_url(
        output, f"restored-{job.id}.png", site.services.settings.result_url_lifetime_s
    )
    assert answer.headers["cache-control"] == "no-store"


async def test_a_result_can_be_had_as_bytes(site: Site, client: httpx.AsyncClient) -> None:
    """`download=1` answers with the picture itself, as an attachment of the right type."""
    job = await site.start(await site.submit(output_format="jpeg"))
    output = await site.succeed(job, b"restored")
    answer = await client.get(f"{API}/{job.id}/result?download=1")
    assert (answer.status_code, answer.content) == (200, b"restored")
    assert answer.headers["content-type"] == "image/jpeg"
    assert answer.headers["content-disposition"] == f'attachment; filename="restored-{job.id}.jpg"'
    assert answer.headers["etag"] == f'"{output.sha256}"'


async def test_a_damaged_result_is_not_handed_out(site: Site, client: httpx.AsyncClient) -> None:
    """Bytes that differ from the row's sha256 are an internal error, not a result."""
    job = await site.start(await site.submit())
    output = await site.succeed(job, b"restored")
    site.blobs.objects[output.key] = b"rotten"
    answer = await client.get(f"{API}/{job.id}/result?download=1")
    assert (answer.status_code, answer.json()["code"]) == (500, "artifact_corrupt")
    assert output.key not in answer.text


@pytest.mark.parametrize("ending", ["queued", "failed", "cancelled"])
async def test_without_a_result_the_answer_says_how_the_job_stands(
    site: Site, client: httpx.AsyncClient, ending: str
) -> None:
    """409 until there is a result, or always if there will be none; the details say which."""
    job_id = await site.submit()
    if ending == "failed":
        await site.fail(await site.start(job_id))
    elif ending == "cancelled":
        await site.jobs.request_cancel(job_id)
    answer = await client.get(f"{API}/{job_id}/result")
    assert (answer.status_code, answer.json()["code"]) == (409, "result_not_ready")
    assert answer.json()["details"]["status"] == ending


async def test_a_failed_job_says_why(site: Site, client: httpx.AsyncClient) -> None:
    """The job has the stable code and the message of its failure."""
    job_id = await site.submit()
    await site.fail(await site.start(job_id))
    shown = (await client.get(f"{API}/{job_id}")).json()
    assert shown["failure"] == {"code": "engine_failed", "message": "a node raised"}


async def test_a_workflow_publishes_what_it_takes(site: Site, client: httpx.AsyncClient) -> None:
    """The schema is valid JSON Schema, and its own defaults satisfy it."""
    listed = (await client.get("/api/v1/workflows")).json()["workflows"]
    assert {shown["name"] for shown in listed} == {w.name for w in site.services.catalog}
    for shown in listed:
        assert (await client.get(f"/api/v1/workflows/{shown['name']}")).json() == shown
        Draft202012Validator.check_schema(shown["parameters"])
        defaults = site.services.catalog.find(shown["name"]).resolve({})
        Draft202012Validator(shown["parameters"]).validate(defaults)


async def test_health_needs_no_token_and_no_dependency(site: Site) -> None:
    """/healthz answers as long as the process does."""
    site.jobs.down = site.blobs.down = site.board.down = True
    async with site.client(sub=None) as client:
        answer = await client.get("/healthz")
    assert (answer.status_code, answer.json()) == (200, {"status": "ok"})


@pytest.mark.parametrize(
    ("broken", "status", "verdict"),
    [
        (None, 200, "ok"),
        ("redis", 200, "degraded"),
        ("postgres", 503, "unavailable"),
        ("s3", 503, "unavailable"),
    ],
)
async def test_readiness_names_each_dependency(
    site: Site, broken: str | None, status: int, verdict: str
) -> None:
    """A failed dependency is named without its address; only best-effort ones may be down."""
    stores: dict[str, Any] = {"postgres": site.jobs, "s3": site.blobs, "redis": site.board}
    if broken:
        stores[broken].down = True
    async with site.client(sub=None) as client:
        answer = await client.get("/readyz")
    body = answer.json()
    assert (answer.status_code, body["status"]) == (status, verdict)
    assert body["dependencies"] == {
        name: "error" if name == broken else "ok" for name in (*stores, "issuer")
    }
    assert "internal" not in answer.text
