"""Point 12 over HTTP: /api/v1/batches."""

from __future__ import annotations

import asyncio
import json
import os
import resource
import time
import tracemalloc
from collections.abc import AsyncIterator
from contextlib import aclosing
from typing import Any
from uuid import UUID

import httpx
import pytest
from starlette.types import Message, Receive, Scope, Send

from actors.batch_submission import IN_FLIGHT
from restoration.batches import JobBatch
from restoration.images import MEBIBYTE
from restoration.jobs import Artifact, Job, JobStatus, OutputFormat, Priority
from serve_app.app import build_asgi_app
from serve_app.routes import events
from serve_app.routes.batch_form import BATCH_OVERHEAD_BYTES
from serve_app.sse import Decoder, encode_comment
from tests.fakes.site import API, Site, open_site, photo

BATCHES = "/api/v1/batches"
BROKEN = photo((64, 64), "JPEG")[:200]
DEADLINE_S = 20
MULTIPART = {"Content-Type": "multipart/form-data; boundary=b"}


@pytest.fixture
async def site() -> AsyncIterator[Site]:
    async with open_site() as site:
        yield site


def files(*images: bytes) -> list[tuple[str, tuple[str, bytes]]]:
    """Photos for httpx, which sends the form's other fields first."""
    return [("image", (f"photo {index}.png", image)) for index, image in enumerate(images)]


async def submit(site: Site, *images: bytes, **fields: str) -> dict[str, Any]:
    async with site.client() as client:
        answer = await client.post(BATCHES, files=files(*images), data=fields)
    assert answer.status_code == 202, answer.text
    body: dict[str, Any] = answer.json()
    return body


async def run(site: Site, job_id: str) -> Job:
    return await site.start(UUID(job_id))


async def test_12_one_call_submits_many_photos(site: Site) -> None:
    """202: every photo is stored under a job of its own, and all ask for the same."""
    images = [photo((8, side)) for side in (8, 9, 10)]
    async with site.client() as client:
        answer = await client.post(
            BATCHES,
            files=files(*images),
            data={
                "workflow": "enlarge",
                "params": json.dumps({"strength": 0.5}),
                "output_format": "webp",
            },
        )
    body = answer.json()
    assert (answer.status_code, body["status"], body["size"]) == (202, "running", 3)
    assert answer.headers["location"] == body["links"]["self"] == f"{BATCHES}/{body['id']}"
    assert set(body["links"]) == {"self", "items", "events", "cancel"}
    assert body["counts"]["queued"] == 3
    for index, (item, image) in enumerate(zip(body["items"], images, strict=True)):
        job = site.jobs.rows[UUID(item["job_id"])]
        assert (item["index"], item["name"], item["status"]) == (
            index,
            f"photo {index}.png",
            "queued",
        )
        assert (job.owner, job.workflow, job.params["strength"]) == ("ann", "enlarge", 0.5)
        assert (job.output_format, job.priority) == (OutputFormat.WEBP, Priority.BATCH)
        assert site.blobs.objects[job.input.key] == image
        assert (str(job.batch_id), job.batch_index) == (body["id"], index)


async def test_12_jobs_of_a_batch_are_jobs(site: Site) -> None:
    """Each is listed, shown and cancelled by itself too, and says which batch it came in."""
    batch = await submit(site, photo(), photo())
    async with site.client() as client:
        listed = (await client.get(API)).json()["restorations"]
        assert {job["batch_id"] for job in listed} == {batch["id"]}
        await client.post(f"{API}/{listed[0]['id']}/cancel")
        counts = (await client.get(batch["links"]["self"])).json()["counts"]
    assert (counts["queued"], counts["cancelled"]) == (1, 1)


