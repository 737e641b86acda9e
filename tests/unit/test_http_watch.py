"""The events that a job's watcher sees while the board fails; and Server-Sent Events as text."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator, Sequence
from contextlib import aclosing
from uuid import UUID

import pytest
from hypothesis import given
from hypothesis import strategies as st
from starlette.types import Message

from persistence.redis.stream_codec import parse_id
from restoration.events import JobEvent, Progressed, StateChanged, from_json
from restoration.jobs import Job, JobStatus
from serve_app.routes import events
from serve_app.sse import Decoder, ServerEvent, encode, encode_comment
from serve_app.watch.job_feed import FeedEvent
from serve_app.watch.jobs import JobWatcher
from tests.fakes.site import API, Site

QUEUED = StateChanged(JobStatus.QUEUED, 0)
RUNNING = StateChanged(JobStatus.RUNNING, 1)
SUCCEEDED = StateChanged(JobStatus.SUCCEEDED, 1)
DEADLINE_S = 300


@pytest.fixture
async def job(site: Site) -> Job:
    return await site.start(await site.submit())


async def _seen(site: Site, job: Job, poll_s: float = 0.05) -> list[FeedEvent]:
    """Return everything that a watcher sees from now to the end."""
    watcher = JobWatcher(site.jobs, site.board, poll_s)
    async with asyncio.timeout(DEADLINE_S), aclosing(watcher.watch(job)) as watch:
        return [seen async for seen in watch if seen is not None]


def _progress(*fractions: float, attempt: int = 1) -> list[JobEvent]:
    return [Progressed(fraction, "sampling", attempt) for fraction in fractions]


async def _publish(site: Site, job_id: UUID, happened: Sequence[JobEvent]) -> None:
    await site.board.publish([(job_id, event) for event in happened])


async def test_the_state_comes_first_and_the_end_last(site: Site, job: Job) -> None:
    """A watcher sees the present state, the events, and a final state, then no more."""
    async with asyncio.TaskGroup() as group:
        # so rare a poll that only the board's hint can reveal the end
        watching = group.create_task(_seen(site, job, poll_s=10 * DEADLINE_S))
        await _publish(site, job.id, _progress(0.1, 0.7))
        await site.succeed(job)
        await _publish(site, job.id, [SUCCEEDED])
    assert [seen.event for seen in watching.result()] == [RUNNING, *_progress(0.1, 0.7), SUCCEEDED]


async def test_a_job_that_has_ended_shows_its_end_at_once(site: Site, job: Job) -> None:
    """A late watcher gets the final state without old progress."""
    await _publish(site, job.id, _progress(0.5))
    await site.succeed(job)
    ended = await site.jobs.get(job.id)
    assert [seen.event for seen in await _seen(site, ended)] == [SUCCEEDED]


async def test_the_end_is_seen_without_a_board(site: Site, job: Job) -> None:
    """With Redis gone, the row alone reveals the end."""
    site.board.down = True
    async with asyncio.TaskGroup() as group:
        watching = group.create_task(_seen(site, job))
        await site.succeed(job)
    assert [seen.event for seen in watching.result()] == [RUNNING, SUCCEEDED]


async def test_a_watch_outlives_an_outage_of_the_board(site: Site, job: Job) -> None:
    """Events resume after the board is back, from where they stopped, each of them once."""
    seen: list[JobEvent] = []
    await _publish(site, job.id, _progress(0.1))
    async with (
        asyncio.timeout(DEADLINE_S),
        aclosing(site.services.watcher.watch(job)) as watch,
    ):
        async for item in watch:
            seen += [item.event] if item else []
            if item and item.event == _progress(0.1)[0]:
                site.board.down = True
            elif item is None and site.board.down:
                site.board.down = False
                await _publish(site, job.id, _progress(0.2))
            elif item and item.event == _progress(0.2)[0]:
                await site.succeed(job)
    assert seen == [RUNNING, *_progress(0.1, 0.2), SUCCEEDED]


async def test_an_outage_of_the_row_is_waited_out(site: Site, job: Job) -> None:
    """With Postgres gone the watch stays open, and sees the end once it is back."""
    async with (
        asyncio.timeout(DEADLINE_S),
        aclosing(site.services.watcher.watch(job)) as watch,
    ):
        assert await anext(watch) == FeedEvent(RUNNING)
        site.jobs.down = True
        assert await anext(watch) is None
        site.jobs.down = False
        await site.succeed(job)
        assert [item.event async for item in watch if item] == [SUCCEEDED]


async def test_a_state_on_the_board_is_not_believed(site: Site, job: Job) -> None:
    """An attempt that lost its lease may report any state; states come from the row alone."""
    zombie = StateChanged(JobStatus.FAILED, 1)
    await _publish(site, job.id, [zombie, *_progress(0.3)])
    async with asyncio.TaskGroup() as group:
        watching = group.create_task(_seen(site, job))
        await site.succeed(job)
    assert [seen.event for seen in watching.result()][-1] == SUCCEEDED
    assert zombie not in [seen.event for seen in watching.result()]


async def test_progress_of_a_lost_attempt_is_left_out(site: Site, job: Job) -> None:
    """A watcher does not switch back and forth between two attempts."""
    await _publish(site, job.id, _progress(0.9))
    await site.jobs.release(job.ref, None)
    second = await site.start(job.id)
    of_second = _progress(0.1, attempt=2)
    await _publish(site, job.id, _progress(0.95) + of_second)
    seen: list[JobEvent] = []
    async with (
        asyncio.timeout(DEADLINE_S),
        aclosing(site.services.watcher.watch(second)) as watch,
    ):
        async for item in watch:
            seen += [item.event] if item else []
            if seen[-1:] == of_second:
                await site.succeed(second)
    running, succeeded = (StateChanged(s, 2) for s in (JobStatus.RUNNING, JobStatus.SUCCEEDED))
    assert seen == [running, *of_second, succeeded]


async def test_a_watch_resumes_after_an_event(site: Site, job: Job) -> None:
    """After Last-Event-ID come only later events; the present state comes in any case."""
    await _publish(site, job.id, _progress(0.1, 0.2, 0.3))
    second_id = site.board.streams[job.id][1].id
    async with aclosing(site.services.watcher.watch(job, parse_id(second_id))) as watch:
        assert await anext(watch) == FeedEvent(RUNNING)
        third = site.board.streams[job.id][2]
        assert await anext(watch) == FeedEvent(third.event, third.id)


async def test_a_board_that_never_rests_cannot_hide_the_end(site: Site, job: Job) -> None:
    """The row is read in time even while events come without a pause."""
    watcher = JobWatcher(site.jobs, site.board, poll_s=0.05)
    await _publish(site, job.id, _progress(*[0.5] * 50_000))
    await site.succeed(job)
    async with asyncio.timeout(DEADLINE_S), aclosing(watcher.watch(job)) as watch:
        seen = [item.event async for item in watch if item]
    assert seen[-1] == SUCCEEDED
    assert len(seen) < 50_000


async def test_a_bug_in_the_board_ends_the_watch(
    site: Site, job: Job, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An unexpected error is not treated as an outage and retried endlessly."""

    async def broken(*_: object) -> AsyncIterator[None]:
        raise RuntimeError("bug")
        yield

    monkeypatch.setattr(site.board, "follow", broken)
    with pytest.raises(RuntimeError, match="bug"):
        await _seen(site, job)


