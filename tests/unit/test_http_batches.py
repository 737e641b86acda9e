"""Point 12 over HTTP: /api/v1/batches."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Sequence
from contextlib import aclosing
from itertools import pairwise
from uuid import UUID

import pytest

from restoration import batches as rules
from restoration.batches import BatchStatus, JobBatch
from restoration.errors import BatchNotFound
from restoration.jobs import Job, JobStatus, OutputFormat, Priority
from serve_app.routes import events
from serve_app.sse import Decoder, encode_comment
from tests.fakes.batch_forms import BATCHES, BROKEN, files, submit
from tests.fakes.site import API, Site, open_site, photo

DEADLINE_S = 300


async def run(site: Site, job_id: str) -> Job:
    return await site.start(UUID(job_id))


@pytest.mark.batches
async def test_one_call_submits_many_photos(site: Site) -> None:
    """202: every photo is stored under its own job, and all have the same options."""
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
        assert (job.output_format, job.options.priority) == (OutputFormat.WEBP, Priority.BATCH)
        assert site.blobs.objects[job.input.key] == image
        assert (str(job.batch_id), job.batch_index) == (body["id"], index)


@pytest.mark.batches
async def test_jobs_of_a_batch_are_jobs(site: Site) -> None:
    """Each is also listed, shown and cancelled by itself, and names its batch."""
    batch = await submit(site, photo(), photo())
    async with site.client() as client:
        listed = (await client.get(API)).json()["restorations"]
        assert {job["batch_id"] for job in listed} == {batch["id"]}
        await client.post(f"{API}/{listed[0]['id']}/cancel")
        counts = (await client.get(batch["links"]["self"])).json()["counts"]
    assert (counts["queued"], counts["cancelled"]) == (1, 1)


@pytest.mark.batches
async def test_a_bad_photo_does_not_sink_the_others(site: Site) -> None:
    """Each unusable photo gives a reason, and every other one becomes a job."""
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


@pytest.mark.batches
async def test_a_batch_of_bad_photos_has_failed(site: Site) -> None:
    """The batch has ended, and every photo gives a reason."""
    batch = await submit(site, BROKEN, b"?")
    assert (batch["status"], batch["counts"]["refused"]) == ("failed", 2)


@pytest.mark.batches
async def test_a_queue_that_fills_up_meanwhile_keeps_no_photo(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A batch refused at the last moment removes its objects again."""

    async def has_room(*_asked: object) -> None:
        """Return the answer of the first call."""

    async with open_site(max_waiting_jobs=2) as site, site.client() as client:
        kept = site.jobs.rows[await site.submit()].input.key
        monkeypatch.setattr(site.services.submission, "check_room", has_room)
        answer = await client.post(BATCHES, files=files(photo(), photo()))
    assert (answer.status_code, answer.json()["code"]) == (429, "queue_full")
    assert list(site.blobs.objects) == [kept]


@pytest.mark.batches
async def test_a_batch_that_took_too_long_is_not_recorded(
    site: Site, monkeypatch: pytest.MonkeyPatch
) -> None:
    """408, and nothing is left: its first photos might already have been swept away."""
    monkeypatch.setattr(rules, "PUT_TOGETHER_S", -1)
    async with site.client() as client:
        answer = await client.post(BATCHES, files=files(photo(), photo()))
    assert (answer.status_code, answer.json()["code"]) == (408, "batch_expired")
    assert (site.jobs.rows, site.batches.rows, site.blobs.objects) == ({}, {}, {})


@pytest.mark.batches
async def test_repeating_a_batch_makes_no_second_one(site: Site) -> None:
    """The same key and photos: 200 with the first batch in its present state, refusals included."""
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


@pytest.mark.batches
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
async def test_a_key_means_one_batch(
    site: Site, images: list[bytes], fields: dict[str, str]
) -> None:
    """The same key with different content is a conflict; another owner's key is another key."""
    headers = {"Idempotency-Key": "k-1"}
    async with site.client() as ann, site.client("bob") as bob:
        await ann.post(BATCHES, files=files(photo(), BROKEN), headers=headers)
        other = await ann.post(BATCHES, files=files(*images), data=fields, headers=headers)
        bobs = await bob.post(BATCHES, files=files(*images), data=fields, headers=headers)
    assert (other.status_code, other.json()["code"]) == (409, "idempotency_conflict")
    assert bobs.status_code == 202


