"""The events that are kept for a slow follower."""

from __future__ import annotations

import asyncio

from persistence.redis.followers import UNREAD_EVENTS, Follower
from restoration.events import JobEvent, Previewed, Progressed, StateChanged
from restoration.jobs import JobStatus
from tests.support.samples import new_job

RUNNING = StateChanged(JobStatus.RUNNING, attempt=1)
DONE = StateChanged(JobStatus.SUCCEEDED, attempt=1)
MORE_THAN_FITS = 2 * UNREAD_EVENTS


def _progress(n: int) -> Progressed:
    return Progressed(n / 1000, "upscaling", attempt=1)


async def _after(*events: JobEvent) -> list[JobEvent]:
    """Return everything that a follower takes after these were offered in a row."""
    follower = Follower(new_job().id)
    for n, event in enumerate(events, start=1):
        follower.offer((n, 0), event)
    follower.close()
    taken = []
    while (stamped := await follower.take()) is not None:
        taken.append(stamped.event)
    return taken


async def test_the_oldest_events_are_dropped() -> None:
    """Memory is bounded, and the end is not lost."""
    progress = [_progress(n) for n in range(MORE_THAN_FITS)]
    kept = progress[-(UNREAD_EVENTS - 1) :]
    assert await _after(RUNNING, *progress, DONE) == [*kept, DONE]


async def test_one_picture_at_a_time() -> None:
    """A preview replaces one that was not taken yet."""
    old, new = (Previewed.from_bytes(data, "image/png", 1) for data in (b"old", b"new"))
    assert await _after(old, RUNNING, new, DONE) == [RUNNING, new, DONE]


async def test_what_was_seen_is_not_seen_again() -> None:
    """An offer at or before the cursor is ignored, so a stream may be read again."""
    follower = Follower(new_job().id)
    follower.offer((5, 1), None)
    for position in ((4, 9), (5, 1), (5, 2), (5, 2)):
        follower.offer(position, DONE)
    follower.offer((6, 0), None)
    assert follower.cursor == (6, 0)
    stamped = await follower.take()
    assert stamped is not None
    assert stamped.id == "5-2"
    follower.close()
    assert await follower.take() is None


async def test_a_follower_that_waits_is_woken() -> None:
    """`take` returns as soon as an event comes, and when none can come any more."""
    follower = Follower(new_job().id)
    taking = asyncio.create_task(follower.take())
    await asyncio.sleep(0)
    follower.offer((1, 0), DONE)
    assert (await taking) is not None
    taking = asyncio.create_task(follower.take())
    await asyncio.sleep(0)
    follower.close()
    assert await taking is None
