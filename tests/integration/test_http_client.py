"""The Python client against a real server, and over a bad connection."""

from __future__ import annotations

import asyncio
import os
import threading
from collections.abc import AsyncIterator, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from uuid import UUID, uuid4

import pytest
from starlette.responses import Response
from starlette.types import ASGIApp, Receive, Scope, Send
from typer.testing import CliRunner

from restoration.events import Progressed, StateChanged
from restoration.jobs import Artifact, JobStatus, OutputFormat, Priority
from serve_app.cli.main import app
from serve_app.client import ApiError, RestorationClient
from tests.fakes.live_site import LiveSite, LosesTheFirstAnswer, open_live_site
from tests.fakes.site import photo
from tests.support.polling import until


@pytest.fixture
async def live() -> AsyncIterator[LiveSite]:
    async with open_live_site() as live:
        yield live


class Store(ThreadingHTTPServer):
    """The target of signed URLs: serves `data`, and records the request headers in `seen`."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _StoreHandler)
        self.data = b""
        self.seen: list[dict[str, str]] = []

    async def signed_url(self, artifact: Artifact, filename: str, lifetime_s: int) -> str:
        return f"http://127.0.0.1:{self.server_port}/{artifact.key}?signature=secret"


class _StoreHandler(BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        assert isinstance(self.server, Store)
        self.server.seen.append({name.lower(): value for name, value in self.headers.items()})
        self.send_response(200)
        self.send_header("Content-Length", str(len(self.server.data)))
        self.end_headers()
        self.wfile.write(self.server.data)

    def log_message(self, format: str, *args: object) -> None:
        """Suppress the server's log."""


@pytest.fixture
def store(live: LiveSite, monkeypatch: pytest.MonkeyPatch) -> Iterator[Store]:
    with Store() as store:
        serving = threading.Thread(target=store.serve_forever, args=(0.05,))
        serving.start()
        monkeypatch.setattr(live.site.blobs, "signed_url", store.signed_url)
        yield store
        store.shutdown()
        serving.join()


async def test_everything_that_the_api_offers(live: LiveSite, tmp_path: Path) -> None:
    """A client can submit a file, show, list over pages and cancel jobs, and list workflows."""
    path = tmp_path / "photo.png"
    path.write_bytes(photo())

    def work(client: RestorationClient) -> None:
        ids = [
            client.submit(
                path,
                workflow="enlarge",
                params={"strength": 0.5},
                output_format=OutputFormat.WEBP,
                priority=Priority.BATCH,
            ).id
            for _ in range(3)
        ]
        shown = client.get(ids[0])
        assert (shown.params["strength"], shown.output_format) == (0.5, OutputFormat.WEBP)
        assert [job.id for job in client.list(limit=2)] == ids[::-1]
        assert client.cancel(ids[1]).status is JobStatus.CANCELLED
        assert [job.id for job in client.list(JobStatus.CANCELLED)] == [ids[1]]
        assert {"restore", "enlarge"} <= {workflow.name for workflow in client.workflows()}

    await live.call(work)


@pytest.mark.retry
async def test_failed_jobs_are_listed_and_sent_again_from_a_terminal(live: LiveSite) -> None:
    """`restore jobs --failed` shows failed jobs with their codes; `restore retry` prints the new
    id."""
    failed = await live.site.start(await live.site.submit())
    await live.site.fail(failed)
    other = await live.site.submit()
    access = ["--server", live.url, "--token", live.site.token()]

    def restore(*arguments: str) -> str:
        done = CliRunner().invoke(app, [*arguments, *access], catch_exceptions=False)
        assert done.exit_code == 0, done.output
        return done.output

    listed = await asyncio.to_thread(restore, "jobs", "--failed")
    assert str(failed.id) in listed
    assert "engine_failed" in listed
    assert str(other) not in listed
    again = UUID((await asyncio.to_thread(restore, "retry", str(failed.id))).strip())
    assert live.site.jobs.rows[again].retry_of == failed.id
    assert "engine_failed" in await asyncio.to_thread(restore, "show", str(failed.id))


