"""Events and uploads over real sockets, and the local issuer's process."""

from __future__ import annotations

import asyncio
import signal
import sys
from collections.abc import AsyncIterator
from contextlib import suppress
from pathlib import Path
from uuid import UUID

import httpx
import pytest

from restoration.events import JobEvent, Progressed, StateChanged, from_json
from restoration.jobs import JobStatus
from restoration.ports.progress import StampedEvent
from serve_app.asgi.middleware import BodyPace
from serve_app.auth.local_issuer import LOCAL_AUDIENCE, issuer_url, mint_token
from serve_app.auth.tokens import Authenticator, issuer_from
from serve_app.forms.form import FORM_OVERHEAD_BYTES
from serve_app.local.temporary import free_port
from serve_app.sse import Decoder, ServerEvent
from tests.fakes.live_site import LiveSite, open_live_site
from tests.fakes.site import API, settings_for_tests

LIMIT_BYTES = 5_000_000
DEADLINE_S = 300


@pytest.fixture
async def live() -> AsyncIterator[LiveSite]:
    async with open_live_site(upload_max_bytes=LIMIT_BYTES) as live:
        yield live


@pytest.fixture
async def http(live: LiveSite) -> AsyncIterator[httpx.AsyncClient]:
    headers = {"Authorization": f"Bearer {live.site.token()}"}
    async with httpx.AsyncClient(base_url=live.url, headers=headers, timeout=DEADLINE_S) as http:
        yield http


async def _events(answer: httpx.Response) -> AsyncIterator[ServerEvent]:
    decoder = Decoder()
    async for text in answer.aiter_text():
        for event in decoder.feed(text):
            yield event


async def _publish(live: LiveSite, job_id: UUID, event: JobEvent) -> None:
    await live.site.board.publish([(job_id, event)])


async def test_events_arrive_while_the_job_runs(live: LiveSite, http: httpx.AsyncClient) -> None:
    """Each event is sent when it happens, and the server closes the stream after the last."""
    job = await live.site.start(await live.site.submit())
    async with http.stream("GET", f"{API}/{job.id}/events") as answer:
        events = _events(answer)
        assert from_json((await anext(events)).data) == StateChanged(JobStatus.RUNNING, 1)
        for fraction in (0.25, 0.5):
            await _publish(live, job.id, Progressed(fraction, "sampling", 1))
            event = await anext(events)
            assert from_json(event.data) == Progressed(fraction, "sampling", 1)
        await live.site.succeed(job)
        rest = [from_json(event.data) async for event in events]
    assert rest == [StateChanged(JobStatus.SUCCEEDED, 1)]


async def test_a_stream_resumes_after_the_last_event(
    live: LiveSite, http: httpx.AsyncClient
) -> None:
    """Last-Event-ID skips the events received before."""
    job = await live.site.start(await live.site.submit())
    for fraction in (0.1, 0.2, 0.3):
        await _publish(live, job.id, Progressed(fraction, "sampling", 1))
    headers = {"Last-Event-ID": live.site.board.streams[job.id][1].id}
    async with http.stream("GET", f"{API}/{job.id}/events", headers=headers) as answer:
        events = _events(answer)
        assert (await anext(events)).event == "state"
        assert from_json((await anext(events)).data) == Progressed(0.3, "sampling", 1)


