"""An owner that uses all of its limits at once, and the share left for another."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import AsyncIterator, Sequence
from contextlib import aclosing
from dataclasses import replace
from typing import Any
from unittest.mock import patch
from uuid import UUID

import httpx
import pytest
from fastapi import FastAPI
from starlette.types import Message

from actors.submission.requests import CheckedRequest, SubmissionRequest
from restoration.jobs import Artifact, Job
from restoration.limits.fair_places import Owner, current_owner
from restoration.observability.metrics import SSE_CLIENTS
from serve_app.app import build_asgi_app
from tests.fakes.batch_forms import submit
from tests.fakes.meter import MemoryMeter
from tests.fakes.site import API, Site, open_site, photo, submission
from tests.support.greedy import FEW, Gate, overtaken
from tests.support.polling import until

DEADLINE_S = 300


async def test_the_calls_of_a_request_are_made_in_its_owners_turn(site: Site) -> None:
    seen: list[Owner] = []
    put = site.blobs.put

    async def spied(key: str, data: bytes, content_type: str) -> Artifact:
        seen.append(current_owner.get())
        return await put(key, data, content_type)

    with patch.object(site.blobs, "put", spied):
        await site.submit("ann")
        await site.submit("bob")
    assert seen == ["ann", "bob"]


async def test_the_poll_that_all_watchers_share_takes_no_owners_turn(site: Site) -> None:
    seen: list[Owner] = []
    find, polled = site.jobs.find, asyncio.Event()

    async def spied(job_ids: Sequence[UUID]) -> Sequence[Job]:
        seen.append(current_owner.get())
        polled.set()
        return await find(job_ids)

    job = await site.jobs.get(await site.submit("ann"))
    current_owner.set("ann")
    with patch.object(site.jobs, "find", spied):
        async with asyncio.timeout(DEADLINE_S), aclosing(site.services.watcher.watch(job)) as watch:
            await anext(watch)
            await anext(watch)
            await polled.wait()
    assert set(seen) == {None}


def client_of(app: FastAPI, token: str) -> httpx.AsyncClient:
    return httpx.AsyncClient(
        transport=httpx.ASGITransport(app),
        base_url="http://api.test",
        headers={"Authorization": f"Bearer {token}"},
    )


class SlowUploads:
    """Uploads whose bodies come only when released."""

    def __init__(self, group: asyncio.TaskGroup) -> None:
        self._group = group
        self._go_on = asyncio.Event()
        self.held = 0

    async def open(
        self, client: httpx.AsyncClient, count: int
    ) -> list[asyncio.Task[httpx.Response]]:
        """Begin this many; return once each is either read or refused."""
        body, content_type = encoded(submission())
        reading = 0

        async def slowly() -> AsyncIterator[bytes]:
            nonlocal reading
            reading += 1
            self.held += 1
            await self._go_on.wait()
            yield body

        tasks = [
            self._group.create_task(client.post(API, content=slowly(), headers=content_type))
            for _ in range(count)
        ]

        async def are_read_or_refused() -> bool:
            return reading + sum(task.done() for task in tasks) == count

        await until(are_read_or_refused)
        return tasks

    def go_on(self) -> None:
        self._go_on.set()


def encoded(form: dict[str, Any]) -> tuple[bytes, dict[str, str]]:
    request = httpx.Request("POST", "http://api.test", **form)
    return request.read(), {"Content-Type": request.headers["content-type"]}


@pytest.mark.parametrize(
    ("greedy", "together"), [(["ann"], 32), (["ann", "bob"], 48), (["ann", "bob", "cid"], 56)]
)
async def test_slow_uploads_of_several_owners_leave_room_for_another(
    greedy: list[str], together: int
) -> None:
    async with (
        open_site(max_uploads_in_flight=64) as site,
        asyncio.timeout(DEADLINE_S),
        site.client() as client,
        asyncio.TaskGroup() as group,
    ):
        slow = SlowUploads(group)
        for owner in greedy:
            client.headers["Authorization"] = f"Bearer {site.token(owner)}"
            await slow.open(client, 64)
        client.headers["Authorization"] = f"Bearer {site.token('dan')}"
        answer = await client.post(API, **submission())
        held = slow.held
        slow.go_on()
    assert answer.status_code == 202, f"{held} of 64 places are held: {answer.text}"
    assert held == together


async def test_an_upload_waits_its_turn_when_others_hold_every_place() -> None:
    """Its owner holds none: it is not refused for others' uploads, if they soon end."""
    async with (
        open_site(max_uploads_in_flight=1) as site,
        asyncio.timeout(DEADLINE_S),
        client_of(app := build_asgi_app(site.services), site.token("ann")) as client,
        asyncio.TaskGroup() as group,
    ):
        slow = SlowUploads(group)
        first, refused = await slow.open(client, 2)
        client.headers["Authorization"] = f"Bearer {site.token('bob')}"
        waiting = group.create_task(client.post(API, **submission()))

        async def it_waits() -> object:
            return app.state.uploads.waiting("bob") > 0

        await until(it_waits)
        slow.go_on()
    assert (refused.result().status_code, refused.result().json()["code"]) == (
        429,
        "too_many_uploads",
    )
    assert (first.result().status_code, waiting.result().status_code) == (202, 202)


