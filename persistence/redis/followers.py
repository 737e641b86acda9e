"""Follow the events of any number of jobs on one Redis connection per process.

All followed streams are read with one blocking XREAD, each from the earliest id that one of its
followers needs. A follower skips the entries that it has had. A new follower interrupts the read
through a control stream, so that no wake-up is lost. If Redis fails, the reader reconnects until it
is closed.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections import deque
from collections.abc import AsyncIterator
from uuid import UUID, uuid4

import structlog
from redis.asyncio import Redis
from redis.exceptions import RedisError

from persistence.redis.stream_codec import (
    PREVIEW,
    START,
    StreamId,
    format_id,
    latest_key,
    parse_event,
    read_entries,
    stream_key,
)
from restoration.backoff import backoff_s
from restoration.events import JobEvent, Previewed
from restoration.jobs import Job
from restoration.ports.progress import BOARD_EVENTS, StampedEvent

log = structlog.get_logger(__name__)

BLOCK_S = 2.0
_READ_COUNT = 200
UNREAD_EVENTS = 2 * BOARD_EVENTS
_BACKOFF_S = (0.05, 2.0)


class Follower:
    """The events that one follower has not taken: the newest, with at most one preview."""

    def __init__(self, job_id: UUID) -> None:
        self.job_id = job_id
        self.cursor = START  # id of the last entry seen, with or without an event
        self._events: deque[StampedEvent] = deque(maxlen=UNREAD_EVENTS)
        self._changed = asyncio.Event()
        self._closed = False

    def offer(self, position: StreamId, event: JobEvent | None, row: Job | None = None) -> None:
        """Add the event at `position`, unless it was offered before. None only moves the cursor."""
        if position <= self.cursor:
            return
        self.cursor = position
        if event is None:
            return
        if isinstance(event, Previewed):
            for unread in self._events:
                if isinstance(unread.event, Previewed):
                    self._events.remove(unread)
                    break
        self._events.append(StampedEvent(format_id(position), event, row))
        self._changed.set()

    def close(self) -> None:
        self._closed = True
        self._changed.set()

    async def take(self) -> StampedEvent | None:
        """Wait for the next event and return it, or None once closed and empty."""
        while not self._events:
            if self._closed:
                return None
            self._changed.clear()
            await self._changed.wait()
        return self._events.popleft()


class StreamReader:
    """Reads the streams for all followers, from the first follower until it is closed."""

    def __init__(self, commands: Redis, blocking: Redis) -> None:
        """Create the reader. `blocking` is for its use only, with a timeout above BLOCK_S."""
        self._commands = commands
        self._blocking = blocking
        self._followers: set[Follower] = set()
        self._control_key = f"restore:reader:{uuid4()}"
        self._control_at = START
        self._closing = asyncio.Event()
        self._task: asyncio.Task[None] | None = None

    @contextlib.asynccontextmanager
    async def join(self, job_id: UUID) -> AsyncIterator[Follower]:
        """Follow the events of `job_id` within the block, those that are kept first."""
        follower = Follower(job_id)
        self._followers.add(follower)
        try:
            if self._task is None or self._task.done():
                self._task = asyncio.create_task(self._run(), name="stream-reader")
                self._task.add_done_callback(self._ended)
            await self._interrupt()
            _honour_cancel()
            yield follower
        finally:
            self._followers.discard(follower)

    async def aclose(self) -> None:
        """Stop reading, and end every follower's iteration."""
        self._closing.set()
        while self._task is not None and not self._task.done():
            self._task.cancel()  # may have to be repeated: see `_honour_cancel`
            await asyncio.wait([self._task], timeout=0.1)
        self._close_followers()

    async def _interrupt(self) -> None:
        # If Redis is unavailable, the reader is not blocked in a read and needs no interruption.
        with contextlib.suppress(RedisError):
            async with self._commands.pipeline(transaction=False) as pipeline:
                pipeline.xadd(self._control_key, {"joined": ""}, maxlen=1, approximate=False)
                pipeline.expire(self._control_key, 60)
                await pipeline.execute()

    async def _run(self) -> None:
        failures = 0
        while not self._closing.is_set():
            try:
                await self._read()
                failures = 0
            except RedisError as error:
                log.warning("progress_stands_still", reason=str(error))
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(backoff_s(*_BACKOFF_S, failures)):
                        await self._closing.wait()
                failures += 1

    def _ended(self, task: asyncio.Task[None]) -> None:
        # Only a bug ends the task early. Its followers must not wait for ever then.
        if not task.cancelled() and (error := task.exception()) is not None:
            log.error("stream_reader_failed", exc_info=error)
        self._close_followers()

    def _close_followers(self) -> None:
        for follower in self._followers:
            follower.close()

    async def _read(self) -> None:
        """Do one XREAD and deliver its entries."""
        asked: dict[UUID, StreamId] = {}
        for follower in self._followers:
            asked[follower.job_id] = min(
                follower.cursor, asked.get(follower.job_id, follower.cursor)
            )
        jobs = {stream_key(job_id): job_id for job_id in asked}
        positions = {self._control_key: self._control_at} | {
            key: asked[job_id] for key, job_id in jobs.items()
        }
        read = await read_entries(self._blocking, positions, _READ_COUNT, BLOCK_S)
        if control := read.pop(self._control_key, None):
            self._control_at = control[-1].id
        entries = {jobs[key]: found for key, found in read.items()}
        previews: dict[UUID, JobEvent | None] = {}
        if wanted := [job for job, found in entries.items() if any(e.is_preview for e in found)]:
            async with self._blocking.pipeline(transaction=False) as pipeline:
                for job_id in wanted:
                    pipeline.hget(latest_key(job_id), PREVIEW)
                newest = map(parse_event, await pipeline.execute())
                previews = dict(zip(wanted, newest, strict=True))
        for follower in self._followers:
            job_id = follower.job_id
            # A follower that joined during the read and needs earlier events waits for the next
            # read, because these would move its cursor past them.
            if job_id in entries and follower.cursor >= asked[job_id]:
                # All previews resolve to the newest picture; the follower keeps the last one.
                for entry in entries[job_id]:
                    event = previews.get(job_id) if entry.is_preview else entry.event
                    follower.offer(entry.id, event, entry.row)


def _honour_cancel() -> None:
    """Raise CancelledError if this task was cancelled and redis-py swallowed it.

    redis-py uses asyncio.wait_for, which in Python 3.11 swallows a cancellation that arrives
    together with its result.
    """
    task = asyncio.current_task()
    if task is not None and task.cancelling():
        raise asyncio.CancelledError
