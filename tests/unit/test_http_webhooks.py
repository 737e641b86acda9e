"""Webhooks and expired results, as callers of the HTTP API see them."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator
from dataclasses import replace
from uuid import UUID

import pytest

from restoration.webhooks.messages import Delivery, DeliveryStatus, payload
from tests.fakes.receiver import SECRET
from tests.fakes.site import API, Site, open_site, submission
from tests.fakes.stores import utc_now

URL = "https://example.com/hook?token=1"


@pytest.fixture
async def site() -> AsyncIterator[Site]:
    async with open_site(webhook_secret=SECRET) as site:
        yield site


@pytest.mark.webhooks
async def test_who_asks_for_a_webhook_sees_how_it_stands(site: Site) -> None:
    """Pending until the end and while it is tried, then delivered or dead; in listings as well."""
    async with site.client() as client:
        body = (await client.post(API, **submission(webhook_url=URL))).json()
        waits = {"url": URL, "status": "pending", "tries": 0}
        waits |= {"last_error": None, "next_try_at": None}
        assert body["webhook"] == waits
        job = await site.start(UUID(body["id"]))
        assert job.options.webhook_url == URL
        await site.succeed(job)
        due = (await client.get(f"{API}/{job.id}")).json()["webhook"]
        assert due["status"] == "pending"
        assert due["next_try_at"] is not None
        site.jobs.outbox[job.id] = Delivery(DeliveryStatus.DEAD, 7, "HTTP 500")
        [listed] = (await client.get(API)).json()["restorations"]
    assert listed["webhook"] == waits | {"status": "dead", "tries": 7, "last_error": "HTTP 500"}


@pytest.mark.webhooks
async def test_the_links_of_a_webhook_are_the_apis_own(site: Site) -> None:
    """The links sent to a receiver are those of the API."""
    job_id = await site.submit(webhook_url=URL)
    await site.succeed(await site.start(job_id))
    async with site.client() as client:
        shown = (await client.get(f"{API}/{job_id}")).json()
    told = json.loads(payload(site.jobs.rows[job_id]))["data"]
    assert told["links"] == {name: shown["links"][name] for name in ("self", "result")}
    assert {name: shown[name] for name in ("id", "status", "failure")} == {
        name: told[name] for name in ("id", "status", "failure")
    }


@pytest.mark.webhooks
async def test_no_webhook_unless_asked_for(site: Site) -> None:
    async with site.client() as client:
        assert (await client.post(API, **submission())).json()["webhook"] is None


@pytest.mark.webhooks
@pytest.mark.parametrize(
    ("values", "url", "reason"),
    [
        ({}, URL, "has no WEBHOOK_SECRET"),
        ({"webhook_secret": SECRET}, "http://example.com/", "must start with https"),
        ({"webhook_secret": SECRET}, "https://127.0.0.1/", "must have a public address"),
        ({"webhook_secret": SECRET}, "nonsense", "must be a URL like"),
    ],
)
async def test_a_webhook_that_cannot_be_sent_is_refused(
    values: dict[str, object], url: str, reason: str
) -> None:
    """422 with the reason, and nothing is stored."""
    async with open_site(**values) as site, site.client() as client:
        answer = await client.post(API, **submission(webhook_url=url))
    assert (answer.status_code, answer.json()["code"]) == (422, "invalid_webhook")
    assert reason in answer.json()["detail"]
    assert (site.jobs.rows, site.blobs.objects) == ({}, {})


@pytest.mark.webhooks
async def test_another_webhook_is_another_request(site: Site) -> None:
    """One Idempotency-Key allows one webhook address."""
    headers = {"Idempotency-Key": "k"}
    async with site.client() as client:
        await client.post(API, **submission(webhook_url=URL), headers=headers)
        other = await client.post(API, **submission(webhook_url=URL + "2"), headers=headers)
    assert (other.status_code, other.json()["code"]) == (409, "idempotency_conflict")


@pytest.mark.retention
@pytest.mark.parametrize("query", ["", "?download=1"])
async def test_an_expired_result_is_gone(site: Site, query: str) -> None:
    """410 `result_expired`, and the job shows since when."""
    job_id = await site.submit()
    await site.succeed(await site.start(job_id))
    expired_at = utc_now()
    site.jobs.rows[job_id] = replace(site.jobs.rows[job_id], output_expired_at=expired_at)
    async with site.client() as client:
        answer = await client.get(f"{API}/{job_id}/result{query}")
        shown = (await client.get(f"{API}/{job_id}")).json()
    assert (answer.status_code, answer.json()["code"]) == (410, "result_expired")
    assert shown["output_expired_at"] == expired_at.isoformat().replace("+00:00", "Z")
    assert shown["status"] == "succeeded"