async def test_an_upload_that_gets_no_turn_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("serve_app.forms.upload_slots.QUEUE_TIMEOUT_S", 0.05)
    async with (
        open_site(max_uploads_in_flight=1) as site,
        asyncio.timeout(DEADLINE_S),
        site.client() as client,
        asyncio.TaskGroup() as group,
    ):
        slow = SlowUploads(group)
        await slow.open(client, 1)
        client.headers["Authorization"] = f"Bearer {site.token('bob')}"
        refused = await client.post(API, **submission())
        slow.go_on()
    assert (refused.status_code, refused.json()["code"]) == (429, "too_many_uploads")
    assert int(refused.headers["retry-after"]) > 0


async def test_an_owners_event_streams_leave_room_for_another_and_say_how_many_are_too_many() -> (
    None
):
    """Streams of jobs and of batches count together; one too many is 429."""
    meter = MemoryMeter()
    async with open_site(max_event_streams=8) as site, asyncio.timeout(DEADLINE_S):
        site = replace(site, services=replace(site.services, meter=meter))
        batch = await submit(site, photo())
        jobs = {owner: await site.submit(owner) for owner in ("ann", "bob")}
        async with site.client("ann") as ann, site.client("bob") as bob:
            paths = [f"{API}/{jobs['ann']}/events", batch["links"]["events"]] * 10
            greedy = [asyncio.create_task(ann.get(path)) for path in paths]

            async def all_are_answered() -> bool:
                return meter.gauged(SSE_CLIENTS) + sum(task.done() for task in greedy) == 20

            await until(all_are_answered)
            held = meter.gauged(SSE_CLIENTS)
            other = asyncio.create_task(bob.get(f"{API}/{jobs['bob']}/events"))
            await work(site, 3)
            answers, others = await asyncio.gather(*greedy), await other
    assert others.status_code == 200
    assert held == 4, f"{held:g} of 8 streams are one owner's"
    refused = [answer for answer in answers if answer.status_code != 200]
    assert {(each.status_code, each.json()["code"]) for each in refused} == {
        (429, "too_many_at_once")
    }
    assert len(refused) == 16
    assert all(int(each.headers["retry-after"]) > 0 for each in refused)
    assert meter.gauged(SSE_CLIENTS) == 0


async def test_an_owners_waits_leave_room_for_another() -> None:
    """One wait too many is answered at once with the job, as if without `Prefer`."""
    waiting = submission() | {"headers": {"Prefer": "wait=60"}}
    async with open_site(max_waits=4) as site, asyncio.timeout(DEADLINE_S):
        app = build_asgi_app(site.services)
        async with (
            client_of(app, site.token("ann")) as ann,
            client_of(app, site.token("bob")) as bob,
        ):
            greedy = [asyncio.create_task(ann.post(API, **waiting)) for _ in range(6)]

            async def all_wait_or_are_answered() -> object:
                return app.state.waits.held("ann") + sum(task.done() for task in greedy) == 6

            await until(all_wait_or_are_answered)
            answered = [task.result() for task in greedy if task.done()]
            other = asyncio.create_task(bob.post(API, **waiting))
            await work(site, 7)
            answers, others = await asyncio.gather(*greedy), await other
    assert (others.status_code, others.headers["preference-applied"]) == (200, "wait=60")
    assert [answer.status_code for answer in answered] == [202] * 4
    assert not any("preference-applied" in answer.headers for answer in answered)
    assert sorted(answer.status_code for answer in answers) == [200, 200, 202, 202, 202, 202]