async def test_the_stream_is_the_watch(
    site: Site, job: Job, monkeypatch: pytest.MonkeyPatch
) -> None:
    """GET events: JSON by type, ids to resume from, comments in between, and then it closes."""
    find, reads = site.jobs.find, 0

    async def find_and_succeed(job_ids: Sequence[UUID]) -> Sequence[Job]:
        nonlocal reads
        reads += 1
        if reads == 3:
            await site.succeed(job)
        return await find(job_ids)

    monkeypatch.setattr(events, "HEARTBEAT_S", 0)
    monkeypatch.setattr(site.jobs, "find", find_and_succeed)
    await _publish(site, job.id, _progress(0.4))
    async with site.client() as client:
        answer = await client.get(f"{API}/{job.id}/events")
    received = list(Decoder().feed(answer.text))
    assert answer.headers["content-type"].startswith("text/event-stream")
    assert answer.headers["cache-control"] == "no-store"
    assert encode_comment("alive").decode() in answer.text
    assert [from_json(event.data) for event in received] == [RUNNING, *_progress(0.4), SUCCEEDED]
    assert [event.event for event in received] == ["state", "progress", "state"]
    assert [event.id for event in received] == [None, site.board.streams[job.id][0].id, None]


async def test_a_connection_that_breaks_closes_the_watch() -> None:
    """A watch that cannot send is closed at once, not when it is garbage collected."""
    closed = False

    async def endless() -> AsyncGenerator[str, None]:
        nonlocal closed
        try:
            while True:
                yield "alive"
        finally:
            closed = True

    async def broken(message: Message) -> None:
        if message["type"] == "http.response.body":
            raise OSError("broken pipe")

    stream = events.EventStream(endless(), encode_comment, "ann")
    with pytest.raises(OSError, match="broken pipe"):
        await stream.stream_response(broken)
    assert closed


