"""POST /api/v1/uploads, and jobs made from uploads."""

from __future__ import annotations

import asyncio
from typing import Any
from uuid import UUID, uuid4

import pytest

from persistence.objects.keys import UPLOADS, upload_key
from restoration.jobs import JobStatus
from restoration.ports.objects import NewUpload, UploadLink
from tests.fakes.site import API, Site, open_site, photo

UPLOADS_API = "/api/v1/uploads"
GOOD = {"content_type": "image/png", "size_bytes": 1000}


async def uploaded(site: Site, data: bytes, owner: str = "ann") -> str:
    """Return the id of an upload that has been sent."""
    async with site.client(owner) as client:
        body = (await client.post(UPLOADS_API, json=GOOD)).json()
    await site.blobs.put(upload_key(owner, UUID(body["id"])), data, "image/png")
    return str(body["id"])


def form(upload_id: str, **fields: str) -> dict[str, Any]:
    """Return a multipart form without a file."""
    return {"files": {name: (None, value) for name, value in fields.items()} | _id(upload_id)}


def _id(upload_id: str) -> dict[str, Any]:
    return {"upload_id": (None, upload_id)}


def stored(site: Site) -> list[str]:
    return [key for key in site.blobs.objects if key.startswith(UPLOADS)]


@pytest.mark.uploads
async def test_an_upload_says_where_and_how(site: Site) -> None:
    """201 with the id and everything that a client needs to send the photo directly."""
    async with site.client() as client:
        answer = await client.post(UPLOADS_API, json={**GOOD, "sha256": "0" * 64})
    body = answer.json()
    assert (answer.status_code, body["method"]) == (201, "PUT")
    assert body["url"].endswith(upload_key("ann", UUID(body["id"])))
    assert body["headers"] == {"Content-Type": "image/png"}
    assert answer.headers["cache-control"] == "no-store"


@pytest.mark.uploads
@pytest.mark.parametrize(
    ("changes", "status", "code"),
    [
        ({"size_bytes": 50 * 2**20 + 1}, 413, "image_too_large"),
        ({"size_bytes": 0}, 422, "malformed_request"),
        ({"size_bytes": -1}, 422, "malformed_request"),
        ({"content_type": "text/html"}, 422, "malformed_request"),
        ({"content_type": "image/svg+xml"}, 422, "malformed_request"),
        ({"sha256": "0"}, 422, "malformed_request"),
        ({"key": "outputs/x"}, 422, "malformed_request"),
    ],
)
async def test_what_could_not_be_a_photo_gets_no_link(
    site: Site, changes: dict[str, object], status: int, code: str
) -> None:
    """Oversize, other types and an attempt to set the key are refused before anything is signed."""
    async with site.client() as client:
        answer = await client.post(UPLOADS_API, json=GOOD | changes)
    assert (answer.status_code, answer.json()["code"]) == (status, code)


@pytest.mark.parametrize(
    ("asked", "taken"),
    [
        ({"content_type": "image/jpg"}, "image/jpeg"),
        ({"content_type": "IMAGE/JPEG"}, "image/jpeg"),
        ({"content_type": "image/pjpeg"}, "image/jpeg"),
        ({"content_type": "image/png; charset=binary"}, "image/png"),
        ({"content_type": "image/x-ms-bmp"}, "image/bmp"),
        ({"content_type": "image/heif"}, "image/heic"),
        ({"content_type": "image/tif"}, "image/tiff"),
        ({"sha256": "9F86D0" + "a" * 58}, "image/png"),
        ({"sha256": "9f86d0" + "A" * 58 + "\n"}, "image/png"),
        ({"size_bytes": "1000"}, "image/png"),
    ],
    ids=str,
)
async def test_a_direct_upload_takes_what_tools_call_a_type_and_a_digest(
    site: Site, monkeypatch: pytest.MonkeyPatch, asked: dict[str, str], taken: str
) -> None:
    """The link uses the registered type and the digest in lower case, as S3 requires."""
    signed: list[NewUpload] = []
    sign = site.blobs.upload_link

    async def upload_link(key: str, upload: NewUpload, lifetime_s: int) -> UploadLink:
        signed.append(upload)
        return await sign(key, upload, lifetime_s)

    monkeypatch.setattr(site.blobs, "upload_link", upload_link)
    async with site.client() as client:
        answer = await client.post(UPLOADS_API, json=GOOD | asked)
    assert answer.status_code == 201, answer.text
    sha256 = asked["sha256"].strip().lower() if "sha256" in asked else None
    assert signed == [NewUpload(taken, 1000, sha256)]