async def test_a_photo_is_not_hashed_after_all_of_a_greedy_owners(
    site: Site, monkeypatch: pytest.MonkeyPatch
) -> None:
    gate, digest = Gate(), CheckedRequest.digest
    requests = [
        SubmissionRequest(owner=owner, image=photo((8, side)), workflow="restore")
        for owner, side in (("greedy", 8), ("modest", 9))
    ]
    greedy, modest = requests

    def behind_the_gate(checked: CheckedRequest, subject: bytes) -> str:
        if subject == greedy.image:
            gate.pass_through()
        return digest(checked, subject)

    monkeypatch.setattr(CheckedRequest, "digest", behind_the_gate)
    submit = site.services.submission.submit
    assert await overtaken(gate, lambda: submit(greedy), lambda: submit(modest)) <= FEW


class SlowReader:
    """A client that asks for a result and does not take it."""

    def __init__(self, app: FastAPI, path: str, token: str) -> None:
        self._app = app
        self._path = path
        self._token = token
        self._go_on = asyncio.Event()
        self.status: int | None = None

    async def fetch(self) -> None:
        scope = {
            "type": "http",
            "asgi": {"version": "3.0"},
            "http_version": "1.1",
            "method": "GET",
            "scheme": "http",
            "server": ("api.test", 80),
            "path": self._path,
            "raw_path": self._path.encode(),
            "query_string": b"download=1",
            "headers": [(b"authorization", f"Bearer {self._token}".encode())],
        }
        await self._app(scope, self._receive, self._send)

    async def _receive(self) -> Message:
        await asyncio.Event().wait()
        raise AssertionError("it does not disconnect")

    async def _send(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            self.status = message["status"]
        elif self.status == 200:
            await self._go_on.wait()

    def go_on(self) -> None:
        self._go_on.set()


async def test_downloads_that_are_not_read_leave_room_for_another_owners(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("serve_app.routes.downloads.QUEUE_TIMEOUT_S", 0.05)
    async with open_site(max_downloads=8) as site, asyncio.timeout(DEADLINE_S):
        app = build_asgi_app(site.services)
        jobs = {owner: await site.submit(owner) for owner in ("ann", "bob")}
        await work(site, 2)
        path = f"{API}/{jobs['ann']}/result"
        readers = [SlowReader(app, path, site.token("ann")) for _ in range(12)]
        async with asyncio.TaskGroup() as group:
            for reader in readers:
                group.create_task(reader.fetch())

            async def all_are_answered() -> bool:
                return all(reader.status is not None for reader in readers)

            await until(all_are_answered)
            async with client_of(app, site.token("bob")) as bob:
                other = await bob.get(f"{API}/{jobs['bob']}/result", params={"download": 1})
            for reader in readers:
                reader.go_on()
        assert app.state.downloads.free == 8
    assert (other.status_code, other.content) == (200, b"restored")
    assert Counter(reader.status for reader in readers) == {200: 4, 429: 8}


async def test_a_picture_in_the_answer_is_left_out_when_too_many_are_being_sent() -> None:
    """The job has ended and is the answer; its result can be fetched later."""
    waiting = submission() | {"headers": {"Prefer": "wait=60", "Accept": "image/*"}}
    async with open_site(max_downloads=1) as site, asyncio.timeout(DEADLINE_S):
        app = build_asgi_app(site.services)
        async with client_of(app, site.token("ann")) as ann:
            with app.state.downloads.take_now("bob"):
                asked = asyncio.create_task(ann.post(API, **waiting))
                await work(site, 1)
                answer = await asked
            assert (answer.status_code, answer.json()["status"]) == (200, "succeeded")
            result = await ann.get(answer.json()["links"]["result"], params={"download": 1})
    assert result.content == b"restored"


async def work(site: Site, count: int) -> None:
    """Act as a worker for this many jobs, as soon as there are so many."""

    async def are_there() -> bool:
        return len(site.jobs.rows) == count

    await until(are_there)
    for _ in range(count):
        job = await site.jobs.claim("worker-1", 60, ["restore"])
        assert job is not None
        await site.succeed(job)