@pytest.mark.batches
async def test_of_two_at_once_with_a_key_one_creates(site: Site) -> None:
    """Both get the same batch, and the inputs of the later one are removed."""
    headers = {"Idempotency-Key": "k-1"}
    async with site.client() as client:
        answers = await asyncio.gather(
            *(client.post(BATCHES, files=files(photo(), photo()), headers=headers) for _ in "ab")
        )
    assert sorted(answer.status_code for answer in answers) == [200, 202]
    assert len({answer.json()["id"] for answer in answers}) == 1
    assert len(site.jobs.rows) == len(site.blobs.objects) == 2


@pytest.mark.batches
@pytest.mark.parametrize("store", ["blobs", "jobs"])
async def test_an_outage_is_no_refusal(
    site: Site, monkeypatch: pytest.MonkeyPatch, store: str
) -> None:
    """Without S3 or Postgres the whole batch must be sent again, and no photo is refused."""
    monkeypatch.setattr(getattr(site, store), "down", True)
    async with site.client() as client:
        answer = await client.post(BATCHES, files=files(photo(), photo()))
    assert (answer.status_code, answer.json()["code"]) == (503, "dependency_unavailable")
    assert (site.jobs.rows, site.batches.rows) == ({}, {})


@pytest.mark.batches
async def test_a_batch_is_watched_to_its_end(site: Site) -> None:
    """Counts follow the jobs, and the status shows how they all ended."""
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


@pytest.mark.batches
async def test_cancel_ends_a_batch(site: Site) -> None:
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


@pytest.mark.batches
@pytest.mark.parametrize(
    ("method", "suffix"), [("GET", ""), ("GET", "/items"), ("GET", "/events"), ("POST", "/cancel")]
)
async def test_another_owners_batch_does_not_exist(site: Site, method: str, suffix: str) -> None:
    """Another owner's batch is 404 like one that never existed, and stays unchanged."""
    batch = await submit(site, photo())
    async with site.client("mallory") as client:
        foreign = await client.request(method, f"{BATCHES}/{batch['id']}{suffix}")
        missing = await client.request(method, f"{BATCHES}/{UUID(int=0)}{suffix}")
        listed = (await client.get(BATCHES)).json()["batches"]
    for answer in (foreign, missing):
        assert (answer.status_code, answer.json()["code"]) == (404, "batch_not_found")
    assert listed == []
    assert [job.status for job in site.jobs.rows.values()] == [JobStatus.QUEUED]


@pytest.mark.batches
async def test_batches_are_listed_in_pages(site: Site) -> None:
    """Newest first, each once; `next` leads to the following page."""
    ids = [(await submit(site, photo()))["id"] for _ in range(3)]
    async with site.client() as client:
        page = (await client.get(f"{BATCHES}?limit=2")).json()
        last = (await client.get(page["next"])).json()
    assert [batch["id"] for batch in page["batches"] + last["batches"]] == ids[::-1]
    assert last["next"] is None