@pytest.mark.parametrize("content", [b'{"content_type": "image/png", "size_bytes": 9}', b"[]"])
async def test_a_body_that_is_not_sent_as_json_is_told_how(site: Site, content: bytes) -> None:
    """`curl -d` sends such a body without a header for the type."""
    headers = {"Content-Type": "application/x-www-form-urlencoded"}
    async with site.client() as client:
        answer = await client.post(UPLOADS_API, content=content, headers=headers)
    assert answer.status_code == 422
    assert "sent with Content-Type: application/json" in answer.json()["detail"]


@pytest.mark.uploads
@pytest.mark.parametrize("body", [b"{", b'"\xff', b"[]"], ids=["cut", "no text", "no object"])
async def test_a_stranger_is_not_told_what_is_wrong(site: Site, body: bytes) -> None:
    """The token is checked before the body."""
    async with site.client() as client:
        headers = {"Content-Type": "application/json", "Authorization": "Bearer none"}
        assert (await client.post(UPLOADS_API, content=body, headers=headers)).status_code == 401
        del headers["Authorization"]
        known = await client.post(UPLOADS_API, content=body, headers=headers)
    assert known.status_code in {400, 422}


@pytest.mark.uploads
async def test_a_large_body_is_not_read(site: Site) -> None:
    """The request only describes an upload."""
    async with site.client() as client:
        long = await client.post(UPLOADS_API, content=b" " * 20_000)
        nested = await client.post(UPLOADS_API, content=b"[" * 10_000)
    assert (long.status_code, long.json()["code"]) == (400, "bad_request")
    assert (nested.status_code, nested.json()["code"]) == (422, "malformed_request")


@pytest.mark.uploads
async def test_an_upload_becomes_a_job(site: Site) -> None:
    """Like a photo in the form, its object becomes the job's input, and the upload is gone."""
    upload_id = await uploaded(site, photo())
    async with site.client() as client:
        answer = await client.post(API, **form(upload_id, workflow="enlarge"))
    job = site.jobs.rows[UUID(answer.json()["id"])]
    assert (answer.status_code, job.status, job.workflow) == (202, JobStatus.QUEUED, "enlarge")
    assert site.blobs.objects[job.input.key] == photo()
    assert stored(site) == []


@pytest.mark.uploads
async def test_an_upload_is_checked_like_any_other(site: Site) -> None:
    """A non-picture gets the same answer as in the form, and nothing is recorded."""
    for data, status, code in (
        (b"", 400, "invalid_request"),
        (b"GIF89a", 415, "unsupported_image"),
        (photo((64, 64), "JPEG")[:200], 422, "broken_image"),
        (photo((17_000, 1)), 413, "image_too_large"),
        (b"\x89PNG\r\n\x1a\n" + bytes(50 * 2**20), 413, "image_too_large"),
    ):
        upload_id = await uploaded(site, data)
        async with site.client() as client:
            answer = await client.post(API, **form(upload_id))
        assert (answer.status_code, answer.json()["code"]) == (status, code)
    assert site.jobs.rows == {}