async def test_12_a_bad_photo_does_not_sink_the_others(site: Site) -> None:
    """Each photo that cannot be used says why, and every other one becomes a job."""
    async with open_site(upload_max_bytes=2000) as site:
        images = [photo(), BROKEN, photo(), b"GIF89a", b"", b"\x89PNG\r\n\x1a\n" + bytes(5000)]
        batch = await submit(site, *images)
        async with site.client() as client:
            shown = (await client.get(batch["links"]["self"])).json()
            items = (await client.get(batch["links"]["items"])).json()["items"]
    assert [item["failure"] and item["failure"]["code"] for item in items] == [
        None,
        "broken_image",
        None,
        "unsupported_image",
        "invalid_request",
        "image_too_large",
    ]
    assert [item["status"] for item in items] == ["queued", "refused", "queued"] + ["refused"] * 3
    assert batch["items"] == items
    assert (shown["counts"]["queued"], shown["counts"]["refused"]) == (2, 4)
    assert len(site.jobs.rows) == len(site.blobs.objects) == 2


async def test_12_a_batch_of_bad_photos_has_failed(site: Site) -> None:
    """Nothing is left to be waited for, and every photo says why."""
    batch = await submit(site, BROKEN, b"?")
    assert (batch["status"], batch["counts"]["refused"]) == ("failed", 2)


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
async def test_12_a_request_that_is_wrong_as_a_whole(
    site: Site, fields: dict[str, Any], status: int, code: str
) -> None:
    """What concerns every photo refuses them all, and nothing is stored."""
    async with site.client() as client:
        answer = await client.post(BATCHES, files=files(photo(), photo()), data=fields)
    assert (answer.status_code, answer.json()["code"]) == (status, code)
    assert (site.jobs.rows, site.blobs.objects, site.batches.rows) == ({}, {}, {})


def _part(name: str, data: bytes, filename: str | None = None) -> bytes:
    quoted = "" if filename is None else f'; filename="{filename}"'
    head = f'--b\r\nContent-Disposition: form-data; name="{name}"{quoted}\r\n\r\n'
    return head.encode() + data + b"\r\n"


IMAGE = _part("image", photo(), "a.png")


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
            {"content": _part("workflow", b"restore") + b"--b--\r\n", "headers": MULTIPART},
            400,
            "invalid_request",
        ),
        (
            {"content": IMAGE + _part("workflow", b"restore") + b"--b--", "headers": MULTIPART},
            422,
            "malformed_request",
        ),
        ({"files": {"photo": ("p", b"x")}}, 422, "malformed_request"),
        (
            {"content": IMAGE + _part("", b"x", "p") + b"--b--", "headers": MULTIPART},
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
        "field after photo",
        "other name",
        "no name",
    ],
)
async def test_12_a_body_that_is_no_batch(
    site: Site, body: dict[str, Any], status: int, code: str
) -> None:
    """Whatever comes instead of the form is the client's mistake, and leaves nothing behind."""
    async with site.client() as client:
        answer = await client.post(BATCHES, **body)
    assert (answer.status_code, answer.json()["code"]) == (status, code)
    assert (site.jobs.rows, site.blobs.objects, site.batches.rows) == ({}, {}, {})


async def test_12_a_form_may_arrive_in_any_pieces(site: Site) -> None:
    """Photos are put together right wherever the network cuts the body."""
    body = _part("workflow", b"enlarge") + IMAGE + _part("image", BROKEN, "ü.jpg") + b"--b--\r\n"

    async def pieces() -> AsyncIterator[bytes]:
        for at in range(0, len(body), 7):
            yield body[at : at + 7]

    async with site.client() as client:
        answer = await client.post(BATCHES, content=pieces(), headers=MULTIPART)
    good, bad = answer.json()["items"]
    assert (good["name"], bad["name"], bad["status"]) == ("a.png", "ü.jpg", "refused")
    job = site.jobs.rows[UUID(good["job_id"])]
    assert (job.workflow, site.blobs.objects[job.input.key]) == ("enlarge", photo())


async def test_12_no_more_than_a_thousand(site: Site) -> None:
    """The photo that is one too many refuses the batch, and what was stored of it is removed."""
    image = photo((1, 1), "BMP")
    async with site.client() as client:
        answer = await client.post(BATCHES, files=files(*[image] * 1001))
    assert (answer.status_code, answer.json()["code"]) == (413, "batch_too_large")
    assert (site.jobs.rows, site.blobs.objects) == ({}, {})