async def test_a_client_that_goes_away_leaves_nothing_behind(
    live: LiveSite, http: httpx.AsyncClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The board is not followed any more after the watcher's connection has closed."""
    job = await live.site.start(await live.site.submit())
    follow, left = live.site.board.follow, asyncio.Event()

    async def followed(job_id: UUID) -> AsyncIterator[StampedEvent]:
        try:
            async for stamped in follow(job_id):
                yield stamped
        finally:
            left.set()

    monkeypatch.setattr(live.site.board, "follow", followed)
    await _publish(live, job.id, Progressed(0.1, "sampling", 1))
    async with http.stream("GET", f"{API}/{job.id}/events") as answer:
        events = _events(answer)
        assert [(await anext(events)).event for _ in range(2)] == ["state", "progress"]
        assert not left.is_set()
    await left.wait()


@pytest.mark.parametrize("announced", [True, False], ids=["announced", "chunked"])
async def test_an_upload_that_is_too_large_is_told_so(
    live: LiveSite, http: httpx.AsyncClient, announced: bool
) -> None:
    """A client that is still sending receives the 413, not only a broken connection."""
    head = b'--b\r\nContent-Disposition: form-data; name="image"; filename="p"\r\n\r\n'
    chunk, count = bytes(100_000), 4 * (LIMIT_BYTES + FORM_OVERHEAD_BYTES) // 100_000

    async def body() -> AsyncIterator[bytes]:
        yield head
        for _ in range(count):
            yield chunk

    headers = {"Content-Type": "multipart/form-data; boundary=b"}
    if announced:
        headers["Content-Length"] = str(len(head) + count * len(chunk))
    answer = await http.post(API, content=body(), headers=headers)
    assert (answer.status_code, answer.json()["code"]) == (413, "image_too_large")


@pytest.mark.uploads
async def test_a_body_that_trickles_is_told_so(
    live: LiveSite, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A client that reads while it sends receives the 408. Then its connection is closed, because
    its body would otherwise be read forever."""
    monkeypatch.setattr(BodyPace, "PATIENCE_S", 0.5)
    url = httpx.URL(live.url)
    reader, writer = await asyncio.open_connection(url.host, url.port)
    writer.write(
        f"POST {API} HTTP/1.1\r\nHost: {url.host}\r\nAuthorization: Bearer {live.site.token()}\r\n"
        "Content-Type: multipart/form-data; boundary=b\r\nContent-Length: 100000\r\n\r\n"
        '--b\r\nContent-Disposition: form-data; name="image"; filename="p"\r\n\r\n'.encode()
    )
    async with asyncio.timeout(DEADLINE_S):
        sending = asyncio.create_task(_trickle(writer))
        head = await reader.readuntil(b"\r\n\r\n")
        assert head.startswith(b"HTTP/1.1 408 ")
        assert b'"code":"upload_too_slow"' in await reader.readuntil(b"}")
        await sending


async def _trickle(writer: asyncio.StreamWriter) -> None:
    """Send a byte at a time until the other side has closed."""
    with suppress(ConnectionError):
        while True:
            writer.write(b"x")
            await writer.drain()
            await asyncio.sleep(0.05)


@pytest.mark.uploads
async def test_a_stream_outlives_the_patience_with_bodies(
    live: LiveSite, http: httpx.AsyncClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The limit on slow bodies does not affect a request without a body, however long its answer
    takes."""
    monkeypatch.setattr(BodyPace, "PATIENCE_S", 0.2)
    job = await live.site.start(await live.site.submit())
    async with http.stream("GET", f"{API}/{job.id}/events") as answer:
        events = _events(answer)
        await anext(events)
        await asyncio.sleep(1)
        await live.site.succeed(job)
        rest = [from_json(event.data) async for event in events]
    assert rest == [StateChanged(JobStatus.SUCCEEDED, 1)]


async def test_the_local_issuer_is_a_process_of_its_own(tmp_path: Path) -> None:
    """It publishes the key that signs the tokens, and exits with status 0 on SIGTERM."""
    port = free_port()
    url = issuer_url(port)
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "serve_app.auth.local_issuer"),
        *("--state-dir", str(tmp_path), "--port", str(port)),
    )
    try:
        async with asyncio.timeout(DEADLINE_S), httpx.AsyncClient() as http:
            while True:
                try:
                    answer = await http.get(f"{url}/.well-known/openid-configuration")
                    break
                except httpx.TransportError:
                    await asyncio.sleep(0.05)  # until the deadline
            assert answer.json()["issuer"] == url
            settings = settings_for_tests(local_issuer_url=url)
            authenticator = Authenticator(issuer_from(settings), http)
            token = mint_token(tmp_path, url, LOCAL_AUDIENCE, "ann")
            assert (await authenticator.authenticate(token)).sub == "ann"
            assert (await http.get(f"{url}/issuer-key.pem")).status_code == 404
    finally:
        process.send_signal(signal.SIGTERM)
        status = await process.wait()
    assert status == 0