@pytest.mark.admission
async def test_the_client_comes_back_when_the_queue_has_room() -> None:
    """The client waits as long as Retry-After says, within its patience, and then succeeds."""
    async with open_live_site(max_waiting_jobs=1) as live:
        waiting = await live.site.submit()
        with pytest.raises(ApiError, match="queue_full"):
            await live.call(lambda client: client.submit(photo()), retry_for_s=0.5)
        live.app = refused_once = RefusesOnce(live.app)
        await live.stop()
        await live.start()
        await live.site.start(waiting)
        job = await live.call(lambda client: client.submit(photo(), run_limit_s=9))
        assert refused_once.happened
        assert live.site.jobs.rows[job.id].options.run_limit_s == 9


class RefusesOnce:
    """Answers the first request with 429 and Retry-After: 1, and forwards the others."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app
        self.happened = False

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or self.happened:
            return await self._app(scope, receive, send)
        self.happened = True
        await Response("full", 429, headers={"Retry-After": "1"})(scope, receive, send)


async def test_events_go_on_after_the_server_was_away(live: LiveSite) -> None:
    """A broken stream resumes after the last received event, and is followed to the end."""
    job = await live.site.start(await live.site.submit())
    half_way = Progressed(0.5, "sampling", 1)
    await live.site.board.publish([(job.id, half_way)])
    loop, arrived = asyncio.get_running_loop(), asyncio.Event()
    live.app = resumptions = RemembersResumptions(live.app)

    def work(client: RestorationClient) -> list[object]:
        seen: list[object] = []
        for event in client.events(job.id):
            seen.append(event)
            if event == half_way:
                loop.call_soon_threadsafe(arrived.set)
        return seen

    async with asyncio.TaskGroup() as group:
        watching = group.create_task(live.call(work))
        await arrived.wait()
        await live.stop()
        await live.start()
        await resumptions.happened.wait()
        await live.site.succeed(job)
    assert watching.result()[0] == StateChanged(JobStatus.RUNNING, 1)
    assert watching.result()[-1] == StateChanged(JobStatus.SUCCEEDED, 1)
    assert resumptions.after_id == live.site.board.streams[job.id][0].id.encode()


class RemembersResumptions:
    """Forwards every request, and keeps the Last-Event-ID with which a client resumed."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app
        self.happened = asyncio.Event()
        self.after_id: bytes | None = None

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and (after_id := dict(scope["headers"]).get(b"last-event-id")):
            self.after_id = after_id
            self.happened.set()
        await self._app(scope, receive, send)


async def test_a_finished_job_is_waited_for_and_downloaded(
    live: LiveSite, store: Store, tmp_path: Path
) -> None:
    """`wait` returns at the job's end; the picture comes from the store, which never gets the
    token."""
    job = await live.site.start(await live.site.submit())
    out, store.data = tmp_path / "after.png", b"restored"

    def work(client: RestorationClient) -> None:
        assert client.wait(job.id).status is JobStatus.SUCCEEDED
        client.download(job.id, out)

    async with asyncio.TaskGroup() as group:
        group.create_task(live.call(work))
        await live.site.succeed(job, b"restored")
    assert out.read_bytes() == b"restored"
    assert "authorization" not in store.seen[0]


async def _ended(live: LiveSite, result: bytes | None) -> None:
    """Wait for the first job, and end it: with `result`, or by cancelling it."""
    await until(lambda: live.site.jobs.rows)
    [job] = live.site.jobs.rows.values()
    if result is None:
        await live.site.jobs.request_cancel(job.id)
    else:
        await live.site.succeed(await live.site.start(job.id), result)


@pytest.mark.parametrize("in_the_answer", [True, False])
async def test_a_photo_is_restored_in_one_call(
    live: LiveSite, store: Store, monkeypatch: pytest.MonkeyPatch, in_the_answer: bool
) -> None:
    """The answer to the submission is the result; the result of a longer job is fetched."""
    store.data = b"restored"
    if not in_the_answer:
        monkeypatch.setattr("serve_app.client.restorations._WAITING", {})
    async with asyncio.TaskGroup() as group:
        restoring = group.create_task(live.call(lambda client: client.restore(photo())))
        group.create_task(_ended(live, b"restored"))
    assert restoring.result() == b"restored"
    assert len(live.site.jobs.rows) == 1
    assert len(store.seen) == (0 if in_the_answer else 1)


