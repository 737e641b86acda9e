"""Quotas over HTTP: headers of answers, refusals, and the claims that change them."""

from __future__ import annotations

from typing import Any
from uuid import uuid4

import httpx
import pytest

from restoration.jobs import JobStatus
from serve_app.auth.tokens import QUOTAS_CLAIM
from tests.fakes.site import API, Site, open_site, photo, submission

BATCHES = "/api/v1/batches"


def _client(site: Site, **quotas: object) -> httpx.AsyncClient:
    """Return Ann's client, with a token that replaces these of her quotas."""
    client = site.client(None)
    client.headers["Authorization"] = f"Bearer {site.token('ann', claims={QUOTAS_CLAIM: quotas})}"
    return client


@pytest.mark.quotas
async def test_answers_tell_what_is_left() -> None:
    """Every answer to a request that counts has the headers of the draft."""
    async with open_site(max_requests_per_minute=10) as site, site.client() as client:
        accepted = await client.post(API, **submission())
        missing = await client.post(f"{API}/{uuid4()}/cancel")
    for answer, status, left in ((accepted, 202, 9), (missing, 404, 8)):
        assert answer.status_code == status
        assert answer.headers["ratelimit-policy"] == '"requests";q=10;w=60'
        assert answer.headers["ratelimit"].startswith(f'"requests";r={left};t=')


@pytest.mark.quotas
async def test_too_many_requests_are_refused() -> None:
    """429 before the body is read, with the time until the next is let in; others are served."""
    async with open_site(max_requests_per_minute=2) as site, site.client() as client:
        job_id = await site.submit()
        assert (await client.post(f"{API}/{job_id}/cancel")).status_code == 200
        refused = await client.post(API, **submission())
        async with site.client("bob") as bob:
            assert (await bob.post(API, **submission())).status_code == 202
    assert (refused.status_code, refused.json()["code"]) == (429, "rate_limited")
    assert 1 <= int(refused.headers["retry-after"]) <= 30
    assert refused.headers["ratelimit"].startswith('"requests";r=0;t=')
    assert len(site.jobs.rows) == 2


@pytest.mark.quotas
async def test_reads_are_never_refused() -> None:
    """A client that polls learns how its job ended, however much it has spent."""
    async with open_site(max_requests_per_minute=1) as site, site.client() as client:
        job_id = await site.submit()
        for path in (f"{API}/{job_id}", API, BATCHES, "/api/v1/workflows") * 3:
            answer = await client.get(path)
            assert answer.status_code == 200
            assert "ratelimit" not in answer.headers
    assert site.rates.asked == 1


@pytest.mark.quotas
async def test_without_redis_requests_are_let_in() -> None:
    """Losing the counts is not an outage; the answers then lack the headers."""
    async with open_site(max_requests_per_minute=1) as site, site.client() as client:
        site.rates.down = True
        for _ in range(3):
            answer = await client.post(API, **submission())
            assert answer.status_code == 202
            assert "ratelimit" not in answer.headers


@pytest.mark.quotas
async def test_one_question_a_request() -> None:
    """A request counts once, however many dependencies ask for the caller; it does not count
    without a limit or with a refused token."""
    async with open_site() as site, site.client() as client, site.client(None) as nobody:
        await client.post(API, **submission())
        assert site.rates.asked == 1
        await nobody.post(API, **submission())
        async with site.client(scopes=[]) as powerless:
            await powerless.post(API, **submission())
        async with _client(site, requests_per_minute=0) as unlimited:
            answer = await unlimited.post(API, **submission())
        assert (answer.status_code, "ratelimit" in answer.headers) == (202, False)
        assert site.rates.asked == 1


@pytest.mark.quotas
async def test_storage_that_is_full() -> None:
    """429 with the limit, single or in a batch; nothing of the refused upload is kept."""
    size_bytes = len(photo())
    async with open_site(max_stored_bytes_per_owner=2 * size_bytes) as site, site.client() as ann:
        assert (await ann.post(API, **submission())).status_code == 202
        images = [("image", (f"{n}.png", photo())) for n in range(2)]
        batch = await ann.post(BATCHES, files=images)
        assert (await ann.post(API, **submission())).status_code == 202
        single = await ann.post(API, **submission())
    for refused in (batch, single):
        assert (refused.status_code, refused.json()["code"]) == (429, "storage_full")
        assert refused.headers["retry-after"] == "3600"
        assert refused.json()["details"]["limit"] == 2 * size_bytes
    assert len(site.blobs.objects) == 2


@pytest.mark.quotas
@pytest.mark.parametrize(
    ("quotas", "code"),
    [
        ({"requests_per_minute": 1}, "rate_limited"),
        ({"waiting_jobs": 1}, "queue_full"),
        ({"stored_bytes": 1 + len(photo())}, "storage_full"),
    ],
)
async def test_a_token_may_say_less(quotas: dict[str, int], code: str) -> None:
    """Each claim replaces its own setting."""
    async with open_site() as site, _client(site, **quotas) as client:
        assert (await client.post(API, **submission())).status_code == 202
        refused = await client.post(API, **submission())
    assert (refused.status_code, refused.json()["code"]) == (429, code)


@pytest.mark.quotas
async def test_a_token_may_say_more() -> None:
    """A customer who pays for it is not held to the limits of others."""
    limits = {"max_requests_per_minute": 1, "max_waiting_per_owner": 1}
    more = {"requests_per_minute": 100, "waiting_jobs": 0}
    async with open_site(**limits) as site, _client(site, **more) as client:
        for _ in range(3):
            assert (await client.post(API, **submission())).status_code == 202


@pytest.mark.quotas
async def test_a_token_limits_what_runs() -> None:
    """The claim goes with the job into the store and limits its claims."""
    async with open_site() as site, _client(site, running_jobs=1) as client:
        for _ in range(2):
            await client.post(API, **submission())
        assert await site.jobs.claim("w", 60, ["restore"]) is not None
        assert await site.jobs.claim("w", 60, ["restore"]) is None


@pytest.mark.quotas
async def test_an_operators_quotas_are_not_the_owners() -> None:
    """An operator who sends another owner's job again is subject to the settings."""
    async with open_site() as site:
        job_id = await site.submit("ann")
        await site.jobs.request_cancel(job_id)
        token = site.token("root", ["admin"], claims={QUOTAS_CLAIM: {"waiting_jobs": 1}})
        await site.submit("ann")
        async with site.client(None) as admin:
            headers = {"Authorization": f"Bearer {token}"}
            answer = await admin.post(f"{API}/{job_id}/retry", headers=headers)
    assert answer.status_code == 202
    assert site.jobs.rows[job_id].status is JobStatus.CANCELLED


@pytest.mark.quotas
@pytest.mark.parametrize(
    "claim",
    [
        *(None, 5, "many", [], {"waiting_job": 1}, {"waiting_jobs": -1}, {"waiting_jobs": "1"}),
        *({"waiting_jobs": 1.5}, {"running_jobs": True}, {"stored_bytes": None}),
        *({"running_jobs": 2**40}, {"stored_bytes": 1e400}),
    ],
    ids=str,
)
async def test_a_claim_that_is_wrong_refuses_the_token(claim: Any) -> None:
    """An ignored claim could give its owner more than intended."""
    async with open_site() as site, site.client(None) as client:
        token = site.token("ann", claims={QUOTAS_CLAIM: claim})
        answer = await client.get(API, headers={"Authorization": f"Bearer {token}"})
    assert (answer.status_code, answer.json()["code"]) == (401, "unauthenticated")
    assert "quotas" in answer.json()["detail"]