async def test_12_no_more_bytes_than_allowed() -> None:
    """A batch has a limit of its own, above that of an upload, and is cut off behind it."""
    sent = 0

    async def endless() -> AsyncIterator[bytes]:
        nonlocal sent
        while sent < 100:
            sent += 1
            yield _part("image", b"\xff\xd8\xff" + bytes(BATCH_OVERHEAD_BYTES), "p.jpg")

    async with (
        open_site(upload_max_bytes=1000, batch_max_bytes=2 * BATCH_OVERHEAD_BYTES) as site,
        site.client() as client,
    ):
        answer = await client.post(BATCHES, content=endless(), headers=MULTIPART)
    assert (answer.status_code, answer.json()["code"]) == (413, "batch_too_large")
    assert sent == 3


async def test_12_nobody_is_asked_for_a_batch_before_a_token(site: Site) -> None:
    """An upload without a token is refused without reading it."""

    async def never() -> AsyncIterator[bytes]:
        pytest.fail("the body was read")
        yield b""

    async with site.client(sub=None) as client:
        answer = await client.post(BATCHES, content=never(), headers=MULTIPART)
    assert answer.status_code == 401


async def test_12_photos_are_not_held_in_memory(site: Site, monkeypatch: Any) -> None:
    """However large the batch, only the photos that are being checked are in memory."""
    at_once = most = 0
    examine = site.services.submission.prepare

    async def watched(*arguments: Any) -> Any:
        nonlocal at_once, most
        at_once += 1
        most = max(most, at_once)
        try:
            return await examine(*arguments)
        finally:
            at_once -= 1

    async def put(key: str, data: bytes, content_type: str) -> Artifact:
        return Artifact(key, "0" * 64, len(data), content_type)  # a store that keeps nothing here

    size, count = 2 * MEBIBYTE, 60
    padded = photo() + bytes(size)

    async def body() -> AsyncIterator[bytes]:
        for index in range(count):
            part = _part("image", padded, f"{index}.png")
            for at in range(0, len(part), 65536):
                yield part[at : at + 65536]
        yield b"--b--\r\n"

    monkeypatch.setattr(site.services.submission, "prepare", watched, raising=False)
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
    # those in flight, the one that waits, the one that arrives, and the test's own
    assert peak_bytes < (2 * IN_FLIGHT + 4) * size < count * size


async def test_12_a_thousand_photos(site: Site) -> None:
    """The largest batch: accepted in order, within bounds of time and of open files."""
    image = photo((2, 2))
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    highest = max(int(name) for name in os.listdir("/proc/self/fd"))
    resource.setrlimit(resource.RLIMIT_NOFILE, (highest + 100, hard))  # no file for each photo
    started = time.monotonic()
    try:
        batch = await submit(site, *[image if index % 100 else b"?" for index in range(1000)])
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    assert time.monotonic() - started < 60
    assert (batch["counts"]["queued"], batch["counts"]["refused"]) == (990, 10)
    assert [item["index"] for item in batch["items"]] == list(range(1000))
    async with site.client() as client:
        paths, seen = [f"{batch['links']['items']}?limit=400"], []
        while (path := paths[-1]) is not None:
            page = (await client.get(path)).json()
            seen += page["items"]
            paths.append(page["next"])
    assert (len(paths), seen) == (4, batch["items"])


async def test_12_repeating_a_batch_makes_no_second_one(site: Site) -> None:
    """The same key and photos: 200 with the first batch as it is by now, refusals included."""
    headers = {"Idempotency-Key": "k-1"}
    async with site.client() as client:
        first = await client.post(BATCHES, files=files(photo(), BROKEN), headers=headers)
        await client.post(first.json()["links"]["cancel"])
        again = await client.post(BATCHES, files=files(photo(), BROKEN), headers=headers)
    assert (first.status_code, again.status_code) == (202, 200)
    assert "idempotent-replayed" not in first.headers
    assert again.headers["idempotent-replayed"] == "true"
    assert again.headers["location"] == first.headers["location"]
    assert [item["status"] for item in again.json()["items"]] == ["cancelled", "refused"]
    assert len(site.jobs.rows) == len(site.blobs.objects) == len(site.batches.rows) == 1