@pytest.mark.parametrize("in_the_answer", [True, False])
async def test_what_was_not_restored_is_an_error(
    live: LiveSite, monkeypatch: pytest.MonkeyPatch, in_the_answer: bool
) -> None:
    """A job that ended without a result raises its code, both ways."""
    if not in_the_answer:
        monkeypatch.setattr("serve_app.client.restorations._WAITING", {})
    ending = asyncio.create_task(_ended(live, None))
    with pytest.raises(ApiError) as caught:
        await live.call(lambda client: client.restore(photo()))
    await ending
    assert caught.value.code == "result_not_ready"


async def test_a_damaged_answer_is_no_picture(
    live: LiveSite, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The service breaks off an answer that does not match the row's sha256, so that the client
    has no picture, and follows the link to the result, which leads nowhere here."""

    async def damaged(artifact: Artifact) -> bytes:
        return b"rest"

    monkeypatch.setattr(live.site.blobs, "get", damaged)
    ending = asyncio.create_task(_ended(live, b"restored"))
    with pytest.raises(ApiError, match=r"cannot reach https://blobs\.test/"):
        await live.call(lambda client: client.restore(photo()))
    await ending


async def test_a_damaged_download_leaves_no_file(
    live: LiveSite, store: Store, tmp_path: Path
) -> None:
    """Bytes that do not match the job's sha256 do not replace the file."""
    job = await live.site.start(await live.site.submit())
    await live.site.succeed(job, b"restored")
    out, store.data = tmp_path / "after.png", b"rest"
    out.write_bytes(b"an earlier result")
    with pytest.raises(ApiError, match="corrupt_download"):
        await live.call(lambda client: client.download(job.id, out))
    assert os.listdir(tmp_path) == ["after.png"]
    assert out.read_bytes() == b"an earlier result"


async def test_an_answer_lost_on_the_way_makes_no_second_job(live: LiveSite) -> None:
    """The client retries with the same key, and gets the job that it created the first time."""
    await live.stop()
    live.app = LosesTheFirstAnswer(live.app)
    await live.start()
    job = await live.call(lambda client: client.submit(photo()))
    assert list(live.site.jobs.rows) == [job.id]


async def test_a_failure_that_took_longer_than_patience_is_tried_again(live: LiveSite) -> None:
    """Patience counts from the first failure, so that a slow upload has a second try with its
    key."""
    await live.stop()
    live.app = LosesTheFirstAnswer(live.app, wait_s=1.2)
    await live.start()
    job = await live.call(lambda client: client.submit(photo()), retry_for_s=1.0)
    assert list(live.site.jobs.rows) == [job.id]


async def test_a_service_lost_late_in_the_wait_costs_no_photo(live: LiveSite, store: Store) -> None:
    """Even without patience the client asks for the same job again, and fetches its result."""
    store.data = b"restored"
    await live.stop()
    live.app = LosesTheFirstAnswer(live.app)
    await live.start()
    ending = asyncio.create_task(_ended(live, b"restored"))
    restored = await live.call(lambda client: client.restore(photo()), retry_for_s=0.0)
    await ending
    assert restored == b"restored"
    assert len(live.site.jobs.rows) == 1


async def test_a_refusal_is_an_error_with_everything_in_it(live: LiveSite) -> None:
    """The error has the problem's code, status, message and request id, and is not retried."""
    with pytest.raises(ApiError) as caught:
        await live.call(lambda client: client.get(uuid4()))
    assert (caught.value.code, caught.value.status) == ("job_not_found", 404)
    assert caught.value.request_id in str(caught.value)


async def test_a_service_that_is_gone_is_reported_in_time(live: LiveSite) -> None:
    """After its patience the client names the URL that it could not reach."""
    await live.stop()
    with pytest.raises(ApiError, match=live.url) as caught:
        await live.call(lambda client: client.get(uuid4()), retry_for_s=0.3)
    assert (caught.value.code, caught.value.status) == ("unreachable", 0)
    await live.start()


async def test_a_watch_of_no_job_ends(live: LiveSite) -> None:
    """Events of a missing job raise an error instead of waiting."""
    with pytest.raises(ApiError, match="job_not_found"):
        await live.call(lambda client: list(client.events(UUID(int=0))))


async def test_what_is_not_the_service_is_recognised(live: LiveSite) -> None:
    """An answer of another program raises its own error instead of crashing the client."""
    await live.stop()
    live.app = Response("<html>", media_type="text/html")
    await live.start()
    with pytest.raises(ApiError, match="bad_answer"):
        await live.call(lambda client: client.get(uuid4()))