@pytest.mark.uploads
async def test_somebody_elses_upload_does_not_exist(site: Site) -> None:
    """It gets the same 404 as an unknown id and an upload that was never sent."""
    anns = await uploaded(site, photo(), "ann")
    async with site.client("bob") as bob:
        empty = (await bob.post(UPLOADS_API, json=GOOD)).json()["id"]
        answers = [await bob.post(API, **form(each)) for each in (anns, str(uuid4()), empty)]
    assert [answer.status_code for answer in answers] == [404] * 3
    assert len({answer.json()["detail"] for answer in answers}) == 1
    assert {answer.json()["code"] for answer in answers} == {"upload_not_found"}
    assert len(stored(site)) == 1
    assert site.jobs.rows == {}


@pytest.mark.uploads
async def test_an_upload_is_used_once(site: Site) -> None:
    """The same request again is answered with the same job, another one with a conflict."""
    upload_id = await uploaded(site, photo())
    async with site.client() as client:
        first = await client.post(API, **form(upload_id))
        again = await client.post(API, **form(upload_id))
        other = await client.post(API, **form(upload_id, workflow="enlarge"))
    assert (again.status_code, again.json()["id"]) == (200, first.json()["id"])
    assert again.headers["idempotent-replayed"] == "true"
    assert (other.status_code, other.json()["code"]) == (409, "upload_used")
    assert len(site.jobs.rows) == 1


@pytest.mark.uploads
async def test_a_race_for_an_upload_has_one_winner(site: Site) -> None:
    """However many requests use it at once, there is one job, and its input stays."""
    upload_id = await uploaded(site, photo())
    async with site.client() as client:
        answers = await asyncio.gather(
            *(client.post(API, **form(upload_id, workflow=w)) for w in ["restore", "enlarge"] * 5)
        )
    assert {answer.status_code for answer in answers} <= {200, 202, 409}
    (job,) = site.jobs.rows.values()
    assert site.blobs.objects == {job.input.key: photo()}


@pytest.mark.uploads
async def test_a_full_queue_keeps_the_upload() -> None:
    """After a 429 the photo need not be sent again."""
    async with open_site(max_waiting_per_owner=1) as site:
        upload_id = await uploaded(site, photo())
        await site.submit()
        async with site.client() as client:
            answer = await client.post(API, **form(upload_id))
            assert (answer.status_code, answer.json()["code"]) == (429, "queue_full")
            assert len(stored(site)) == 1
            assert (await client.post(UPLOADS_API, json=GOOD)).status_code == 429


@pytest.mark.uploads
async def test_an_owner_without_room_gets_no_link() -> None:
    """An upload's declared size counts against the bytes that its owner may store."""
    async with open_site(max_stored_bytes_per_owner=1000) as site, site.client() as client:
        assert (await client.post(UPLOADS_API, json=GOOD)).status_code == 201
        answer = await client.post(UPLOADS_API, json=GOOD | {"size_bytes": 1001})
    assert (answer.status_code, answer.json()["code"]) == (429, "storage_full")


@pytest.mark.uploads
@pytest.mark.parametrize(
    "parts",
    [
        {"image": ("a.png", photo()), **_id(str(uuid4()))},
        {"upload_id": (None, "not-an-id")},
        {"upload_id": (None, "../inputs/x")},
        {"upload_id": ("file", b"x")},
    ],
    ids=["both", "no id", "a path", "a file"],
)
async def test_a_form_has_a_photo_or_an_upload(site: Site, parts: dict[str, Any]) -> None:
    """Exactly one of the two is required, and an id must be a UUID, so it cannot carry a key."""
    async with site.client() as client:
        answer = await client.post(API, files=parts)
    assert (answer.status_code, answer.json()["code"]) == (422, "malformed_request")


@pytest.mark.uploads
async def test_a_batch_takes_no_upload(site: Site) -> None:
    """A batch's photos are sent as files."""
    async with site.client() as client:
        parts = {"upload_id": (None, str(uuid4()).encode()), "image": ("a.png", photo())}
        answer = await client.post("/api/v1/batches", files=parts)
    assert (answer.status_code, answer.json()["code"]) == (422, "malformed_request")
