"""Many watchers of one job: the work that they share, and the events that each of them sees."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import AsyncIterator, Sequence
from contextlib import AsyncExitStack, aclosing
from uuid import UUID

import pytest

from restoration.events import JobEvent, Previewed, Progressed, StateChanged
from restoration.jobs import TRANSITIONS, Job, JobStatus
from restoration.ports.progress import StampedEvent
from serve_app.watch.job_feed import KEPT_EVENTS, FeedEvent, is_later
from serve_app.watch.jobs import JobWatcher
from tests.fakes.site import Site

RUNNING = StateChanged(JobStatus.RUNNING, 1)
SUCCEEDED = StateChanged(JobStatus.SUCCEEDED, 1)
WATCHERS = 50
NEVER_S = 3600.0
DEADLINE_S = 300


@pytest.fixture
async def job(site: Site) -> Job:
    return await site.start(await site.submit())


@pytest.fixture
def asked(site: Site, monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """Return how often the board was followed and a row was read."""
    counted: Counter[str] = Counter()
    follow, get = site.board.follow, site.jobs.get

    def counted_follow(job_id: UUID) -> AsyncIterator[StampedEvent]:
        counted["follow"] += 1
        return follow(job_id)

    async def counted_get(job_id: UUID, owner: str | None = None) -> Job:
        counted["get"] += 1
        return await get(job_id, owner)

    monkeypatch.setattr(site.board, "follow", counted_follow)
    monkeypatch.setattr(site.jobs, "get", counted_get)
    return counted


def _progress(*fractions: float, attempt: int = 1) -> list[JobEvent]:
    return [Progressed(fraction, "sampling", attempt) for fraction in fractions]


async def _publish(site: Site, job: Job, *happened: JobEvent) -> None:
    await site.board.publish([(job.id, event) for event in happened])


async def _all(watcher: JobWatcher, job: Job) -> list[FeedEvent]:
    async with aclosing(watcher.watch(job)) as watch:
        return [seen async for seen in watch if seen is not None]


async def test_watchers_of_a_job_share_its_events(
    site: Site, job: Job, asked: Counter[str]
) -> None:
    """For any number of watchers, the board is followed, a row read and an event encoded once."""
    watcher = JobWatcher(site.jobs, site.board, poll_s=NEVER_S)
    watching = [asyncio.create_task(_all(watcher, job)) for _ in range(WATCHERS)]
    await _publish(site, job, *_progress(0.1, 0.7))
    await site.succeed(job)
    await _publish(site, job, SUCCEEDED)
    seen = await asyncio.gather(*watching)
    assert [each.event for each in seen[0]] == [RUNNING, *_progress(0.1, 0.7), SUCCEEDED]
    assert all(each == seen[0] for each in seen)
    assert len({id(each.encoded) for all_ in seen for each in all_[1:]}) == 3
    assert asked == {"follow": 1, "get": 1}


@pytest.mark.progress
async def test_an_end_that_brings_its_row_is_not_read_again(
    site: Site, job: Job, asked: Counter[str]
) -> None:
    """The end event carries the committed row, so Postgres is not queried."""
    watcher = JobWatcher(site.jobs, site.board, poll_s=NEVER_S)
    waiting = asyncio.create_task(watcher.wait(job, DEADLINE_S))
    watching = asyncio.create_task(_all(watcher, job))
    await site.succeed(job)
    ended = site.jobs.rows[job.id]
    await site.board.conclude(ended)
    assert await waiting == ended
    assert [each.event for each in await watching] == [RUNNING, SUCCEEDED]
    assert asked == {"follow": 1}


async def test_one_that_leaves_takes_nothing_from_the_others(site: Site, job: Job) -> None:
    """A watch goes on when the one that first followed the board is closed."""
    watcher = JobWatcher(site.jobs, site.board, poll_s=NEVER_S)
    await _publish(site, job, *_progress(0.1))
    async with aclosing(watcher.watch(job)) as second:
        async with aclosing(watcher.watch(job)) as first:
            for watch in (first, second):
                assert await anext(watch) == FeedEvent(RUNNING)
                assert await anext(watch) is not None
        await _publish(site, job, *_progress(0.2))
        seen = await anext(second)
        assert seen is not None
        assert [seen.event] == _progress(0.2)


async def test_a_new_watch_begins_afresh(site: Site, job: Job, asked: Counter[str]) -> None:
    """After the last watcher has left, nothing is read; a new one sees the kept events."""
    watcher = JobWatcher(site.jobs, site.board, poll_s=NEVER_S)
    await _publish(site, job, *_progress(0.1, 0.2))
    for _ in range(2):
        async with aclosing(watcher.watch(job)) as watch:
            events = [seen.event for _ in range(3) if (seen := await anext(watch))]
        assert events == [RUNNING, *_progress(0.1, 0.2)]
    assert asked["follow"] == 2


async def test_whoever_joins_brings_the_news(site: Site, job: Job) -> None:
    """A row newer than the others' is sent to them, an older one is not."""
    watcher = JobWatcher(site.jobs, site.board, poll_s=NEVER_S)
    async with AsyncExitStack() as stack:
        first = await stack.enter_async_context(aclosing(watcher.watch(job)))
        assert await anext(first) == FeedEvent(RUNNING)
        told = asyncio.ensure_future(anext(first))
        await asyncio.sleep(0)
        await site.jobs.request_cancel(job.id)
        cancelling = await site.jobs.get(job.id)
        second = await stack.enter_async_context(aclosing(watcher.watch(cancelling)))
        late = await stack.enter_async_context(aclosing(watcher.watch(job)))
        states = [await anext(second), await anext(late)]
        joining = [asyncio.ensure_future(anext(watch)) for watch in (second, late)]
        state = StateChanged(JobStatus.CANCELLING, 1)
        assert [seen.event for seen in states if seen] == [state, RUNNING]
        assert await told == FeedEvent(state)
        assert await joining[1] == FeedEvent(state)
        joining[0].cancel()
        await asyncio.gather(joining[0], return_exceptions=True)


