"""The events that a follower's mailbox keeps when the follower is slow."""

from __future__ import annotations

import asyncio

from persistence.redis.followers import MAILBOX_SIZE, Mailbox
from persistence.redis.stream_codec import START
from restoration.events import JobEvent, Previewed, Progressed, StateChanged
from restoration.jobs import JobStatus
from tests.support.samples import new_job

RUNNING = StateChanged(JobStatus.RUNNING, attempt=1)
DONE = StateChanged(JobStatus.SUCCEEDED, attempt=1)
MORE_THAN_FITS = 2 * MAILBOX_SIZE


def _progress(n: int) -> Progressed:
    return Progressed(n / 1000, "upscaling", attempt=1)


async def _after(*events: JobEvent) -> list[JobEvent]:
    """Return everything taken from a mailbox after these were offered in a row."""
    mailbox = Mailbox(new_job().id, START)
    for n, event in enumerate(events, start=1):
        mailbox.offer((n, 0), event)
    mailbox.close()
    taken = []
    while (stamped := await mailbox.take()) is not None:
        taken.append(stamped.event)
    return taken


async def test_progress_is_dropped_oldest_first_and_states_never() -> None:
    """A full mailbox drops its oldest progress, wherever states lie."""
    progress = [_progress(n) for n in range(MORE_THAN_FITS)]
    kept = progress[-(MAILBOX_SIZE - 2) :]
    assert await _after(RUNNING, *progress, DONE) == [RUNNING, *kept, DONE]


async def test_the_newest_state_is_kept_among_states_alone() -> None:
    """Even with states alone, memory is bounded and the end is not lost."""
    taken = await _after(*[RUNNING] * MORE_THAN_FITS, DONE)
    assert len(taken) == MAILBOX_SIZE
    assert taken[-1] == DONE


async def test_one_picture_at_a_time() -> None:
    """A preview replaces one that was not taken yet."""
    old, new = (Previewed.from_bytes(data, "image/png", 1) for data in (b"old", b"new"))
    assert await _after(old, RUNNING, new, DONE) == [RUNNING, new, DONE]


async def test_what_was_seen_is_not_seen_again() -> None:
    """An offer at or before the cursor is ignored, so a stream may be read again."""
    mailbox = Mailbox(new_job().id, (5, 1))
    for position in ((4, 9), (5, 1), (5, 2), (5, 2)):
        mailbox.offer(position, DONE)
    mailbox.offer((6, 0), None)
    assert mailbox.cursor == (6, 0)
    stamped = await mailbox.take()
    assert stamped is not None
    assert stamped.id == "5-2"
    mailbox.close()
    assert await mailbox.take() is None


async def test_a_follower_that_waits_is_woken() -> None:
    """`take` returns as soon as an event comes, and when none can come any more."""
    mailbox = Mailbox(new_job().id, START)
    taking = asyncio.create_task(mailbox.take())
    await asyncio.sleep(0)
    mailbox.offer((1, 0), DONE)
    assert (await taking) is not None
    taking = asyncio.create_task(mailbox.take())
    await asyncio.sleep(0)
    mailbox.close()
    assert await taking is None
