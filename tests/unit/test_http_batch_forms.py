"""Point 12 over HTTP: the form of a batch, its limits, and cleanup after a broken one."""

from __future__ import annotations

import json
import os
import resource
import time
import tracemalloc
from collections.abc import AsyncIterator
from typing import Any
from uuid import UUID

import httpx
import pytest
from starlette.types import Message, Receive, Scope, Send

from actors.submission.batches import IN_FLIGHT
from restoration.images import MEBIBYTE
from restoration.jobs import Artifact
from serve_app.app import build_asgi_app
from serve_app.forms.batch_form import BATCH_OVERHEAD_BYTES
from tests.fakes.batch_forms import BATCHES, BROKEN, IMAGE, MULTIPART, files, form_part, submit
from tests.fakes.site import Site, open_site, photo


@pytest.mark.batches
@pytest.mark.parametrize(
    ("fields", "status", "code"),
    [
        ({"workflow": "nope"}, 404, "unknown_workflow"),
        ({"params": "{"}, 422, "malformed_request"),
        ({"params": '{"strength": 7}'}, 422, "invalid_parameters"),
        ({"output_format": "gif"}, 422, "malformed_request"),
        ({"workflw": "restore"}, 422, "malformed_request"),
        ({"workflow": ["restore", "enlarge"]}, 422, "malformed_request"),
        ({"image": "x"}, 422, "malformed_request"),
        ({"params": json.dumps({"x": "y" * 70_000})}, 422, "malformed_request"),
        ({name: "x" for name in "abcdefgh"}, 422, "malformed_request"),
    ],
)
async def test_a_request_that_is_wrong_as_a_whole(
    site: Site, fields: dict[str, Any], status: int, code: str
) -> None:
    """An error that concerns every photo refuses them all, and nothing is stored."""
    async with site.client() as client:
        answer = await client.post(BATCHES, files=files(photo(), photo()), data=fields)
    assert (answer.status_code, answer.json()["code"]) == (status, code)
    assert (site.jobs.rows, site.blobs.objects, site.batches.rows) == ({}, {}, {})


@pytest.mark.batches
@pytest.mark.parametrize(
    ("body", "status", "code"),
    [
        ({"json": {"image": "x"}}, 415, "unsupported_media_type"),
        ({"content": b"?", "headers": {"Content-Type": "multipart/form-data"}}, 400, "bad_request"),
        ({"content": b"?", "headers": MULTIPART}, 400, "bad_request"),
        ({"content": b"", "headers": MULTIPART}, 400, "bad_request"),
        ({"content": IMAGE, "headers": MULTIPART}, 400, "bad_request"),
        ({"content": IMAGE + IMAGE[:90], "headers": MULTIPART}, 400, "bad_request"),
        ({"content": b"--b--\r\n", "headers": MULTIPART}, 400, "invalid_request"),
        (
            {"content": form_part("workflow", b"restore") + b"--b--\r\n", "headers": MULTIPART},
            400,
            "invalid_request",
        ),
        (
            {"content": IMAGE + form_part("workflow", b"x") + b"--b--", "headers": MULTIPART},
            404,
            "unknown_workflow",
        ),
        ({"files": {"photo": ("p", b"x")}}, 422, "malformed_request"),
        (
            {"content": IMAGE + form_part("", b"x", "p") + b"--b--", "headers": MULTIPART},
            422,
            "malformed_request",
        ),
    ],
    ids=[
        "json",
        "no boundary",
        "garbage",
        "nothing",
        "no end",
        "cut",
        "no part",
        "no photo",
        "wrong field after photo",
        "other name",
        "no name",
    ],
)
async def test_a_body_that_is_no_batch(
    site: Site, body: dict[str, Any], status: int, code: str
) -> None:
    """Any other body is a client error and leaves nothing stored."""
    async with site.client() as client:
        answer = await client.post(BATCHES, **body)
    assert (answer.status_code, answer.json()["code"]) == (status, code)
    assert (site.jobs.rows, site.blobs.objects, site.batches.rows) == ({}, {}, {})


@pytest.mark.batches
async def test_a_form_may_arrive_in_any_pieces(site: Site) -> None:
    """Photos are reassembled correctly wherever the network cuts the body."""
    body = (
        form_part("workflow", b"enlarge")
        + IMAGE
        + form_part("image", BROKEN, "ü.jpg")
        + b"--b--\r\n"
    )

    async def pieces() -> AsyncIterator[bytes]:
        for at in range(0, len(body), 7):
            yield body[at : at + 7]

    async with site.client() as client:
        answer = await client.post(BATCHES, content=pieces(), headers=MULTIPART)
    good, bad = answer.json()["items"]
    assert (good["name"], bad["name"], bad["status"]) == ("a.png", "ü.jpg", "refused")
    job = site.jobs.rows[UUID(good["job_id"])]
    assert (job.workflow, site.blobs.objects[job.input.key]) == ("enlarge", photo())


@pytest.mark.batches
async def test_no_more_than_a_thousand(site: Site) -> None:
    """One photo too many refuses the batch, and its stored photos are removed."""
    image = photo((1, 1), "BMP")
    async with site.client() as client:
        answer = await client.post(BATCHES, files=files(*[image] * 1001))
    assert (answer.status_code, answer.json()["code"]) == (413, "batch_too_large")
    assert (site.jobs.rows, site.blobs.objects) == ({}, {})