async def test_whoever_is_slow_loses_progress_only(site: Site, job: Job) -> None:
    """A watcher that falls too far behind gets the present state and continues from there."""
    watcher = JobWatcher(site.jobs, site.board, poll_s=NEVER_S)
    async with AsyncExitStack() as stack:
        slow = await stack.enter_async_context(aclosing(watcher.watch(job)))
        await _publish(site, job, *_progress(0.1))
        assert await anext(slow) == FeedEvent(RUNNING)
        assert await anext(slow) is not None
        await site.jobs.release(job.ref, None)
        second = await site.start(job.id)
        await _publish(site, job, StateChanged(JobStatus.RUNNING, 2))
        many = _progress(*[0.2] * KEPT_EVENTS, 0.3, attempt=2)
        await _publish(site, job, *many)
        quick = await stack.enter_async_context(aclosing(watcher.watch(second)))
        async for seen in quick:
            if seen is not None and seen.event == many[-1]:
                break
        events = [seen.event for _ in range(KEPT_EVENTS + 1) if (seen := await anext(slow))]
    assert events == [StateChanged(JobStatus.RUNNING, 2), *many[1:]]


async def test_of_previews_one_is_kept(site: Site, job: Job) -> None:
    """Pictures are large: a late watcher gets only the newest, in its place."""
    watcher = JobWatcher(site.jobs, site.board, poll_s=NEVER_S)
    pictures = [Previewed.from_bytes(bytes([n]), "image/jpeg", 1) for n in range(3)]
    async with AsyncExitStack() as stack:
        first = await stack.enter_async_context(aclosing(watcher.watch(job)))
        for picture, progress in zip(pictures, _progress(0.1, 0.2, 0.3), strict=True):
            await _publish(site, job, picture, progress)
        async for seen in first:
            if seen is not None and seen.event == _progress(0.3)[0]:
                break
        late = await stack.enter_async_context(aclosing(watcher.watch(job)))
        events = [seen.event for _ in range(5) if (seen := await anext(late))]
    assert events == [RUNNING, *_progress(0.1, 0.2), pictures[-1], *_progress(0.3)]


async def test_waiting_reads_the_row_at_the_end_alone(
    site: Site, job: Job, asked: Counter[str]
) -> None:
    """Waiting only for the end causes no reads of earlier states in Postgres."""
    watcher = JobWatcher(site.jobs, site.board, poll_s=NEVER_S)
    waiting = asyncio.create_task(watcher.wait(job, NEVER_S))
    await _publish(site, job, StateChanged(JobStatus.RUNNING, 2), *_progress(0.5))
    await site.succeed(job)
    await _publish(site, job, SUCCEEDED)
    assert (await waiting).status is JobStatus.SUCCEEDED
    assert asked == {"follow": 1, "get": 1}


async def test_all_rows_are_read_in_one_statement(
    site: Site, monkeypatch: pytest.MonkeyPatch
) -> None:
    """However many jobs are watched, one read of the rows gives the ends of all of them."""
    find, asked = site.jobs.find, list[int]()

    async def counted_find(job_ids: Sequence[UUID]) -> Sequence[Job]:
        asked.append(len(job_ids))
        return await find(job_ids)

    monkeypatch.setattr(site.jobs, "find", counted_find)
    site.board.down = True
    watcher = JobWatcher(site.jobs, site.board, poll_s=0.05)
    jobs = [await site.start(await site.submit()) for _ in range(3)]
    watching = [asyncio.create_task(_all(watcher, each)) for each in jobs]
    for each in jobs:
        await site.succeed(each)
    assert [seen[-1].event for seen in await asyncio.gather(*watching)] == [SUCCEEDED] * 3
    assert asked == [3]


async def test_a_bug_in_the_store_ends_the_watch(
    site: Site, job: Job, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An unexpected error from the store is not treated as an outage and retried endlessly."""

    async def broken(_: Sequence[UUID]) -> Sequence[Job]:
        raise RuntimeError("bug")

    monkeypatch.setattr(site.jobs, "find", broken)
    with pytest.raises(RuntimeError, match="bug"):
        await _all(JobWatcher(site.jobs, site.board, poll_s=0.01), job)


@pytest.mark.parametrize(
    ("source", "target"), [(s, t) for s, targets in TRANSITIONS.items() for t in sorted(targets)]
)
def test_every_transition_leads_to_something_later(source: JobStatus, target: JobStatus) -> None:
    """Of two states of a job the later is known; only a claim raises the attempt."""
    before = StateChanged(source, 1)
    after = StateChanged(target, 2 if target is JobStatus.RUNNING else 1)
    assert is_later(after, than=before)
    assert not is_later(before, than=after)
    assert not is_later(before, than=before)