@pytest.mark.parametrize("last_id", ["yesterday", "1-", "1-x", "-1-0", "9" * 30 + "-0"])
async def test_an_event_id_that_is_none_is_refused(site: Site, job: Job, last_id: str) -> None:
    """An impossible Last-Event-ID gets a problem, not a stream that breaks."""
    async with site.client() as client:
        answer = await client.get(f"{API}/{job.id}/events", headers={"Last-Event-ID": last_id})
    assert (answer.status_code, answer.json()["code"]) == (400, "invalid_request")


_LINES = st.text(st.characters(exclude_characters="\r\n\0", exclude_categories=["Cs"]))
_EVENTS = st.builds(
    ServerEvent,
    event=_LINES.filter(bool),
    data=st.text(st.characters(exclude_characters="\r\0", exclude_categories=["Cs"])),
    id=st.none() | _LINES,
)


@given(st.lists(_EVENTS), st.data())
def test_events_survive_any_cut(sent: list[ServerEvent], data: st.DataObject) -> None:
    """Encoded events are decoded again, wherever the text is cut in transit."""
    text = "".join(encode(event).decode() + encode_comment("alive").decode() for event in sent)
    cuts = sorted(data.draw(st.sets(st.integers(0, len(text)))))
    decoder = Decoder()
    received: list[ServerEvent] = []
    for start, end in zip([0, *cuts], [*cuts, len(text)], strict=True):
        received += decoder.feed(text[start:end])
    assert received == sent
    ids = [event.id for event in sent if event.id is not None]
    assert decoder.last_id == (ids[-1] if ids else None)


@pytest.mark.parametrize("end", ["\n", "\r", "\r\n"])
def test_any_line_end_will_do(end: str) -> None:
    """The standard allows three line ends, one of which may be cut in two."""
    decoder = Decoder()
    text = end.join(["id: 1", "data: a", "data:b", "", "data: c", "", ""])
    received = [event for character in text for event in decoder.feed(character)]
    received += decoder.feed("data")
    assert received == [ServerEvent("message", "a\nb", "1"), ServerEvent("message", "c")]


def test_an_unfinished_event_is_dropped_with_its_connection() -> None:
    """A partial event is dropped and does not move the place to resume from."""
    decoder = Decoder("7")
    assert list(decoder.feed("id: 8\ndata: half")) == []
    assert decoder.last_id == "7"