@pytest.mark.batches
async def test_no_more_bytes_than_allowed() -> None:
    """A batch has a limit of its own, above that of an upload, and is cut off after it."""
    sent = 0

    async def endless() -> AsyncIterator[bytes]:
        nonlocal sent
        while sent < 100:
            sent += 1
            yield form_part("image", b"\xff\xd8\xff" + bytes(BATCH_OVERHEAD_BYTES), "p.jpg")

    async with (
        open_site(upload_max_bytes=1000, batch_max_bytes=2 * BATCH_OVERHEAD_BYTES) as site,
        site.client() as client,
    ):
        answer = await client.post(BATCHES, content=endless(), headers=MULTIPART)
    assert (answer.status_code, answer.json()["code"]) == (413, "batch_too_large")
    assert sent == 3


@pytest.mark.batches
async def test_nobody_is_asked_for_a_batch_before_a_token(site: Site) -> None:
    """An upload without a token is refused without reading it."""

    async def never() -> AsyncIterator[bytes]:
        pytest.fail("the body was read")
        yield b""

    async with site.client(sub=None) as client:
        answer = await client.post(BATCHES, content=never(), headers=MULTIPART)
    assert answer.status_code == 401


@pytest.mark.batches
async def test_photos_are_not_held_in_memory(site: Site, monkeypatch: Any) -> None:
    """However large the batch, only the photos being checked are in memory."""
    at_once = most = 0
    store = site.services.submission.store_photo

    async def watched(*arguments: Any) -> Any:
        nonlocal at_once, most
        at_once += 1
        most = max(most, at_once)
        try:
            return await store(*arguments)
        finally:
            at_once -= 1

    async def put(key: str, data: bytes, content_type: str) -> Artifact:
        return Artifact(key, "0" * 64, len(data), content_type)  # a store that keeps no bytes here

    size, count = 2 * MEBIBYTE, 60
    padded = photo() + bytes(size)

    async def body() -> AsyncIterator[bytes]:
        for index in range(count):
            part = form_part("image", padded, f"{index}.png")
            for at in range(0, len(part), 65536):
                yield part[at : at + 65536]
        yield b"--b--\r\n"

    monkeypatch.setattr(site.services.submission, "store_photo", watched)
    monkeypatch.setattr(site.blobs, "put", put)
    tracemalloc.start()
    try:
        async with site.client() as client:
            answer = await client.post(BATCHES, content=body(), headers=MULTIPART)
        peak_bytes = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert answer.json()["counts"]["queued"] == count
    assert most <= IN_FLIGHT
    # those in flight, the waiting one, the arriving one, and the test's own
    assert peak_bytes < (2 * IN_FLIGHT + 4) * size < count * size


@pytest.mark.batches
async def test_a_thousand_photos(site: Site) -> None:
    """The largest batch is accepted in order, within bounds of time and of open files."""
    image = photo((2, 2))
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    highest = max(int(name) for name in os.listdir("/proc/self/fd"))
    resource.setrlimit(resource.RLIMIT_NOFILE, (highest + 100, hard))  # not one file per photo
    started = time.monotonic()
    try:
        batch = await submit(site, *[image if index % 100 else b"?" for index in range(1000)])
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    assert time.monotonic() - started < 600
    assert (batch["counts"]["queued"], batch["counts"]["refused"]) == (990, 10)
    assert [item["index"] for item in batch["items"]] == list(range(1000))
    async with site.client() as client:
        paths, seen = [f"{batch['links']['items']}?limit=400"], []
        while (path := paths[-1]) is not None:
            page = (await client.get(path)).json()
            seen += page["items"]
            paths.append(page["next"])
    assert (len(paths), seen) == (4, batch["items"])


@pytest.mark.batches
async def test_a_photo_in_trouble_takes_its_batch_back(
    site: Site, monkeypatch: pytest.MonkeyPatch
) -> None:
    """When S3 fails half way, the photos stored by then are removed again."""
    put, stored = site.blobs.put, 0

    async def put_some(key: str, data: bytes, content_type: str) -> Artifact:
        nonlocal stored
        stored += 1
        site.blobs.down = stored == 6
        try:
            return await put(key, data, content_type)
        finally:
            site.blobs.down = False

    monkeypatch.setattr(site.blobs, "put", put_some)
    async with site.client() as client:
        answer = await client.post(BATCHES, files=files(*[photo()] * 10))
    assert answer.status_code == 503
    assert (site.jobs.rows, site.blobs.objects) == ({}, {})


@pytest.mark.batches
async def test_a_client_that_goes_away_leaves_nothing(site: Site) -> None:
    """A connection that breaks while photos arrive removes the whole batch."""
    app, arrived = build_asgi_app(site.services), [IMAGE * 3, IMAGE * 3]

    async def receive() -> Message:
        if arrived:
            return {"type": "http.request", "body": arrived.pop(), "more_body": True}
        return {"type": "http.disconnect"}

    async def broken(scope: Scope, _receive: Receive, send: Send) -> None:
        await app(scope, receive, send)

    headers = {"Authorization": f"Bearer {site.token()}"}
    transport = httpx.ASGITransport(broken)
    async with httpx.AsyncClient(transport=transport, base_url="http://api.test") as client:
        await client.post(BATCHES, content=b"", headers=headers | MULTIPART)
    assert arrived == []
    assert (site.jobs.rows, site.blobs.objects, site.batches.rows) == ({}, {}, {})