@pytest.mark.parametrize(
    ("images", "fields"),
    [
        ([photo()], {}),
        ([BROKEN, photo()], {}),
        ([photo(), photo((9, 9))], {}),
        ([photo(), BROKEN, photo()], {}),
        ([photo(), BROKEN], {"workflow": "enlarge"}),
    ],
    ids=["fewer", "other order", "another", "more", "other workflow"],
)
async def test_12_a_key_means_one_batch(
    site: Site, images: list[bytes], fields: dict[str, str]
) -> None:
    """The same key with anything else is a conflict; another owner's key is another key."""
    headers = {"Idempotency-Key": "k-1"}
    async with site.client() as ann, site.client("bob") as bob:
        await ann.post(BATCHES, files=files(photo(), BROKEN), headers=headers)
        other = await ann.post(BATCHES, files=files(*images), data=fields, headers=headers)
        bobs = await bob.post(BATCHES, files=files(*images), data=fields, headers=headers)
    assert (other.status_code, other.json()["code"]) == (409, "idempotency_conflict")
    assert bobs.status_code == 202


async def test_12_of_two_at_once_with_a_key_one_creates(site: Site) -> None:
    """Both get the same batch, and the inputs of the one that came too late are removed."""
    headers = {"Idempotency-Key": "k-1"}
    async with site.client() as client:
        answers = await asyncio.gather(
            *(client.post(BATCHES, files=files(photo(), photo()), headers=headers) for _ in "ab")
        )
    assert sorted(answer.status_code for answer in answers) == [200, 202]
    assert len({answer.json()["id"] for answer in answers}) == 1
    assert len(site.jobs.rows) == len(site.blobs.objects) == 2


@pytest.mark.parametrize("store", ["blobs", "jobs"])
async def test_12_an_outage_is_no_refusal(
    site: Site, monkeypatch: pytest.MonkeyPatch, store: str
) -> None:
    """Without S3 or Postgres the whole batch is to be sent again, and no photo is blamed."""
    monkeypatch.setattr(getattr(site, store), "down", True)
    async with site.client() as client:
        answer = await client.post(BATCHES, files=files(photo(), photo()))
    assert (answer.status_code, answer.json()["code"]) == (503, "dependency_unavailable")
    assert (site.jobs.rows, site.batches.rows) == ({}, {})


async def test_12_a_photo_in_trouble_takes_its_batch_back(
    site: Site, monkeypatch: pytest.MonkeyPatch
) -> None:
    """When S3 goes down half way, what had been stored by then is removed again."""
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


async def test_12_a_batch_is_watched_to_its_end(site: Site) -> None:
    """Counts follow the jobs, and the status says how all of it ended."""
    batch = await submit(site, photo(), photo(), BROKEN)
    first, second, _ = batch["items"]
    async with site.client() as client:
        await site.succeed(await run(site, first["job_id"]))
        await site.fail(await run(site, second["job_id"]))
        shown = (await client.get(batch["links"]["self"])).json()
        items = (await client.get(batch["links"]["items"])).json()["items"]
    assert shown["status"] == "partly_failed"
    assert {k: v for k, v in shown["counts"].items() if v} == {
        "succeeded": 1,
        "failed": 1,
        "refused": 1,
    }
    assert items[1]["failure"] == {"code": "engine_failed", "message": "a node raised"}


async def test_12_cancel_ends_a_batch(site: Site) -> None:
    """202 while an engine still has to stop, 200 once all has ended; repeating changes nothing."""
    batch = await submit(site, photo(), photo(), photo())
    running = await run(site, batch["items"][0]["job_id"])
    async with site.client() as client:
        asked = await client.post(batch["links"]["cancel"])
        assert (asked.status_code, asked.json()["status"]) == (202, "running")
        assert (asked.json()["counts"]["cancelling"], asked.json()["counts"]["cancelled"]) == (1, 2)
        await site.jobs.release(running.ref, None)
        for _ in range(2):
            ended = await client.post(batch["links"]["cancel"])
            assert (ended.status_code, ended.json()["status"]) == (200, "cancelled")