@pytest.mark.batches
async def test_events_tell_every_change_and_end(
    site: Site, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Events give the present counts, each change and the end; comments come between."""
    batch = await submit(site, photo(), photo())
    find, reads = site.batches.find, 0

    async def find_and_work(batch_ids: Sequence[UUID]) -> Sequence[JobBatch]:
        nonlocal reads
        reads += 1
        if reads == 3:
            await site.succeed(await run(site, batch["items"][0]["job_id"]))
        if reads == 4:
            site.jobs.down = True  # an outage is waited out
        if reads == 6:
            site.jobs.down = False
            await site.succeed(await run(site, batch["items"][1]["job_id"]))
        return await find(batch_ids)

    monkeypatch.setattr(events, "HEARTBEAT_S", 0)
    monkeypatch.setattr(site.batches, "find", find_and_work)
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


@pytest.mark.batches
async def test_an_idle_batch_is_asked_for_less_often(
    site: Site, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is polled at most twice a second while it changes, and a quarter as often otherwise."""
    batch = await submit(site, photo())
    polls, read_in = 0, list[int]()
    find, moment = site.batches.find, asyncio.sleep

    async def sleep(_delay_s: float) -> None:
        nonlocal polls
        polls += 1
        await moment(0)

    async def noted(batch_ids: Sequence[UUID]) -> Sequence[JobBatch]:
        read_in.append(polls)
        return await find(batch_ids)

    monkeypatch.setattr("serve_app.watch.batches.asyncio.sleep", sleep)
    monkeypatch.setattr(site.batches, "find", noted)
    row = await site.batches.get(UUID(batch["id"]))
    async with aclosing(site.services.batch_watcher.watch(row)) as watch:
        for _ in range(5):
            await anext(watch)
        job = await run(site, batch["items"][0]["job_id"])
        assert await anext(watch) is not None
        await site.succeed(job)
        assert await anext(watch) is not None
    assert [after - before for before, after in pairwise([0, *read_in])] == [1, 2, 4, 4, 4, 1]


@pytest.mark.batches
async def test_a_batch_that_has_ended_shows_its_end_at_once(site: Site) -> None:
    """A late client gets one event, and the stream closes."""
    batch = await submit(site, BROKEN)
    async with site.client() as client:
        answer = await client.get(batch["links"]["events"])
    [event] = Decoder().feed(answer.text)
    assert json.loads(event.data)["status"] == "failed"


async def test_those_who_watch_a_batch_share_its_counts(
    site: Site, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Twenty watchers of two batches cost one statement for each poll of their owner."""
    batches = [await submit(site, photo()), await submit(site, photo())]
    rows = [await site.batches.get(UUID(batch["id"])) for batch in batches]
    find, read = site.batches.find, list[Sequence[UUID]]()

    async def noted(batch_ids: Sequence[UUID]) -> Sequence[JobBatch]:
        read.append(batch_ids)
        if len(read) == 3:
            for _ in batches:
                job = await site.jobs.claim("worker-1", 60, ["restore"])
                assert job is not None
                await site.succeed(job)
        return await find(batch_ids)

    async def last(row: JobBatch) -> JobBatch | None:
        async with aclosing(site.services.batch_watcher.watch(row)) as watch:
            return [batch async for batch in watch][-1]

    monkeypatch.setattr(site.batches, "find", noted)
    async with asyncio.timeout(DEADLINE_S):
        ends = await asyncio.gather(*(last(row) for row in rows * 10))
    assert all(end is not None and end.status is BatchStatus.SUCCEEDED for end in ends)
    assert read == [[row.id for row in rows]] * 3


async def test_an_owners_many_batches_do_not_delay_the_events_of_another(
    site: Site, monkeypatch: pytest.MonkeyPatch
) -> None:
    """While the counts of one owner are being read, those of another arrive."""
    theirs = await submit(site, photo())
    async with site.client("bob") as bob:
        answer = await bob.post(BATCHES, files=files(photo()))
        own = answer.json()
    find, reading = site.batches.find, asyncio.Event()

    async def slow_for_ann(batch_ids: Sequence[UUID]) -> Sequence[JobBatch]:
        if UUID(theirs["id"]) in batch_ids:
            reading.set()
            await asyncio.Event().wait()
        return await find(batch_ids)

    async def follow(batch_id: str) -> list[JobBatch | None]:
        row = await site.batches.get(UUID(batch_id))
        async with aclosing(site.services.batch_watcher.watch(row)) as watch:
            return [batch async for batch in watch]

    monkeypatch.setattr(site.batches, "find", slow_for_ann)
    async with asyncio.timeout(DEADLINE_S):
        stuck = asyncio.create_task(follow(theirs["id"]))
        await reading.wait()
        followed = asyncio.create_task(follow(own["id"]))
        await run(site, theirs["items"][0]["job_id"])
        await site.succeed(await run(site, own["items"][0]["job_id"]))
        [*_, last] = await followed
    assert last is not None
    assert last.status is BatchStatus.SUCCEEDED
    stuck.cancel()
    await asyncio.gather(stuck, return_exceptions=True)


async def test_a_batch_that_is_removed_while_it_is_watched_is_not_found(site: Site) -> None:
    batch = await submit(site, photo())
    row = await site.batches.get(UUID(batch["id"]))
    async with (
        asyncio.timeout(DEADLINE_S),
        aclosing(site.services.batch_watcher.watch(row)) as watch,
    ):
        await anext(watch)
        del site.batches.rows[row.id]
        with pytest.raises(BatchNotFound):
            await anext(watch)


async def test_a_defect_in_reading_a_batch_ends_its_watches(
    site: Site, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def broken(batch_ids: Sequence[UUID]) -> Sequence[JobBatch]:
        raise LookupError

    monkeypatch.setattr(site.batches, "find", broken)
    row = await site.batches.get(UUID((await submit(site, photo()))["id"]))
    async with (
        asyncio.timeout(DEADLINE_S),
        aclosing(site.services.batch_watcher.watch(row)) as watch,
    ):
        await anext(watch)
        with pytest.raises(LookupError):
            await anext(watch)
