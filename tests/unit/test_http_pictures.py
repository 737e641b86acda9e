"""A submission answered with the picture itself, for clients that accept it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any
from uuid import UUID

import httpx
import pytest

from serve_app.auth.scopes import USER_SCOPES, Scope
from serve_app.routes.preferences import prefers
from tests.fakes.site import API, Site, submission

PICTURE = "image/*"


async def _post(
    site: Site, accept: str, scopes: Sequence[str] = USER_SCOPES, **fields: str
) -> httpx.Response:
    """Return the answer to a submission that waits as long as allowed."""
    headers = {"Accept": accept, "Prefer": "wait=60"}
    async with site.client(scopes=scopes) as client:
        return await client.post(API, **submission(reuse="allow", **fields), headers=headers)


async def _have_one_already(site: Site, **fields: str) -> None:
    """Create a result that answers the same submission at once."""
    await site.succeed(await site.start(await site.submit(**fields)))


@pytest.mark.results
@pytest.mark.parametrize("output_format", ["png", "jpeg", "webp"])
async def test_who_accepts_pictures_has_the_result_in_the_answer(
    site: Site, output_format: str
) -> None:
    """It matches `?download=1`, with its type and file name; the headers name the job."""
    await _have_one_already(site, output_format=output_format)
    answer = await _post(site, PICTURE, output_format=output_format)
    assert (answer.status_code, answer.content) == (200, b"restored")
    assert answer.headers["content-type"] == f"image/{output_format}"
    assert answer.headers["preference-applied"] == "wait=60"
    job_url = answer.headers["location"]
    async with site.client() as client:
        again = await client.get(f"{job_url}/result", params={"download": 1})
    for name in ("content-type", "content-disposition", "etag", "cache-control"):
        assert answer.headers[name] == again.headers[name]


@pytest.mark.results
@pytest.mark.parametrize("accept", ["*/*", "application/json", "image/webp", "text/html"])
async def test_others_have_the_job(site: Site, accept: str) -> None:
    """They get JSON if they do not prefer the result's type."""
    await _have_one_already(site)
    answer = await _post(site, accept)
    assert (answer.status_code, answer.json()["status"]) == (200, "succeeded")


@pytest.mark.results
async def test_a_job_that_goes_on_is_no_picture_yet(site: Site) -> None:
    """202 with the job, as without the header, so the client knows where to look."""
    async with site.client() as client:
        headers = {"Accept": PICTURE, "Prefer": "wait=0"}
        answer = await client.post(API, **submission(), headers=headers)
    assert (answer.status_code, answer.json()["status"]) == (202, "queued")


@pytest.mark.results
async def test_a_job_that_failed_is_no_picture_at_all(site: Site) -> None:
    """409, as for its result, with the job's id, so clients do not save an error as a picture."""
    job_id, headers = await _submit(site, "k-1")
    await site.fail(await site.start(job_id))
    async with site.client() as client:
        answer = await client.post(API, **submission(), headers=headers)
    body: dict[str, Any] = answer.json()
    assert (answer.status_code, body["code"]) == (409, "result_not_ready")
    assert body["details"] == {"status": "failed", "job_id": str(job_id)}


async def _submit(site: Site, key: str) -> tuple[UUID, dict[str, str]]:
    """Submit a job, and return the headers that make another request the same."""
    headers = {"Idempotency-Key": key, "Accept": PICTURE}
    async with site.client() as client:
        answer = await client.post(API, **submission(), headers=headers)
    return UUID(answer.json()["id"]), headers


@pytest.mark.results
async def test_only_readers_have_the_picture(site: Site) -> None:
    """A token that may submit but not read gets the job as JSON."""
    await _have_one_already(site)
    answer = await _post(site, PICTURE, scopes=[Scope.WRITE])
    assert (answer.status_code, answer.json()["status"]) == (200, "succeeded")


@pytest.mark.results
async def test_without_s3_the_job_is_there_all_the_same(site: Site) -> None:
    """With a 503 the photo would be submitted again."""
    job_id, headers = await _submit(site, "k-1")
    await site.succeed(await site.start(job_id))
    async with site.client() as client:
        site.blobs.down = True
        answer = await client.post(API, **submission(), headers=headers)
    assert (answer.status_code, answer.json()["status"]) == (200, "succeeded")


@pytest.mark.results
@pytest.mark.parametrize(
    ("accept", "preferred"),
    [
        ([], False),
        (["image/*"], True),
        (["IMAGE/PNG"], True),
        (["application/json", "image/png"], False),
        (["application/json;q=0.5, image/*"], True),
        (["application/json", "image/*;q=0.5"], False),
        (["*/*;q=0.1, image/png"], True),
        (["*/*"], False),
        (["image/*, image/png;q=0"], False),
        (["image/*;q=2"], False),
        (["image", "", ",,"], False),
    ],
)
def test_the_accept_header(accept: list[str], preferred: bool) -> None:
    """RFC 9110: the most specific range counts, and equal ones give no preference."""
    assert prefers("image/png", "application/json", accept) is preferred
