"""Watch jobs: live events from the status board, and states from the jobs' rows.

States come from the rows alone. A state on the board is a hint to read the row, unless the process
that committed the job's end put the row beside it. In addition, one statement reads the rows of all
watched jobs every `poll_s`. So no watcher misses the end while the board is down, or trusts an
attempt that has lost its lease. All watchers of a job share its feed (`serve_app.watch.job_feed`).
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator, Sequence
from contextlib import asynccontextmanager
from uuid import UUID

import structlog

from persistence.redis.stream_codec import StreamId, parse_id
from restoration.errors import DependencyUnavailable
from restoration.events import StateChanged
from restoration.jobs import Job
from restoration.limits.fair_places import context_of
from restoration.ports import JobStore, StatusBoard
from serve_app.watch.job_feed import LiveJob, Seen, is_later, state_of

log = structlog.get_logger(__name__)

POLL_S = 2.0


class JobWatcher:
    """Follows the watched jobs for all watchers of a replica."""

    def __init__(self, jobs: JobStore, board: StatusBoard, poll_s: float = POLL_S) -> None:
        self._jobs = jobs
        self._board = board
        self._poll_s = poll_s
        self._live: dict[UUID, LiveJob] = {}
        self._polling: asyncio.Task[None] | None = None

    def watch(self, job: Job, after_id: str | None = None) -> AsyncGenerator[Seen | None, None]:
        """Yield the state of `job`, then its events until its end, and None now and then.

        The last event is the final state. A None comes after at most twice `poll_s` without events,
        so that the caller can do something else. A slow caller loses progress events. Raises
        InvalidRequest, at once, for a malformed `after_id`.
        """
        return self._watch(job, None if after_id is None else parse_id(after_id))

    async def _watch(self, job: Job, after: StreamId | None) -> AsyncGenerator[Seen | None, None]:
        told = state_of(job)
        yield Seen(told)
        if told.status.is_final:
            return
        async with self._joined(job) as live:
            live.shows_states = True
            place = live.start
            while not told.status.is_final:
                seen, place = live.next(place)
                if seen is None:
                    await live.wait()
                    if live.next(place)[0] is None:
                        yield None
                elif isinstance(seen.event, StateChanged):
                    if is_later(seen.event, than=told):
                        told = seen.event
                        yield seen
                elif seen.event.attempt >= told.attempt and _is_after(seen, after):
                    after = None
                    yield seen

    async def wait(self, job: Job, timeout_s: float) -> Job:
        """Return the job at its end, or as it is after `timeout_s`."""
        try:
            async with asyncio.timeout(timeout_s), self._joined(job) as live:
                while not live.job.status.is_final:
                    await live.wait()
                return live.job
        except TimeoutError:
            log.debug("job_not_finished_in_time", job_id=str(job.id), timeout_s=timeout_s)
            return await self._reread(job)

    @asynccontextmanager
    async def _joined(self, job: Job) -> AsyncIterator[LiveJob]:
        live = self._live.get(job.id)
        if live is None or live.is_over:
            live = self._live[job.id] = LiveJob(job, self._jobs, self._board)
        if self._polling is None or self._polling.done():
            # works for all watchers, so not in the first one's name
            self._polling = asyncio.create_task(self._poll(), context=context_of(None))
            self._polling.add_done_callback(self._ended)
        live.learn(job)
        live.users += 1
        try:
            yield live
        finally:
            live.users -= 1
            if not live.users:
                if self._live.get(job.id) is live:
                    del self._live[job.id]
                if not self._live and self._polling is not None:
                    self._polling.cancel()
                    self._polling = None
                await live.aclose()

    async def _poll(self) -> None:
        while True:
            # The board may lose a state, so the rows have to be read as well.
            await asyncio.sleep(self._poll_s)
            for row in await self._rows():
                if row.id in self._live:
                    self._live[row.id].learn(row)
            for live in self._live.values():
                live.tick()

    async def _rows(self) -> Sequence[Job]:
        try:
            return await self._jobs.find(list(self._live))
        except DependencyUnavailable as error:
            log.warning("jobs_not_reread", jobs=len(self._live), reason=error.message)
            return ()

    def _ended(self, task: asyncio.Task[None]) -> None:
        # Only a bug ends the task early. It must reach the watchers, and not look like an outage.
        if not task.cancelled() and (error := task.exception()) is not None:
            for live in self._live.values():
                live.fail(error)

    async def _reread(self, job: Job) -> Job:
        try:
            return await self._jobs.get(job.id)
        except DependencyUnavailable as error:
            log.warning("job_not_reread", job_id=str(job.id), reason=error.message)
            return job


def _is_after(seen: Seen, after: StreamId | None) -> bool:
    return after is None or seen.id is None or parse_id(seen.id) > after
