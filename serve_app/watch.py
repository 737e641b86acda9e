"""The life of one job as its watchers see it: live events, and the row whenever it counts.

States come from the row alone. A state on the board is only a hint to read the row, which is read
every `poll_s` as well, so that no watcher misses the end with the board down, or believes an
attempt that lost its lease.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator
from dataclasses import dataclass
from typing import Self
from uuid import UUID

import structlog

from restoration.errors import DependencyUnavailable
from restoration.events import JobEvent, StateChanged, is_last
from restoration.jobs import Job
from restoration.ports import JobStore, StampedEvent, StatusBoard

log = structlog.get_logger(__name__)

POLL_S = 2.0
_BUFFERED_EVENTS = 64


@dataclass(frozen=True, slots=True)
class Seen:
    """An event, and its place in the job's stream if it has one."""

    event: JobEvent
    id: str | None = None


class JobWatcher:
    """Follows jobs. Holds no state between watches."""

    def __init__(self, jobs: JobStore, board: StatusBoard, poll_s: float = POLL_S) -> None:
        self._jobs = jobs
        self._board = board
        self._poll_s = poll_s

    def watch(self, job: Job, after_id: str | None = None) -> AsyncGenerator[Seen | None, None]:
        """The state that `job` has, then what happens until its end; None now and then.

        The last event is the final state. A None, at least every `poll_s` in which nothing
        happens, lets the caller do something else. Raises InvalidRequest, at once, for an
        `after_id` that no event ever had.
        """
        return self._watch(job, _Feed(self._board, job.id, after_id))

    async def _watch(self, job: Job, feed: _Feed) -> AsyncGenerator[Seen | None, None]:
        yield Seen(_state_of(job))
        async with feed:
            while not job.status.is_final:
                seen, job = await self._step(job, feed)
                yield seen

    async def wait(self, job: Job, timeout_s: float) -> Job:
        """The job at its end, or as it is after `timeout_s`."""
        try:
            async with asyncio.timeout(timeout_s), _Feed(self._board, job.id, None) as feed:
                while not job.status.is_final:
                    stamped = await feed.next(self._poll_s)
                    if stamped is None or is_last(stamped.event):
                        job = await self._reread(job)
                return job
        except TimeoutError:
            log.debug("job_not_finished_in_time", job_id=str(job.id), timeout_s=timeout_s)
            return await self._reread(job)

    async def _step(self, job: Job, feed: _Feed) -> tuple[Seen | None, Job]:
        stamped = await feed.next(self._poll_s)
        if stamped is not None and not isinstance(stamped.event, StateChanged):
            is_stale = stamped.event.attempt < job.attempt
            return (None if is_stale else Seen(stamped.event, stamped.id)), job
        latest = await self._reread(job)
        if (latest.status, latest.attempt) == (job.status, job.attempt):
            return None, latest
        return Seen(_state_of(latest), stamped.id if stamped else None), latest

    async def _reread(self, job: Job) -> Job:
        try:
            return await self._jobs.get(job.id)
        except DependencyUnavailable as error:
            log.warning("job_not_reread", job_id=str(job.id), reason=error.message)
            return job


def _state_of(job: Job) -> StateChanged:
    return StateChanged(job.status, job.attempt)


class _Feed:
    """A job's events from the board, with a timeout, across outages of the board."""

    def __init__(self, board: StatusBoard, job_id: UUID, after_id: str | None) -> None:
        self._board = board
        self._job_id = job_id
        self._after_id = after_id
        self._source = board.follow(job_id, after_id)
        self._events: asyncio.Queue[StampedEvent] = asyncio.Queue(_BUFFERED_EVENTS)
        self._pump: asyncio.Task[None] | None = None
        self._poll_at = 0.0  # zero: to be set by the next call

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        if self._pump is not None:
            self._pump.cancel()
            await asyncio.gather(self._pump, return_exceptions=True)

    async def next(self, poll_s: float) -> StampedEvent | None:
        """The next event; None once in every `poll_s`, however many events there are."""
        if self._pump is None:
            self._pump = asyncio.create_task(self._run())
        elif self._pump.done():
            self._restart(self._pump)
        if not self._poll_at:
            self._poll_at = asyncio.get_running_loop().time() + poll_s
        try:
            async with asyncio.timeout_at(self._poll_at):
                return await self._events.get()
        except TimeoutError:
            self._poll_at = 0.0
            return None

    def _restart(self, ended: asyncio.Task[None]) -> None:
        ended.result()  # what nobody expected ends the watch
        self._source = self._board.follow(self._job_id, self._after_id)
        self._pump = asyncio.create_task(self._run())

    async def _run(self) -> None:
        try:
            async for stamped in self._source:
                await self._events.put(stamped)
                self._after_id = stamped.id
        except DependencyUnavailable as error:
            log.warning("progress_unavailable", job_id=str(self._job_id), reason=error.message)