@pytest.mark.parametrize(
    ("method", "suffix"), [("GET", ""), ("GET", "/items"), ("GET", "/events"), ("POST", "/cancel")]
)
async def test_12_another_owners_batch_does_not_exist(site: Site, method: str, suffix: str) -> None:
    """Somebody else's batch is 404 like one that never was, and stays as it is."""
    batch = await submit(site, photo())
    async with site.client("mallory") as client:
        foreign = await client.request(method, f"{BATCHES}/{batch['id']}{suffix}")
        missing = await client.request(method, f"{BATCHES}/{UUID(int=0)}{suffix}")
        listed = (await client.get(BATCHES)).json()["batches"]
    for answer in (foreign, missing):
        assert (answer.status_code, answer.json()["code"]) == (404, "batch_not_found")
    assert listed == []
    assert [job.status for job in site.jobs.rows.values()] == [JobStatus.QUEUED]


async def test_12_batches_are_listed_in_pages(site: Site) -> None:
    """Newest first, each once; `next` leads on."""
    ids = [(await submit(site, photo()))["id"] for _ in range(3)]
    async with site.client() as client:
        page = (await client.get(f"{BATCHES}?limit=2")).json()
        last = (await client.get(page["next"])).json()
    assert [batch["id"] for batch in page["batches"] + last["batches"]] == ids[::-1]
    assert last["next"] is None


async def test_12_events_tell_every_change_and_end(
    site: Site, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The counts as they are, then each time they have changed, then the end; comments between."""
    batch = await submit(site, photo(), photo())
    get, reads = site.batches.get, 0

    async def get_and_work(batch_id: UUID, owner: str | None = None) -> JobBatch:
        nonlocal reads
        reads += 1
        if reads == 4:
            await site.succeed(await run(site, batch["items"][0]["job_id"]))
        if reads == 5:
            site.jobs.down = True  # an outage is waited out
        if reads == 7:
            site.jobs.down = False
            await site.succeed(await run(site, batch["items"][1]["job_id"]))
        return await get(batch_id, owner)

    monkeypatch.setattr(events, "HEARTBEAT_S", 0)
    monkeypatch.setattr(site.batches, "get", get_and_work)
    async with asyncio.timeout(DEADLINE_S), site.client() as client:
        answer = await client.get(batch["links"]["events"])
    received = [(e.event, json.loads(e.data)) for e in Decoder().feed(answer.text)]
    assert answer.headers["content-type"].startswith("text/event-stream")
    assert encode_comment("alive").decode() in answer.text
    assert [kind for kind, _ in received] == ["progress"] * 3
    assert [
        (data["status"], data["counts"]["queued"], data["counts"]["succeeded"])
        for _, data in received
    ] == [("running", 2, 0), ("running", 1, 1), ("succeeded", 0, 2)]


async def test_12_an_idle_batch_is_asked_for_less_often(
    site: Site, monkeypatch: pytest.MonkeyPatch
) -> None:
    """At most twice a second while it changes, and a quarter of that while it does not."""
    batch = await submit(site, photo())
    slept: list[float] = []

    async def sleep(delay_s: float) -> None:
        slept.append(delay_s)

    monkeypatch.setattr("serve_app.batch_watch.asyncio.sleep", sleep)
    row = await site.batches.get(UUID(batch["id"]))
    async with aclosing(site.services.batch_watcher.watch(row)) as watch:
        for _ in range(5):
            await anext(watch)
        job = await run(site, batch["items"][0]["job_id"])
        assert await anext(watch) is not None
        await site.succeed(job)
        assert await anext(watch) is not None
    unit = site.services.batch_poll_s
    assert [delay / unit for delay in slept] == [1, 2, 4, 4, 4, 1]


async def test_12_a_batch_that_has_ended_shows_its_end_at_once(site: Site) -> None:
    """Whoever comes late gets one event, and the stream closes."""
    batch = await submit(site, BROKEN)
    async with site.client() as client:
        answer = await client.get(batch["links"]["events"])
    [event] = Decoder().feed(answer.text)
    assert json.loads(event.data)["status"] == "failed"


async def test_12_a_client_that_goes_away_leaves_nothing(site: Site) -> None:
    """A connection that breaks while photos arrive takes the batch back as a whole."""
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
