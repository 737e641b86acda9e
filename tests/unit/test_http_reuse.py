"""Point 4 over HTTP: the requests that get reuse, and their answers."""

from __future__ import annotations

import json
from typing import Any

import httpx
import pytest

from restoration.jobs import JobStatus
from serve_app.auth.scopes import USER_SCOPES, Scope
from tests.fakes.site import API, Site, photo, submission
from tests.unit.test_graphs import graph, scale

BATCHES = "/api/v1/batches"


async def _finish(site: Site, **fields: str) -> str:
    job_id = await site.submit(**fields)
    await site.succeed(await site.start(job_id))
    return str(job_id)


async def _post(site: Site, sub: str = "ann", **fields: str) -> httpx.Response:
    async with site.client(sub) as client:
        return await client.post(API, **submission(**fields))


@pytest.mark.reuse
async def test_the_answer_says_whose_result_it_is(site: Site) -> None:
    """200 with the ended job; it can be fetched, listed and watched like any other."""
    earlier = await _finish(site)
    answer = await _post(site, reuse="allow")
    body = answer.json()
    assert (answer.status_code, body["status"], body["attempt"]) == (200, "succeeded", 0)
    assert body["reused_from"] == earlier != body["id"]
    assert "idempotent-replayed" not in answer.headers
    async with site.client() as client:
        result = await client.get(body["links"]["result"], params={"download": 1})
        assert (result.status_code, result.content) == (200, b"restored")
        assert (await client.get(answer.headers["location"])).json() == body
        events = await client.get(body["links"]["events"])
        assert '"succeeded"' in events.text
        listed = (await client.get(API)).json()["restorations"]
    assert [job["id"] for job in listed] == [body["id"], earlier]


@pytest.mark.reuse
async def test_waiting_for_it_takes_no_time(site: Site) -> None:
    """With `Prefer: wait` the answer is the same."""
    await _finish(site)
    async with site.client() as client:
        asked = submission(reuse="allow")
        answer = await client.post(API, **asked, headers={"Prefer": "wait=60"})
    assert (answer.status_code, answer.json()["status"]) == (200, "succeeded")
    assert answer.headers["preference-applied"] == "wait=60"


@pytest.mark.reuse
@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"reuse": "never"},
        {"reuse": "allow", "params": '{"strength": 0.1}'},
        {"reuse": "allow", "workflow": "enlarge"},
        {"reuse": "allow", "output_format": "webp"},
        {"reuse": "allow", "keep_metadata": "true"},
        {"reuse": "allow", "sub": "bob"},
    ],
    ids=lambda fields: ", ".join(fields) or "nothing",
)
async def test_another_job_is_executed(site: Site, fields: dict[str, Any]) -> None:
    """202 without a request for reuse, with other options, or for another owner."""
    await _finish(site)
    answer = await _post(site, **fields)
    assert (answer.status_code, answer.json()["status"]) == (202, "queued")
    assert answer.json()["reused_from"] is None


@pytest.mark.reuse
async def test_what_reuse_may_be_is_stated(site: Site) -> None:
    """Any other word is malformed."""
    answer = await _post(site, reuse="maybe")
    assert (answer.status_code, answer.json()["code"]) == (422, "malformed_request")


@pytest.mark.reuse
async def test_batches_reuse_unless_told_otherwise(site: Site) -> None:
    """Photos restored before succeed at once, the others wait; with `never` all of them wait."""
    earlier = await _finish(site)
    files = [("image", ("a.png", photo())), ("image", ("b.png", photo((9, 9))))]
    async with site.client() as client:
        batch = (await client.post(BATCHES, files=files)).json()
        again = (await client.post(BATCHES, files=files, data={"reuse": "never"})).json()
    assert [item["status"] for item in batch["items"]] == ["succeeded", "queued"]
    assert (batch["counts"]["succeeded"], batch["counts"]["queued"]) == (1, 1)
    reused = [job for job in site.jobs.rows.values() if job.reused_from]
    assert [str(job.reused_from) for job in reused] == [earlier]
    assert again["counts"]["queued"] == 2


@pytest.mark.reuse
async def test_a_batch_that_was_done_before_has_ended(site: Site) -> None:
    """Its answer and its events say so, though no worker was involved."""
    await _finish(site)
    async with site.client() as client:
        batch = (await client.post(BATCHES, files=[("image", ("a.png", photo()))])).json()
        events = await client.get(batch["links"]["events"])
    assert batch["status"] == "succeeded"
    assert events.text.count("event: progress") == 1
    assert site.jobs.rows[next(reversed(site.jobs.rows))].status is JobStatus.SUCCEEDED


@pytest.mark.reuse
async def test_a_graph_of_ones_own_counts_as_its_work(site: Site) -> None:
    """This needs the same graph, seeds and other numbers included, on the same photo."""
    asked = submission(graph=json.dumps(graph(scale(2))))
    async with site.client("ann", (*USER_SCOPES, Scope.RUN)) as client:
        first = await client.post("/api/v1/runs", **asked)
        assert first.status_code == 202, first.text
        job = await site.jobs.claim("worker-1", 60, ["custom"])
        assert job is not None
        await site.succeed(job)
        asked["data"]["reuse"] = "allow"
        again = await client.post("/api/v1/runs", **asked)
    assert (again.status_code, again.json()["reused_from"]) == (200, str(job.id))
